"""The choice between open and closed models: the flow answers to its table, money adds up, plans need what was foreseen."""

import itertools
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmlab.kit import models, stats
from llmlab.kit.settings import UsageError
from llmlab.selection import open_or_closed as o

answers = st.fixed_dictionaries({}, optional={q: st.sampled_from(list(known)) for q, (_, known) in o.QUESTIONS.items()})
tables = st.fixed_dictionaries({name: st.fixed_dictionaries({c: st.integers(0, len(scale) - 1) for c, scale in o.CRITERIA.items()}) for name in "abcd"})
entries = lambda levels: {t: {c: o.Entry(c, n, "", "judgement") for c, n in row.items()} for t, row in levels.items()}


def test_the_table_is_complete():
    for name, offers in o.TYPES.items():
        assert list(offers) == list(o.CRITERIA), name
        assert all(e.why and e.source for e in offers.values())
    assert {c for _, known in o.QUESTIONS.values() for need in known.values() for c in need} == set(o.CRITERIA)  # every criterion is asked about
    assert len(list(o.every_answer())) == math.prod(len(known) for _, known in o.QUESTIONS.values())


def test_an_answer_that_asks_for_nothing_comes_first_and_no_two_ask_the_same():
    for q, (_, known) in o.QUESTIONS.items():
        needs = list(known.values())
        assert needs[0] == {} and all(a != b for a, b in itertools.combinations(needs, 2)), q


def test_every_level_that_a_question_asks_for_is_offered_by_some_type():
    for _, known in o.QUESTIONS.values():
        for need in known.values(): assert any(all(offers[c].level >= n for c, n in need.items()) for offers in o.TYPES.values()), need


def kept(given, choice): return [n for n in o.needs_of(given) if n[:2] not in {g[:2] for g in choice.gives_way}]


def test_no_answer_contradicts_the_table():
    "All of them: what is not met is said, no need gives way to a lighter one, and none gives way where all can be met."
    for said in o.every_answer():
        c = o.choose(said)
        assert {n[:2] for n in o.unmet(o.TYPES[c.name], said)} == {g[:2] for g in c.gives_way}, said
        for t in c.others: assert not [n for n in kept(said, c) if o.TYPES[t][n[1]].level < n[2]], (said, t)
        if any(not o.unmet(offers, said) for offers in o.TYPES.values()): assert not c.gives_way, said


@examples(max_examples=150, deadline=None)
@given(answers, tables, st.lists(st.sampled_from(list(o.QUESTIONS)), unique=True, max_size=4))
def test_over_any_table_the_choice_is_the_best_in_order_of_weight(given, levels, first):
    "By brute force: for each type what it meets, level by level in order of weight; the choice must have the largest such list."
    types = entries(levels)
    order = list(dict.fromkeys([*first, *o.QUESTIONS]))
    needs = sorted(o.needs_of(given), key=lambda n: order.index(n[0]))
    met = lambda t: [min(types[t][c].level, level) for _, c, level in needs]
    c = o.choose(given, types, tuple(first))
    assert met(c.name) == max(map(met, types))
    assert {(q, k, want, have) for q, k, want, have in c.gives_way} == {(q, k, level, types[c.name][k].level) for q, k, level in o.unmet(types[c.name], given)}
    assert [s.question for s in c.steps] == order


@examples(max_examples=60, deadline=None)
@given(answers)
def test_the_path_narrows_and_ends_at_the_recommendation(given):
    c, before = o.choose(given), set(o.TYPES)
    for step in c.steps:
        assert set(step.left) | set(step.struck) == before and not set(step.left) & set(step.struck)
        before = set(step.left)
    assert c.name in before and "question" in repr(c) and "<table" in c._repr_html_()


def test_asking_for_nothing_gives_the_easiest():
    assert o.choose({}).name == "closed API" and not o.choose({}).gives_way


def test_the_common_flow_contradicts_its_own_table_as_the_syllabus_says():
    given = next(o.every_answer()) | dict(customising="tuned to our data", skills="nobody")
    assert o.common_flow(given) == "closed" and ("customising", "customising", 1) in o.unmet(o.COMMON["closed"], given)
    assert o.choose(given).name in ("open, hosted", "closed API, tuned", "closed, own cloud") and not o.choose(given).gives_way


@pytest.mark.parametrize("call", [
    lambda: o.choose({"skill": "nobody"}), lambda: o.choose({"skills": "none"}), lambda: o.choose({}, first=("cost",)), lambda: o.reasons("open"),
    lambda: o.Entry("price", 0, "", ""), lambda: o.Entry("support", 2, "", ""), lambda: o.Entry("support", -1, "", "")])
def test_what_the_flow_does_not_know_is_refused(call):
    with pytest.raises(UsageError): call()


def test_the_path_is_drawn_with_what_gives_way():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    c = o.choose({"data": "our machines only", "quality": "the hardest"})
    written = [t.get_text() for t in o.plot_path(c).texts]
    assert {t for t in o.TYPES} <= set(written) and any("gives way" in t and "quality" in t for t in written)
    assert all(a in written for _, known in o.QUESTIONS.values() for a in known)
    plt.close("all")


# Money

cents = lambda low, high: st.integers(low * 100, high * 100).map(lambda n: n / 100)
costs = st.builds(o.Own, price=cents(0, 100_000), months=cents(1, 120), upkeep=cents(0, 10_000), idle_watts=cents(0, 200),
    busy_watts=cents(200, 2000), kwh=cents(0, 1))


@examples(max_examples=100, deadline=None)
@given(costs, st.floats(1, 1e5), st.floats(.01, 100))
def test_at_break_even_both_cost_the_same(own, rate, price):
    turn = o.break_even(own, rate, price)
    if turn is None: assert own.varying >= rate * o.SECONDS * price / 1e6  # energy alone costs more
    elif 0 < turn.value <= 1: assert o.own_price(own, rate, turn.value).value == pytest.approx(price, rel=1e-6)
    elif turn.value > 1: assert o.own_price(own, rate, 1).value > price * (1 - 1e-9)


@examples(max_examples=60, deadline=None)
@given(costs, st.floats(1, 1e4), st.floats(.01, .98))
def test_more_use_and_more_speed_make_a_token_cheaper(own, rate, u):
    price = o.own_price(own, rate, u).value
    assert o.own_price(own, rate, u + .01).value <= price * (1 + 1e-12) and o.own_price(own, 2 * rate, u).value == pytest.approx(price / 2)
    if price > 0: assert o.needed_per_s(own, price, u) == pytest.approx(rate)


def test_the_interval_of_the_throughput_is_carried_through():
    own = o.Own(price=3600, months=36)
    rate = stats.Estimate(100., 80., 125., 9, "tokens/s")
    turn, price = o.break_even(own, rate, 1.), o.own_price(own, rate, 1.)
    assert turn.low == pytest.approx(turn.value * .8) and turn.high == pytest.approx(turn.value * 1.25)
    assert price.low == pytest.approx(price.value * .8) and price.high == pytest.approx(price.value * 1.25)
    assert math.isinf(o.break_even(o.Own(3600, busy_watts=500, kwh=.3), stats.Estimate(100., 1., 200., 9, "tokens/s"), 1.).high)  # at its slowest never


def test_a_price_list_as_one_figure():
    assert o.api_price(1., 3., 100, 50) == 5. and o.api_price(1., 3., 0, 1) == 3.
    with pytest.raises(UsageError): o.api_price(1., 3., 100, 0)


@pytest.mark.parametrize("call", [lambda: o.Own(-1), lambda: o.Own(1, months=0), lambda: o.Own(1, idle_watts=9, busy_watts=3),
    lambda: o.own_price(o.Own(1), 1., 0), lambda: o.own_price(o.Own(1), 1., 30), lambda: o.needed_per_s(o.Own(1), 0., .5)])
def test_money_that_makes_no_sense_is_refused(call):
    with pytest.raises(UsageError): call()


def test_a_step_leaves_the_cache_as_it_was_and_a_batch_is_read_prompt_by_prompt():
    calls = o.requests(models.load("random:llama-tiny", task="causal-lm"), 2, 6, 4)
    for _ in range(3): calls["step"]()
    cache = next(c.cell_contents for c in calls["step"].__wrapped__.__closure__ if hasattr(c.cell_contents, "get_seq_length"))
    assert cache.get_seq_length() == 8 and calls["prompt"]() is None
    assert o._per_s(1., .5, batch=4, new_tokens=8) == 32 / (4 + 4)


# Memory

@pytest.mark.parametrize("purpose,more", [("answer", {}), ("train in full", {}), ("train LoRA", {}), ("generate", dict(new_tokens=4))])
def test_a_plan_needs_what_was_foreseen(purpose, more):
    plan = o.Plan("random:qwen-tiny", purpose, 2, 24, **more)
    assert o.carried_out(plan) == o._alone("cpu", **asdict(plan)) == pytest.approx(o.needed(plan).total_bytes, rel=.1)


@pytest.mark.parametrize("purpose", ["answer", "train in full", "train LoRA"])
def test_a_rehearsal_counts_what_the_real_thing_counts(purpose):
    plan = o.Plan("random:llama-tiny", purpose, 2, 24)
    assert o.carried_out(plan, "meta") == pytest.approx(o.carried_out(plan), rel=.05)


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="purpose"): o.Plan("random:bert-tiny", "train", 1, 8)
    with pytest.raises(UsageError, match="meta"): o.carried_out(o.Plan("random:llama-tiny", "generate", 1, 8, 2), "meta")
    with pytest.raises(UsageError, match="causal"): o.needed(o.Plan("random:bert-tiny", "generate", 1, 8, 2))


@pytest.mark.parametrize("training", [None, "lora", "full"])
def test_the_largest_batch_fits_and_the_next_does_not(training):
    g, free = models.geometry("random:llama-tiny"), 3e8
    b = o.largest_batch("random:llama-tiny", 64, free, training)
    need = lambda n: models.memory_needed(g, n, 64, training=training).total_bytes
    assert b >= 1 and need(b) <= .9 * free < need(b + 1)
    assert o.largest_batch("random:llama-tiny", 64, 1e6, training) == 0 and o.largest_batch("random:llama-tiny", 64, 1e15, training, most=100) == 100


# The exercises: what learners often write is told apart from what is right

@pytest.mark.parametrize("check,wrong,says", [
    ("break_even", lambda fixed, energy, r, p: fixed / (r * o.SECONDS * p / 1e6), "machine"),                       # energy forgotten
    ("break_even", lambda fixed, energy, r, p: fixed / max(r * o.SECONDS * p / 1e6 - energy, 1e-9), "None"),        # never said to be never
    ("arm_size", lambda a, b: 2 * stats.sample_size(a, b), "both arms"),
    ("arm_size", lambda a, b: stats.sample_size(a, b) // 2, "both arms vary"),
    ("tokens_per_character", lambda tok, texts: sum(len(tok(t)) for t in texts) / sum(map(len, texts)), "around"),
    ("tokens_per_character", lambda tok, texts: sum(len(tok(t)) - len(tok("")) for t in texts) / sum(len(t.encode()) for t in texts), "bytes"),
    ("robustness", lambda predict, x, y, noise, seeds: (0., sum(p == a for p, a in zip(predict(x), y)) / len(x)), "cost"),
    ("robustness", lambda predict, x, y, noise, seeds: .5, "pair"),
    ("training_bytes", lambda n, kept, adapter=0: 16 * n + kept, "right is"),                                       # everything at once
    ("training_bytes", lambda n, kept, adapter=0: 12 * n + max(kept, 4 * n), "lora"),                               # frozen weights with a state
])
def test_a_common_mistake_is_found_and_named(check, wrong, says):
    from llmlab.selection import exercises
    with pytest.raises(AssertionError, match=says): getattr(exercises, f"check_{check}")(wrong)
