"Intervals, pairing and serialisation of estimates."
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.kit import stats
from llmlab.kit.settings import UsageError
from llmlab.kit.stats import (Estimate, Shown, Table, Test, difference, estimate, exact, mcnemar, median_interval, minimum_detectable_effect, ratio,
                              sample_size, sample_size_mcnemar, two_proportions, wilson, written)

few = settings(max_examples=30, deadline=None)
numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))
positive = st.floats(1e-3, 1e6)
units = st.sampled_from(["", "ms", "%", "B", "×"])


@st.composite
def estimates(draw, kept=True):
    samples = draw(st.lists(numbers, min_size=1, max_size=12)) if kept and draw(st.booleans()) else None
    value, below, above = draw(numbers), draw(st.floats(0, 1e3)), draw(st.floats(0, 1e3))
    low = -math.inf if draw(st.booleans()) else value - below
    high = math.inf if draw(st.booleans()) else value + above
    return Estimate(value, low, high, len(samples) if samples else draw(st.integers(1, 10**6)), draw(units), samples, draw(st.sampled_from(["mean", "median"])))


# --- the type

@given(estimates())
def test_json_round_trip(e):
    text = json.dumps(e.to_dict(), allow_nan=False)
    back = Estimate.from_dict(json.loads(text))
    assert back == e and back.statistic == e.statistic
    assert Estimate.from_dict(e.to_dict(samples=False)).samples is None


@given(estimates())
def test_displays_never_fail(e):
    for text in (str(e), repr(e), f"{e:.1f}", e._repr_html_(), e.brief): assert text and "inf" not in text and "nan" not in text
    assert f"n={e.n}" in str(e) or e.is_exact


@given(estimates(), st.floats(-100, 100).filter(lambda f: abs(f) > 1e-3))
def test_scaling_keeps_order_and_samples(e, factor):
    scaled = e.scaled(factor, "new")
    assert scaled.low <= scaled.value <= scaled.high and scaled.unit == "new" and scaled.n == e.n
    if e.samples: assert np.allclose(scaled.samples, np.array(e.samples) * factor)
    assert math.isinf(scaled.low) == math.isinf(e.low if factor > 0 else e.high)


def test_frozen_and_coerced():
    e = Estimate(np.float32(1), np.int64(0), 2, np.int64(5), samples=np.arange(5))
    assert type(e.value) is float and type(e.low) is float and type(e.n) is int and e.samples == (0., 1., 2., 3., 4.)
    assert hash(e) == hash(Estimate(1., 0., 2., 5, samples=(0, 1, 2, 3, 4)))
    with pytest.raises(AttributeError): e.value = 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "fast"])
def test_no_estimate_without_a_finite_value(value):
    with pytest.raises(UsageError): Estimate(value, 0, 1, 3)


def test_bad_intervals_and_counts():
    with pytest.raises(UsageError, match="low is NaN"): Estimate(1, math.nan, 2, 3)
    with pytest.raises(UsageError, match="n=0"): Estimate(1, 0, 2, 0)
    e = Estimate(1., 1. + 1e-16, 1. - 1e-16, 3)
    assert e.low <= e.value <= e.high


def test_no_comparison_with_numbers():
    for compare in (lambda e: e < 1, lambda e: e >= 1, lambda e: e - 1, lambda e: e / 2):
        with pytest.raises(TypeError): compare(exact(1))


@pytest.mark.parametrize("bad", [{}, {"value": 1}, {"value": None, "low": 0, "high": 1, "n": 3}, None])
def test_from_dict_refuses(bad):
    with pytest.raises(UsageError): Estimate.from_dict(bad)


def test_mapped_is_monotone_and_drops_samples():
    nats = estimate([[2., 1.], [3., 1.], [4., 2.]], "nats", "pooled", resamples=50)
    e = nats.mapped(math.exp, "")
    assert math.isclose(e.value, math.exp(nats.value)) and e.low <= e.value <= e.high and e.samples is None
    assert Estimate(2, 1, 4, 3).mapped(lambda v: 1 / v, "").low == .25


# --- how figures are written

@pytest.mark.parametrize("value, unit, width, text", [(81.2345, "%", 4.3, "81.2 %"), (90_864_128, "B", 0, "90.86 MB"), (24e6, "B", 0, "24 MB"),
    (0, "ms", 0, "0 ms"), (1.5, "×", .02, "1.500×"), (-.04, "", 2, "0.0"), (1234567, "", 0, "1,234,567"),
    (999, "B", 0, "999 B"), (2.5e-7, "s", 0, "2.5e-07 s"), (0, "B", 0, "0 B")])
def test_written(value, unit, width, text): assert written(value, unit, width) == text


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.floats(0, 1e12), units)
def test_written_anything(value, width, unit): assert written(value, unit, width)


# --- intervals

@few
@given(st.lists(numbers, min_size=1, max_size=25), st.sampled_from(["mean", "median"]), st.integers(0, 5))
def test_interval_covers_the_value_and_stays_among_the_samples(x, statistic, seed):
    e = estimate(x, statistic=statistic, resamples=50, seed=seed)
    assert e.low <= e.value <= e.high and e.n == len(x) and e.samples == tuple(map(float, x))
    if len(x) == 1: assert math.isinf(e.low) and math.isinf(e.high)
    elif not set(x) <= {0, 1}: assert min(x) - 1e-6 <= e.low and e.high <= max(x) + 1e-6
    assert estimate(x, statistic=statistic, resamples=50, seed=seed) == e


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_a_share_gets_the_score_interval(x):
    e = estimate(x)
    assert (e.low, e.high) == pytest.approx(wilson(sum(x), len(x))) and 0 <= e.low < e.high <= 1


def test_wilson_is_statsmodels():
    from statsmodels.stats.proportion import proportion_confint
    for k, n in ((0, 5), (5, 5), (1, 1), (37, 90)):
        assert wilson(k, n, .9) == pytest.approx(proportion_confint(k, n, alpha=.1, method="wilson"), abs=1e-12)


@given(st.integers(1, 1300))
def test_median_interval_covers_by_coin_tosses(n):
    from scipy.stats import binom
    low, high = median_interval(range(n))
    assert low + high == n - 1
    if n < 6: assert (low, high) == (0, n - 1)
    else: assert 1 - 2 * binom.cdf(low, n, .5) >= .95 > 1 - 2 * binom.cdf(low + 1, n, .5)


def test_median_interval_at_known_ranks():
    assert median_interval(range(1, 16)) == (4, 12) and median_interval(range(1, 7)) == (1, 6)


def test_constant_samples_have_no_width():
    for statistic in ("mean", "median", lambda x: float(np.mean(x))):
        e = estimate([3.] * 7, statistic=statistic)
        assert (e.low, e.value, e.high) == (3, 3, 3) and "all alike" in str(e)


def test_a_function_of_rows():
    rng = np.random.default_rng(0)
    rows = rng.random((40, 3))
    own = estimate(rows, statistic=lambda x: float(x[:, 0].sum() / x[:, 1].sum()), resamples=100)
    assert own.low < own.value < own.high and len(own.samples[0]) == 3
    assert estimate(rows[:, :2], statistic="pooled").value == pytest.approx(own.value)


def test_samples_of_any_kind():
    import torch
    want = estimate([1., 2., 4.], resamples=50)
    for x in ((1, 2, 4), np.array([1, 2, 4]), torch.tensor([1., 2., 4.]), (o for o in (1, 2, 4))): assert estimate(x, resamples=50) == want


@pytest.mark.parametrize("x, match", [([], "empty"), ([1., math.nan], r"samples\[1\] is nan"), ([math.inf], r"samples\[0\] is inf"),
    ([[1., 2.], [3., math.nan]], r"samples\[1, 1\]"),
    ([[[1.]]], "shape"), (Estimate(1, 0, 2, 3), "not kept")])
def test_bad_samples(x, match):
    with pytest.raises(UsageError, match=match): estimate(x)


def test_bad_arguments():
    with pytest.raises(UsageError, match="medium"): estimate([1, 2], statistic="medium")
    with pytest.raises(UsageError, match="pooled"): estimate([1, 2], statistic="pooled")
    with pytest.raises(UsageError, match="mean"): estimate([[1, 2], [3, 4]], statistic="mean")
    with pytest.raises(UsageError, match="level"): estimate([1, 2], level=95)
    with pytest.raises(UsageError, match="resamples"): estimate([1, 2], resamples=0)
    with pytest.raises(UsageError, match="statistic of these"): estimate([1, 2], statistic=lambda x: math.nan)


# --- two of them

@few
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=20), st.sampled_from(["mean", "median"]))
def test_paired_difference_is_the_estimate_of_differences(pairs, statistic):
    a, b = (estimate(x, "ms", statistic, resamples=50) for x in zip(*pairs))
    d = difference(a, b, resamples=50)
    assert d.samples == tuple(x - y for x, y in zip(a.samples, b.samples)) and d.unit == "ms"
    back = difference(b, a, resamples=50)
    assert math.isclose(d.value, -back.value, abs_tol=1e-6)
    if statistic == "median": assert (d.low, d.high) == (-back.high, -back.low)


@few
@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=20), st.floats(.01, 100))
def test_paired_ratio_does_not_care_how_fast_the_machine_was(pairs, slower):
    a, b = (estimate(x, "ms", "median") for x in zip(*pairs))
    r = a / b
    assert r.unit == "×" and r.low <= r.value <= r.high and len(r.samples) == len(pairs)
    slow = a.scaled(slower, "ms") / b.scaled(slower, "ms")
    assert (slow.value, slow.low, slow.high) == pytest.approx((r.value, r.low, r.high))


def test_identical_answers_differ_by_nothing():
    a = estimate([0, 1, 1, 0, 1])
    assert (d := a - a).value == d.low == d.high == 0


def test_one_sided_differences_of_shares_are_not_taken_for_shares():
    a, b = estimate([1] * 8 + [0] * 2), estimate([0] * 10)
    d = a - b
    assert d.value == .8 and d.high <= 1 and (d.low, d.high) != wilson(8, 10)


def test_pairing_narrows_and_unequal_numbers_are_independent():
    rng = np.random.default_rng(0)
    common = rng.normal(0, 5, 60)
    a, b = (estimate(common + rng.normal(m, .1, 60), resamples=100) for m in (10, 9))
    paired, loose = difference(a, b, resamples=200), difference(a, b, paired=False, resamples=200)
    assert paired.value == pytest.approx(loose.value) and (paired.high - paired.low) * 5 < loose.high - loose.low
    shorter = estimate(b.samples[:50], resamples=100)
    assert difference(a, shorter, resamples=100).samples is None and difference(a, shorter, resamples=100).n == 50


def test_pooled_rows_are_resampled_together():
    rng = np.random.default_rng(0)
    n_bytes = rng.integers(50, 500, 80).astype(float)
    nats = n_bytes * rng.normal(2, .5, 80)
    a, b = (estimate(np.stack([x, n_bytes], 1), "bits/byte", "pooled", resamples=100) for x in (nats, nats + n_bytes * .01))
    assert (b - a).value == pytest.approx(.01) and (b - a).high - (b - a).low < 1e-9
    assert (b / a).value == pytest.approx(b.value / a.value) and a.scaled(2, "x").samples[0][1] == a.samples[0][1]


def test_a_function_is_forgotten_on_disk_and_has_to_be_given_again():
    def spread(x): return float(np.ptp(x))
    a, b = (estimate(x, statistic=spread, resamples=50) for x in ([1, 2, 5, 3], [1, 2, 3, 4]))
    assert difference(a, b, resamples=50).value == 1
    a, b = (Estimate.from_dict(o.to_dict()) for o in (a, b))
    with pytest.raises(UsageError, match="spread"): a - b
    assert difference(a, b, statistic=spread, resamples=50).value == 1


@given(estimates(kept=False), estimates(kept=False))
def test_without_samples_the_intervals_are_combined(a, b):
    a, b = (Estimate(o.value, o.low, o.high, o.n, "ms") for o in (a, b))
    d = a - b
    assert d.value == a.value - b.value and d.low <= d.value <= d.high
    assert math.isinf(d.low) == (math.isinf(a.low) or math.isinf(b.high))


def test_exact_ones():
    assert exact(3, "B") - exact(1, "B") == exact(2, "B") and exact(3, "B") / exact(2, "B") == exact(1.5, "×")
    e = Estimate(10, 8, 13, 5, "ms")
    assert difference(e, exact(1, "ms")) == Estimate(9, 7, 12, 5, "ms")
    r = ratio(e, exact(2, "ms"))
    assert (r.value, r.low, r.high) == pytest.approx((5, 4, 6.5))


def test_what_cannot_be_compared():
    with pytest.raises(UsageError, match="scaled"): exact(1, "ms") - exact(1, "s")
    with pytest.raises(UsageError, match="not defined"): exact(1) / exact(0)
    with pytest.raises(UsageError, match="above 0"): ratio(Estimate(-1, -2, 0, 5), exact(2))
    zero = estimate([0., 1., 2.], resamples=50)
    with pytest.raises(UsageError, match="statistic='mean'"): zero / zero
    assert ratio(zero, zero, statistic="mean", resamples=50).value == 1
    assert (estimate([3.], "tokens") / estimate([2.], "s")).unit == "tokens/s"


# --- effects and tests

@given(st.one_of(st.sampled_from([2, 7, 30]), st.integers(2, 5000)), st.floats(.01, 100))
@settings(deadline=None)
def test_minimum_detectable_effect_against_the_normal_formula(n, sd):
    from scipy.stats import norm
    from statsmodels.stats.power import TTestPower
    z = norm.ppf(.975) + norm.ppf(.8)
    paired, loose = minimum_detectable_effect(sd, n), minimum_detectable_effect(sd, n, paired=False)
    assert paired >= z * sd / n**.5 * .999 and loose >= z * sd * (2 / n)**.5 * .999
    if n in (7, 30): assert paired == pytest.approx(sd * TTestPower().solve_power(nobs=n, alpha=.05, power=.8), rel=1e-4)
    if n > 100: assert paired == pytest.approx(z * sd / n**.5, rel=.03) and loose == pytest.approx(z * sd * (2 / n)**.5, rel=.03)


def test_minimum_detectable_effect_takes_samples():
    x = [1., 2., 4., 7.]
    assert minimum_detectable_effect(estimate(x, resamples=50), 10) == minimum_detectable_effect(np.std(x, ddof=1), 10) == minimum_detectable_effect(x, 10)
    for bad in (dict(n=1), dict(n=5, power=1), dict(n=5, power=.05), dict(n=5, level=0)):
        with pytest.raises(UsageError): minimum_detectable_effect(1., **bad)
    with pytest.raises(UsageError, match="no spread"): minimum_detectable_effect([1.], 5)


def test_mcnemar():
    a, b = [1] * 15 + [0] * 5 + [1] * 30, [0] * 15 + [1] * 5 + [1] * 30
    t = mcnemar(a, b)
    assert t.p_value == pytest.approx(.04139, abs=1e-4) and t.n == 50 and "15" in t.note and mcnemar(b, a).p_value == t.p_value
    assert mcnemar(a, a).p_value == 1 and "p = 1" in str(mcnemar(a, a))
    assert mcnemar(estimate(a).scaled(100, "%"), estimate(b).scaled(100, "%")).p_value == t.p_value
    with pytest.raises(UsageError, match="same questions"): mcnemar([1, 0], [1])


def test_two_proportions():
    t = two_proportions(810, 1000, 780, 1000)
    assert t.p_value == pytest.approx(.0966, abs=1e-3) and t.n == 2000 and isinstance(t, Test)
    assert two_proportions(5, 5, 7, 7).p_value == 1 and "too few" in two_proportions(1, 5, 2, 5).note
    for bad in ((3, 2, 1, 2), (-1, 2, 1, 2), (0, 0, 1, 2)):
        with pytest.raises(UsageError, match="not a share"): two_proportions(*bad)


def test_sample_sizes():
    assert sample_size(.8, .82) == sample_size(.82, .8) > sample_size(.8, .85)
    assert sample_size_mcnemar(.1, .03) == 870 and sample_size_mcnemar(.1, -.03) == 870   # Connor 1987, eq. 2.1
    for bad in ((.5, .5), (0, .5), (.5, 1)):
        with pytest.raises(UsageError): sample_size(*bad)
    for bad in ((.1, .2), (.1, 0), (1.5, .1)):
        with pytest.raises(UsageError): sample_size_mcnemar(*bad)


# --- tables and pictures

def test_table():
    t = Table(("name", "value"), (("a<b", 1.5), ("long name", None)), "cap & tion", muted=(1,))
    assert str(t).splitlines() == ["cap & tion", "name       value", "─────────  ─────", "a<b          1.5", "long name      –"]
    page = t._repr_html_()
    assert "a&lt;b" in page and "cap &amp; tion" in page and page.count("opacity") == 2 and "text-align:right" in page
    assert str(Table(("a",), ())) == "a\n─" and Table(("a",), ())._repr_html_()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=15))
def test_dominated(points):
    from llmlab.kit.pictures import dominated
    beaten = dominated(points)
    front = [p for p, b in zip(points, beaten) if not b]
    assert front
    for p, b in zip(points, beaten):
        better = [q for q in front if q[0] <= p[0] and q[1] >= p[1] and q != p]
        assert bool(better) == b


@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def test_pictures_label_their_axes_and_do_not_overlap(plt):
    from llmlab.kit import pictures
    points = {f"variant {i}": (10 + i % 3 * .2, Estimate(80 + i * .4, 70, 90, 5, "%")) for i in range(8)}
    ax = pictures.trade_off(points, "time, ms", "accuracy")
    ax.get_figure().draw_without_rendering()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert len(boxes) == 8 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "ms" in ax.get_xlabel() and "%" in ax.get_ylabel()
    ax = pictures.foretold([("a", 1., Estimate(2, -math.inf, math.inf, 1, "ms"), None), ("b", 100., exact(90, "ms"), .5)])
    assert ax.get_xscale() == ax.get_yscale() == "log" and "ms" in ax.get_xlabel()
    fig, own = plt.subplots()
    assert pictures.forest({"a": exact(1, "s")}, 0, own) is own and own.get_xlabel() == "s"


def test_nothing_heavy_is_imported():
    import subprocess, sys
    code = "import sys, llmlab.kit.pictures, llmlab.kit.claims; print([m for m in ('numpy', 'scipy', 'pandas', 'matplotlib', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert stats.__doc__


def test_what_is_shown_as_its_table():
    from dataclasses import dataclass
    class One:
        def _table(self): return Table(("a",), ((1,),))
    @dataclass(frozen=True)
    class Record(One, Shown):
        x: int = 1
    class Many(Shown, dict):
        _table = One._table
    class Own(Shown, list):
        def __repr__(self): return "own"
    table = One()._table()
    for o in (Record(), Many(a=1)): assert repr(o) == str(o) == repr(table) and o._repr_html_() == table._repr_html_()
    assert repr(Own()) == "own" and Record() == Record(1)
