"""What a reader need not see of recovery: the loss, the teacher's memory, stages, equal work, the plan."""
import pytest, torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings as hypothesis_settings, strategies as st
from llmlab.kit import models, store, training
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

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from([.5, 1., 2., 4.]))
def test_distillation_is_the_divergence_at_a_temperature(seed, t):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    p, q = (y / t).softmax(-1), (x / t).softmax(-1)
    torch.testing.assert_close(recovery.distillation(x, y, t), t**2 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    assert recovery.distillation(y, y, t) < 1e-6

def test_positions_that_do_not_count_do_not():
    x, y = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    alone = torch.cat([x[0, :2], x[1, :3]]), torch.cat([y[0, :2], y[1, :3]])
    torch.testing.assert_close(recovery.distillation(x, y, 2., mask), recovery.distillation(*alone, 2.))

def test_what_does_not_fit_is_refused(student, teacher):
    refused("answer alike", recovery.distillation, torch.ones(2, 3), torch.ones(2, 4))
    refused("temperature", recovery.distillation, torch.ones(2, 3), torch.ones(2, 3), 0)
    with pytest.raises(UsageError, match="hard"), recovery.taught(student, recovery.answering(teacher), hard=2): pass
    refused("stage", recovery.cut, student, dict(heads=3), [])
    refused("ascend", recovery.between, 2., (3, 1.), (1, 2.))

def test_the_class_comes_back_even_after_an_error(student, teacher):
    own = type(student.model)
    with pytest.raises(KeyError), recovery.taught(student, recovery.answering(teacher)):
        assert isinstance(student.model, own) and type(student.model) is not own
        raise KeyError
    assert type(student.model) is own

def test_the_loss_is_mixed_in_training_only(student, teacher):
    ids = torch.randint(5, 100, (4, 6))
    x = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 2, 0]))
    with torch.no_grad():
        for m in student.model.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        plain, theirs = student.model(**x), teacher.model(input_ids=ids, attention_mask=x["attention_mask"]).logits
        with recovery.taught(student, recovery.answering(teacher), temperature=2., hard=.25):
            mixed = student.model.train()(**x).loss
            assert torch.equal(student.model.eval()(**x).loss, plain.loss)
    wanted = .25 * F.cross_entropy(plain.logits, x["labels"]) + .75 * recovery.distillation(plain.logits, theirs, 2.)
    torch.testing.assert_close(mixed, wanted, rtol=1e-4, atol=1e-6)

def test_a_teacher_is_asked_once_a_text(teacher):
    asked = []
    hook = teacher.model.register_forward_pre_hook(lambda m, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True)
    try:
        ask = recovery.answering(teacher)
        ids, mask = torch.randint(5, 100, (3, 6)), torch.ones(3, 6, dtype=torch.long)
        with torch.no_grad():
            first, again = ask(ids, mask), ask(ids.flip(0), mask)
            wider = ask(F.pad(ids, (0, 2)), F.pad(mask, (0, 2)))
    finally: hook.remove()
    assert asked == [3] and torch.equal(first.flip(0), again) and torch.equal(first, wider)

def test_training_changes_the_copy_alone(student, teacher, rows):
    x = training.tokenized(rows, student.tokenizer)
    was = {k: v.clone() for k, v in student.model.state_dict().items()}
    theirs = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    m = recovery.cut(student, {}, None)
    m, curve = recovery.retrained(m, x, x.select(range(6)), recovery.answering(teacher), steps=3, batch_size=4)
    assert all(torch.equal(v, was[k]) for k, v in student.model.state_dict().items())
    assert all(torch.equal(v, theirs[k]) for k, v in teacher.model.state_dict().items())
    assert any(not torch.equal(v, was[k]) for k, v in m.model.state_dict().items())
    assert "forward" not in vars(m.model) and type(m.model) is type(student.model)
    assert [p["step"] for p in curve] == [1, 2, 3] and all(p["cpu_s"] > 0 for p in curve)

def test_a_language_model_learns_from_its_teacher():
    whole = models.load("random:llama-tiny", task="causal-lm")
    m = models.cut_layers(whole, 1)
    x = torch.randint(5, 250, (8, 16), dtype=torch.int32)
    m, curve = recovery.retrained(m, x, x[:2], recovery.answering(whole), steps=2, batch_size=2, lr=1e-3)
    assert len(curve) == 2 and m.model.config.num_hidden_layers == 1
    assert m.model.get_output_embeddings().weight is m.model.get_input_embeddings().weight

def test_a_stage_cuts_what_it_says(student, rows):
    batches = recovery.labelled_batches(student, rows, 8, 4)
    assert [tuple(b["labels"].shape) for b in batches] == [(4,), (4,)]
    m = recovery.cut(student, dict(layers=1, mlp=64), batches)
    assert (m.model.config.num_hidden_layers, m.model.config.intermediate_size) == (1, 64)
    refused("empty", recovery.labelled_batches, student, rows.select([]))

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
