"""Hyperparameters and the comparison of ways to tune: what a reader need not see."""
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings as quick, strategies as st

from llmlab.finetuning import hyperparameters as hyper
from llmlab.finetuning import which_one
from llmlab.kit import models, training
from llmlab.kit.settings import UsageError
from llmlab.kit.stats import estimate

RUNGS = [4, 8, 16, 32]
SPACE = dict(lr=[1e-4, 1e-3, 1e-2, 1e-1], batch_size=[8, 16, 32])


def curve(setting, report, rungs=RUNGS):
    "A trial whose value is known: best at the third rate, better with steps, ties included."
    for r in rungs:
        if report(r, round(-abs(SPACE["lr"].index(setting["lr"]) - 2) + math.log(r) / 9 - setting["batch_size"] / 99, 1)): return


@pytest.fixture
def task():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    return torch.randn(96, 12, generator=g) + 2 * torch.nn.functional.one_hot(y, 12), y


# trials

def test_a_training_is_its_seed_and_no_other_draw(task):
    before = torch.get_rng_state()
    one, two, other = (hyper.train_head(*task, 1e-2, 8, 24, seed=k)[0].state_dict() for k in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one) and not torch.equal(one["layers.0.weight"], other["layers.0.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_every_rung_is_answered_and_the_last_is_the_head_itself(task):
    for size in (8, 16, 64):
        head, answers = hyper.train_head(*task, 1e-2, size, 16, judge=task, rungs=[1, 4, 16])
        assert list(answers) == [1, 4, 16] and torch.equal(answers[16], hyper.right(head, *task))
    assert hyper.right(hyper.train_head(*task, 1e-2, 8, 96)[0], *task).float().mean() > .8


def test_looking_at_rungs_does_not_change_the_training(task):
    watched, alone = (hyper.train_head(*task, 1e-2, 8, 16, judge=task, rungs=r)[0].state_dict() for r in ([2, 4, 8, 16], []))
    assert all(torch.equal(watched[k], alone[k]) for k in alone)


@pytest.mark.parametrize("size, steps, match", [(64, 4, "at most 32"), (128, 64, "96 texts")])
def test_a_batch_that_does_not_fit_is_refused(task, size, steps, match):
    with pytest.raises(UsageError, match=match): hyper.train_head(*task, 1e-2, size, steps)


@pytest.mark.parametrize("shortest, longest, factor", [(3, 16, 2), (0, 8, 2), (8, 4, 2), (2, 16, 1)])
def test_rungs_that_miss_the_end_are_refused(shortest, longest, factor):
    with pytest.raises(UsageError, match="do not end at"): hyper.rungs_of(shortest, longest, factor)
    assert hyper.rungs_of(2, 54, 3) == [2, 6, 18, 54]


# searches

@quick(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 12))
def test_halving_by_hand_is_that_of_the_library(seed, factor, trials):
    rungs = [factor**k for k in range(4)]
    noise = random.Random(seed)
    values = {}
    def evaluate(setting, report):
        for r in rungs:
            if report(r, values.setdefault((str(setting), r), round(noise.random(), 1))): return
    found = hyper.search(evaluate, SPACE, trials * rungs[-1], rungs, "random", "halving", seed=seed, factor=factor)
    by_hand = hyper.search_by_hand(evaluate, [t["setting"] for t in found.trials], trials * rungs[-1], rungs[-1], factor)
    assert by_hand == list(found.trials)


@pytest.mark.parametrize("sampler, pruner", [*itertools.product(hyper.SAMPLERS, hyper.PRUNERS)])
def test_a_search_keeps_its_budget_is_repeatable_and_finds_the_best_of_what_it_tried(sampler, pruner):
    one, two = (hyper.search(curve, SPACE, 8 * 32, RUNGS, sampler, pruner, seed=3) for _ in range(2))
    assert one == two and one.spent <= one.budget
    assert one.best["value"] == max(t["value"] for t in one.trials if t["whole"])
    assert all(t["steps"] in RUNGS and t["whole"] == (t["steps"] == 32) for t in one.trials)
    if pruner == "none": assert all(t["whole"] for t in one.trials) and len(one.trials) == 8


def test_a_search_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    import optuna
    monkeypatch.chdir(tmp_path)
    level = optuna.logging.get_verbosity()
    hyper.search(curve, SPACE, 4 * 32, RUNGS)
    assert not list(tmp_path.iterdir()) and optuna.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


def test_first_settings_come_first_and_ranges_are_logarithmic():
    space = dict(lr=(1e-5, 1e-1), batch_size=[8, 32])
    seen = lambda setting, report: report(1, math.log(setting["lr"]))
    first = dict(lr=3e-4, batch_size=32)
    found = hyper.search(seen, space, 200, [1], "random", "none", first=[first])
    assert found.trials[0]["setting"] == pytest.approx(first)
    below = sum(t["setting"]["lr"] < 1e-3 for t in found.trials) / len(found.trials)
    assert .4 < below < .6


@pytest.mark.parametrize("given, match", [
    (dict(space={}), "empty"), (dict(space=dict(lr=[])), "no values"), (dict(space=dict(lr=(0, 1))), "logarithmic"),
    (dict(space=dict(lr=(1e-2, 1e-3))), "low < high"), (dict(budget=31), "not one whole trial"), (dict(sampler="bayes"), "tpe"),
    (dict(pruner="hyperband"), "halving")])
def test_what_cannot_be_searched_is_refused(given, match):
    with pytest.raises(UsageError, match=match): hyper.search(curve, **(dict(space=SPACE, budget=64, rungs=RUNGS) | given))


@pytest.mark.parametrize("n", [1, 2, 5, 8, 12, 40])
def test_a_grid_is_even_and_no_larger_than_asked(n):
    points = hyper.grid_of(SPACE, n)
    assert len(points) <= n and len({str(p) for p in points}) == len(points) and all(p["lr"] in SPACE["lr"] for p in points)
    if n >= 12: assert len(points) == 12
    assert len(hyper.grid_of(dict(lr=(1e-4, 1e-2)), 2)) == 2 and hyper.grid_of(dict(lr=(1e-4, 1e-2)), 1)[0]["lr"] == pytest.approx(1e-3)


def test_trials_foretold():
    assert hyper.expected_trials(8 * 512, [512]) == 8
    assert hyper.expected_trials(800, [1, 2, 4, 8], 2) == pytest.approx(792 / 2.5 + 1)


def test_a_stopped_training_is_the_beginning_of_a_whole_one():
    from datasets import ClassLabel, Dataset
    texts = [f"{'abc'[i % 3]} {i} word" for i in range(24)]
    rows = Dataset.from_dict(dict(text=texts, label=[i % 3 for i in range(24)])).cast_column("label", ClassLabel(names=list("abc")))
    m = models.load("random:bert-tiny", task="classifier", n_labels=3)
    x = training.tokenized(rows, m.tokenizer)
    evaluate, curves = hyper.trained_at_rungs(m, x, x.select(range(8)), [2, 4, 8], seed=1), []
    before = [p.clone() for p in m.model.parameters()]
    for until in (4, 8):
        curves.append([])
        def report(step, value, until=until): curves[-1].append((step, value)); return step >= until
        evaluate(dict(lr=1e-3, batch_size=8), report)
    assert [s for s, _ in curves[0]] == [2, 4] and [s for s, _ in curves[1]] == [2, 4, 8] and curves[1][:2] == curves[0]
    assert all(torch.equal(a, b) for a, b in zip(before, m.model.parameters()))


# noise

def test_the_expected_maximum_is_that_of_draws():
    assert hyper.expected_maximum(1) == pytest.approx(0, abs=1e-9) and hyper.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-6)
    draws = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)).max(1).values.mean().item()
    assert hyper.expected_maximum(16) == pytest.approx(draws, abs=.02)
    with pytest.raises(UsageError, match="at least 1"): hyper.expected_maximum(0)


@quick(max_examples=40, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=7), st.data())
def test_the_best_of_k_is_the_mean_over_all_ways_to_draw(values, picked):
    k = picked.draw(st.integers(1, len(values)))
    ways = [max(o) for o in itertools.combinations(values, k)]
    assert hyper.best_of(values, k) == pytest.approx(sum(ways) / len(ways))


def test_selection_flatters_equal_runs_and_not_a_single_one():
    runs = torch.rand(60, 300, generator=torch.Generator().manual_seed(1)) < .6
    told, fresh = hyper.selected(runs, 50, 200)
    assert told - fresh > 3 and abs(fresh - 60) < 1.5
    one = hyper.selected(runs, 1, 400)
    assert abs(one[0] - one[1]) < 1
    for k in (0, 61):
        with pytest.raises(UsageError, match="60 runs"): hyper.selected(runs, k)


def test_equal_runs_are_called_different_as_often_as_the_level_says_or_less():
    runs = torch.rand(20, 200, generator=torch.Generator().manual_seed(2)) < .6
    share, worst = hyper.called_different(runs)
    assert share < .1 and worst["points"] > 0
    assert hyper.called_different(torch.stack([runs[0], runs[0]]))[0] == 0
    with pytest.raises(UsageError, match="two seeds"): hyper.called_different(runs[:1])


# which one

def test_a_frozen_body_trains_its_head_alone():
    m = models.load("random:bert-tiny", task="classifier", n_labels=3)
    only = which_one.frozen(m)
    names = {n.split(".")[0] for n, p in only.model.named_parameters() if p.requires_grad}
    assert "classifier" in names and not any(p.requires_grad for n, p in only.model.named_parameters() if ".encoder." in n or "embeddings" in n)
    assert all(p.requires_grad for p in m.model.parameters())
    with pytest.raises(UsageError, match="task='classifier'"): which_one.frozen(models.load("random:llama-tiny", task="encoder"))


def test_a_constraint_decides():
    from llmlab.kit.ledger import Ledger, Row, Workload
    def row(name, accuracy, size):
        q = estimate([100.] * accuracy + [0.] * (100 - accuracy), "%")
        about = dict(id=name, written=1., notebook="finetuning/which_one", chapter="finetuning", variant=name)
        return Row(workload=Workload(), quality=dict(accuracy=q), size_bytes=size, **about)
    found = Ledger((row("small", 50, 10), row("large", 90, 1000)))
    table = which_one.decide(found, {"quality": {}, "bytes": dict(size_bytes=100), "nothing": dict(size_bytes=1)})
    assert [r[1] for r in table.rows] == ["large", "small", "nothing keeps the bound"]


def test_a_saved_head_answers_as_it_did(tmp_path, task):
    from safetensors.torch import save_file
    head = hyper.train_head(*task, 1e-2, 8, 16)[0]
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, Path(tmp_path)/"head.safetensors")
    with torch.inference_mode(): assert torch.equal(which_one.head_answers(tmp_path, task[0]), head(task[0]))
