"""A model taught by another: the loss, whose it is and when, the teacher's memory."""
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from llmlab.kit import models, teaching
from llmlab.kit.settings import UsageError

@pytest.fixture(scope="module")
def teacher(): return models.load("random:bert-tiny", task="classifier", n_labels=3)

@pytest.fixture
def student(): return models.load("random:bert-tiny", task="classifier", n_labels=3, seed=1)

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from([.5, 1., 2., 4.]))
def test_distillation_is_the_divergence_at_a_temperature(seed, t):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    p, q = (y / t).softmax(-1), (x / t).softmax(-1)
    torch.testing.assert_close(teaching.distillation(x, y, t), t**2 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    assert teaching.distillation(y, y, t) < 1e-6

def test_positions_that_do_not_count_do_not():
    x, y = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    alone = torch.cat([x[0, :2], x[1, :3]]), torch.cat([y[0, :2], y[1, :3]])
    torch.testing.assert_close(teaching.distillation(x, y, 2., mask), teaching.distillation(*alone, 2.))

def test_the_class_comes_back_even_after_an_error(student, teacher):
    own = type(student.model)
    with pytest.raises(KeyError), teaching.taught(student, teaching.answering(teacher)):
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
        with teaching.taught(student, teaching.answering(teacher), temperature=2., hard=.25):
            mixed = student.model.train()(**x).loss
            assert torch.equal(student.model.eval()(**x).loss, plain.loss)
    wanted = .25 * F.cross_entropy(plain.logits, x["labels"]) + .75 * teaching.distillation(plain.logits, theirs, 2.)
    torch.testing.assert_close(mixed, wanted, rtol=1e-4, atol=1e-6)

def test_a_teacher_is_asked_once_a_text(teacher):
    asked = []
    hook = teacher.model.register_forward_pre_hook(lambda m, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True)
    try:
        ask = teaching.answering(teacher)
        ids, mask = torch.randint(5, 100, (3, 6)), torch.ones(3, 6, dtype=torch.long)
        with torch.no_grad():
            first, again = ask(ids, mask), ask(ids.flip(0), mask)
            wider = ask(F.pad(ids, (0, 2)), F.pad(mask, (0, 2)))
    finally: hook.remove()
    assert asked == [3] and torch.equal(first.flip(0), again) and torch.equal(first, wider)

def test_a_language_model_learns_from_its_teacher():
    whole = models.load("random:llama-tiny", task="causal-lm")
    m = models.cut_layers(whole, 1)
    x = torch.randint(5, 250, (8, 16), dtype=torch.int32)
    m, curve = teaching.retrained(m, x, x[:2], teaching.answering(whole), steps=2, batch_size=2, lr=1e-3)
    assert len(curve) == 2 and m.model.config.num_hidden_layers == 1
    assert m.model.get_output_embeddings().weight is m.model.get_input_embeddings().weight

def test_what_does_not_fit_is_refused(student, teacher):
    with pytest.raises(UsageError, match="answer alike"): teaching.distillation(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(UsageError, match="temperature"): teaching.distillation(torch.ones(2, 3), torch.ones(2, 3), 0)
    with pytest.raises(UsageError, match="hard"), teaching.taught(student, teaching.answering(teacher), hard=2): pass

def test_what_stands_beside_is_trained_and_taken_away(student, teacher):
    from datasets import Dataset
    from llmlab.kit import training
    x = training.tokenized(Dataset.from_dict(dict(text=["a", "b", "c", "d"], label=[0, 1, 2, 0])), student.tokenizer)
    width = student.model.config.hidden_size
    beside = torch.nn.Linear(width, width)
    was, keys, seen = beside.weight.detach().clone(), list(student.model.state_dict()), []
    def loss(out, batch):
        seen.append(len(out.hidden_states))
        return F.mse_loss(student.model.beside(out.hidden_states[-1]), torch.ones_like(out.hidden_states[-1]))
    with teaching.with_loss(student, loss, beside, output_hidden_states=True): teaching.retrained(student, x, x, steps=2, batch_size=2)
    assert seen == [student.model.config.num_hidden_layers + 1] * 2
    assert not torch.equal(beside.weight, was) and list(student.model.state_dict()) == keys
