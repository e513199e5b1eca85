"""A model behind an API and the A/B test: what a reader need not see."""
import math

import numpy as np
import pytest
from hypothesis import given, settings as checks, strategies as st

from llmlab.kit import stats
from llmlab.kit.settings import UsageError
from llmlab.selection.service import (BOUNDS, Price, api_nats, beginnings, bounds, false_alarms, price_by_the_hour, plot_peeking, power_paired,
                                      power_unpaired, sequential, z_two_proportions)


# published values: Armitage, McPherson and Rowe 1969, table 2; Pocock 1977, table 1; O'Brien and Fleming 1979 as in Jennison and Turnbull 2000, table 2.3

@pytest.mark.parametrize("looks,share", [(1, .05), (2, .083), (3, .107), (4, .126), (5, .142), (10, .193), (20, .248), (50, .320)])
def test_repeated_looks_have_the_published_error(looks, share):
    assert false_alarms([1.96] * looks) == pytest.approx(share, abs=.0015)


@pytest.mark.parametrize("kind,looks,last", [("Pocock", 2, 2.178), ("Pocock", 5, 2.413), ("Pocock", 10, 2.555),
                                            ("O'Brien–Fleming", 2, 1.977), ("O'Brien–Fleming", 5, 2.040), ("O'Brien–Fleming", 10, 2.087)])
def test_bounds_are_the_published_ones(kind, looks, last):
    assert bounds(looks, kind)[-1] == pytest.approx(last, abs=.004)


@given(st.integers(1, 15), st.sampled_from(BOUNDS[1:]), st.floats(.8, .99))
@checks(max_examples=25, deadline=None)
def test_corrected_bounds_keep_what_they_promise(looks, kind, level):
    b = bounds(looks, kind, level)
    assert len(b) == looks and false_alarms(b) <= 1 - level + .002 and (np.diff(b) <= 1e-9).all()


@given(st.lists(st.floats(.5, 5), min_size=1, max_size=8))
@checks(max_examples=50, deadline=None)
def test_one_more_look_never_lowers_the_error(at):
    errors = [false_alarms(at[:k]) for k in range(1, len(at) + 1)]
    assert all(0 <= a <= 1 and b >= a - 1e-3 for a, b in zip(errors, errors[1:] + [1]))


def test_one_look_is_the_ordinary_test():
    for z in (1., 1.96, 3.): assert false_alarms([z]) == pytest.approx(2 * (1 - stats.NormalDist().cdf(z)), abs=1e-4)
    for kind in BOUNDS: assert bounds(1, kind)[0] == pytest.approx(1.96, abs=.002)


@pytest.mark.parametrize("wrong", [dict(looks=0), dict(looks=2, kind="Wald"), dict(looks=2, level=1.)])
def test_bounds_that_are_none(wrong):
    with pytest.raises(UsageError): bounds(**wrong)


@given(st.integers(1, 200), st.data())
@checks(max_examples=60, deadline=None)
def test_many_z_at_once_are_those_of_one_test(n, data):
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    assert z_two_proportions(np.array([b]), np.array([a]), n)[0] == pytest.approx(stats.two_proportions(a, n, b, n).statistic, abs=1e-9)


def test_power_is_the_share_of_single_tests_that_find_it():
    draw = np.random.default_rng(1)
    found = [stats.two_proportions(int(draw.binomial(300, .5)), 300, int(draw.binomial(300, .6)), 300).p_value < .05 for _ in range(600)]
    assert power_unpaired(.5, .6, 300).value == pytest.approx(100 * np.mean(found), abs=6)


def test_paired_power_is_the_share_of_single_mcnemar_tests_that_find_it():
    draw, n, found = np.random.default_rng(1), 200, []
    for _ in range(400):
        u = draw.random(n)
        found.append(stats.mcnemar(u < .55, (u < .45) | ((u > .55) & (u < .75))).p_value < .05)  # 10 % only the first, 20 % only the second
    assert power_paired(.3, .1, n).value == pytest.approx(100 * np.mean(found), abs=8)


def test_without_an_effect_power_is_the_error():
    assert power_unpaired(.7, .7, 1000).value == pytest.approx(5, abs=.6)
    assert 2 < power_paired(.2, 0., 1000).value < 5.5  # the exact test keeps below


@pytest.mark.parametrize("wrong", [(.1, .2), (1.2, .1)])
def test_an_effect_that_cannot_be(wrong):
    with pytest.raises(UsageError): power_paired(*wrong, 100)


def test_a_test_that_is_stopped_has_used_less():
    sure = sequential(.1, .9, 1000, bounds(10))
    assert sure.found.value == 100 and sure.used == pytest.approx(.1)
    none = sequential(.5, .5, 1000, [99.] * 4, experiments=100)
    assert none.found.value == 0 and none.used == 1
    assert sequential(0., 0., 50, [1.] * 3, experiments=10).found.value == 0


@pytest.mark.parametrize("at", [[], [2.] * 11])
def test_looks_that_cannot_be(at):
    with pytest.raises(UsageError): sequential(.5, .5, 10, at)


def test_the_same_seed_gives_the_same():
    assert sequential(.5, .5, 100, [2.] * 5, seed=3) == sequential(.5, .5, 100, [2.] * 5, seed=3)
    assert sequential(.5, .5, 100, [2.] * 5, seed=3) != sequential(.5, .5, 100, [2.] * 5, seed=4)


def test_prices():
    assert Price(1., 2.).of(1_000_000, 500_000) == 2. and Price(1., 2.).of(0, 0) == 0
    assert price_by_the_hour(1000 / 3600, 2.) == pytest.approx(2.) and price_by_the_hour(100, 1., .1) == pytest.approx(10 * price_by_the_hour(100, 1.))


@pytest.mark.parametrize("wrong", [(0, 1.), (10, -1.), (10, 1., 0), (10, 1., 1.1), (math.nan, 1.)])
def test_prices_that_are_none(wrong):
    with pytest.raises(UsageError): price_by_the_hour(*wrong)


class Words:
    "A tokenizer with the real interface: a word, an id."
    def __call__(self, texts, add_special_tokens): return dict(input_ids=[[len(w) for w in t.split()] for t in texts])
    def decode(self, ids): return " ".join("x" * i for i in ids)


def test_beginnings_are_followed_by_what_follows():
    prompts, truth = beginnings(["a bb ccc dddd eeeee", "too short", "a a a a"], Words(), n=9, prompt=3, following=1)
    assert prompts == [[1, 2, 3], [1, 1, 1]] and truth == ["xxxx", "x"]
    assert len(beginnings(["a b c d"] * 9, Words(), n=2, prompt=1, following=1)[0]) == 2
    with pytest.raises(UsageError, match="no text has 40 tokens"): beginnings(["a b"], Words(), n=1, prompt=30, following=10)


def test_nats_of_an_api_leave_out_the_first_token_only():
    from types import SimpleNamespace as N
    def create(prompt, **_): return N(choices=[N(logprobs=N(token_logprobs=[None, *[-float(i) for i in prompt[1:]]]))])
    assert api_nats(N(model="m", client=N(completions=N(create=create))), [[9, 1, 2], [9, 3], [9]]) == [3., 3., 0]


def test_peeking_is_drawn_with_what_was_calculated():
    import matplotlib
    matplotlib.use("agg")
    found = {k: sequential(.5, .5, 100, [1.96] * k, experiments=500).found for k in (1, 5)}
    ax = plot_peeking({"as if once": found}, {"as if once": {1: .05, 5: .14}})
    assert ax.get_ylabel() == "false alarms, %" and ax.get_legend_handles_labels()[1] == ["as if once"]
