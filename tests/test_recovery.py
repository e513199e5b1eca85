"""What a reader need not see of recovery: stages, equal work, the plan."""
import pytest, torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings as hypothesis_settings, strategies as st
from llmlab.kit import compression, models, store, teaching, training
from llmlab.kit.settings import UsageError, settings
from llmlab.pruning import recovery

def refused(text, call, *args, **more):
    with pytest.raises(UsageError, match=text): call(*args, **more)

@pytest.fixture(scope="module")
def teacher(): return models.load("random:bert-tiny", task="classifier", n_labels=3)

@pytest.fixture
def student(): return models.load("random:bert-tiny", task="classifier", n_labels=3, seed=1)

@pytest.fixture(scope="module")
def rows():
    words = ("alpha beta", "gamma delta epsilon", "zeta")
    return Dataset.from_dict(dict(text=[words[i % 3] + f" {i}" for i in range(24)], label=[i % 3 for i in range(24)]),
        features=Features(dict(text=Value("string"), label=ClassLabel(names=["a", "b", "c"]))))

def test_what_does_not_fit_is_refused(student):
    refused("stage", recovery.cut, student, dict(heads=3), [])
    refused("ascend", recovery.between, 2., (3, 1.), (1, 2.))

def test_training_changes_the_copy_alone(student, teacher, rows):
    x = training.tokenized(rows, student.tokenizer)
    was = {k: v.clone() for k, v in student.model.state_dict().items()}
    theirs = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    m = recovery.cut(student, {}, None)
    m, curve = teaching.retrained(m, x, x.select(range(6)), teaching.answering(teacher), steps=3, batch_size=4)
    assert all(torch.equal(v, was[k]) for k, v in student.model.state_dict().items())
    assert all(torch.equal(v, theirs[k]) for k, v in teacher.model.state_dict().items())
    assert any(not torch.equal(v, was[k]) for k, v in m.model.state_dict().items())
    assert "forward" not in vars(m.model) and type(m.model) is type(student.model)
    assert [p["step"] for p in curve] == [1, 2, 3] and all(p["cpu_s"] > 0 for p in curve)

def test_a_stage_cuts_what_it_says(student, rows):
    batches = compression.labelled_batches(student, rows, 8, 4)
    assert [tuple(b["labels"].shape) for b in batches] == [(4,), (4,)]
    m = recovery.cut(student, dict(layers=1, mlp=64), batches)
    assert (m.model.config.num_hidden_layers, m.model.config.intermediate_size) == (1, 64)
    refused("empty", compression.labelled_batches, student, rows.select([]))

@hypothesis_settings(max_examples=15, deadline=None)
@given(st.integers(3, 6), st.floats(1.1, 4))
def test_equal_work_is_the_widest_that_fits(layers, speed_up):
    from llmlab.kit.geometry import geometry_of
    from llmlab.pruning.structured import resized
    config = models.config("embedded:minilm")
    flops = lambda **counts: geometry_of(resized(config, **counts), "encoder").flops(32, 32)
    stage, wanted = recovery.equal_work(config, layers, speed_up), flops() / speed_up
    if stage is None: assert flops(layers=layers, mlp=32) > wanted
    else:
        assert flops(**stage) <= wanted
        assert stage["mlp"] == 1536 or flops(layers=layers, mlp=stage["mlp"] + 32) > wanted

def test_candidates_are_cuts_of_equal_work_or_an_error():
    found = recovery.candidates(models.config("embedded:minilm"), 2.4)
    assert len(found) >= 3 and found[-1]["layers"] == [1, 3, 5]
    refused("fewer operations", recovery.candidates, models.config("embedded:minilm"), 50.)

@pytest.mark.parametrize("profile", ["smoke", "tiny", "thorough"])
def test_the_plan_can_be_asked_of_the_store(profile):
    s = settings(profile)
    keys = [store.key(r, **arguments) for r, arguments in recovery.recipes(s)]
    assert len(set(keys)) == len(keys) and {"searched", "lm"} <= set(recovery.plan(s))

def test_between_two_sizes():
    assert recovery.between(10., (1., 3.), (100., 1.)) == pytest.approx(2.)
