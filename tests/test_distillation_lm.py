"""What a reader need not see of distilling language models: divergences, the student's own text, what is kept of a teacher, prices."""
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch.testing import assert_close
from llmlab.distillation import language_model as lm
from llmlab.kit import models, store, teaching
from llmlab.kit.settings import UsageError, settings

def refused(text, call, *args, **more):
    with pytest.raises(UsageError, match=text): call(*args, **more)

def two(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(*shape, generator=g) for _ in range(2)]

@pytest.fixture(scope="module")
def teacher(): return models.load("random:llama-tiny", task="causal-lm")

@pytest.fixture
def student(teacher): return models.cut_layers(teacher, 1)

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0, .1, .5, .9, 1]))
def test_a_divergence_is_none_for_equals_and_above_none_for_others(seed, beta):
    q, p = (x.log_softmax(-1) for x in two(seed, 4, 9))
    d = lm.divergence_of(beta)
    assert (d(q, p) > 0).all() and (d(p, p).abs() < 1e-6).all() and d(q, p).shape == (4,)

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.floats(.05, .95))
def test_jsd_is_bounded_turns_around_and_ends_in_the_two_kl(seed, beta):
    q, p = (x.log_softmax(-1).double() for x in two(seed, 4, 9))
    assert_close(lm.jsd(q, p, beta), lm.jsd(p, q, 1 - beta))
    assert (lm.jsd(q, p, beta) <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-6).all()  # the entropy of β
    assert_close(lm.jsd(q, p, 1e-7) / 1e-7, lm.forward_kl(q, p), rtol=1e-2, atol=1e-3)
    assert_close(lm.jsd(q, p, 1 - 1e-7) / 1e-7, lm.reverse_kl(q, p), rtol=1e-2, atol=1e-3)

def test_the_ends_are_torchs_and_the_kits():
    x, y = two(0, 2, 5, 9)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    q, p = x.log_softmax(-1), y.log_softmax(-1)
    assert_close(lm.forward_kl(q, p), F.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert_close(lm.reverse_kl(q, p), F.kl_div(p, q, log_target=True, reduction="none").sum(-1))
    assert_close(teaching.distillation(x, y, 2., mask), teaching.distillation(x, y, 2., mask, lm.forward_kl))
    assert_close(teaching.distillation(x, y, 1., mask, lm.reverse_kl), lm.reverse_kl(q, p)[mask.bool()].mean())

@pytest.mark.parametrize("beta", [-.1, 1.1, math.nan])
def test_beta_outside_is_refused(beta): refused("beta", lm.divergence_of, beta)

@hypothesis_settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 8), st.sampled_from([0, .5, 1]))
def test_a_lump_sees_no_more_than_the_whole(seed, k, beta):
    x, y = (o / 4 for o in two(seed, 5, 9))  # a lump below the millionth that `with_rest` leaves it is another test's
    ids, d = y.topk(k, -1).indices, lm.divergence_of(beta)
    q, p = lm.coarsened(x, ids), lm.coarsened(y, ids)
    assert_close(q.exp().sum(-1), torch.ones(5))
    assert (d(q, p) <= d(x.log_softmax(-1), y.log_softmax(-1)) + 1e-4).all()

def test_nothing_is_left_to_the_lump_when_one_token_has_all():
    x = torch.tensor([[100., 0., 0.]], requires_grad=True)
    found = teaching.distillation(lm.coarsened(x, torch.tensor([[0]])), lm.with_rest(torch.zeros(1, 1)), 1.)
    found.backward()
    assert found.isfinite() and x.grad.isfinite().all()

def test_other_tokens_are_refused_and_the_way_out_is_named(teacher):
    other = models.load("random:bert-tiny", task="encoder")
    refused("Sequence-level", lm.same_tokens, other, teacher)
    lm.same_tokens(teacher, teacher)

def test_drawing_is_greedy_at_no_temperature_and_repeats_with_its_seed(teacher):
    ids = torch.randint(4, 250, (3, 5))
    library = teacher.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(lm.sampled(teacher.model, ids, 6, temperature=0.), library)
    a, b = (lm.sampled(teacher.model, ids, 6, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a[:, :5], ids) and not a.is_inference()

def test_the_students_own_text_takes_the_place_of_the_batch(student):
    prompts, sevens = torch.randint(4, 250, (8, 4), dtype=torch.int32), torch.full((4, 10), 7)
    batch = dict(input_ids=sevens, attention_mask=None, labels=sevens)
    inputs = lm.own_samples(student, prompts, 10, refresh=2, share=.5)
    a, b = inputs(batch), inputs(batch)
    assert torch.equal(a["input_ids"][:2, :4], prompts[:2].long()) and torch.equal(b["input_ids"][:2, :4], prompts[2:4].long())
    assert (a["input_ids"][2:] == 7).all() and a["labels"] is None and (batch["input_ids"] == 7).all()
    assert a["weight"].tolist() == [[0.] * 3 + [1.] * 7] * 2 + [[1.] * 10] * 2
    refused("share", lm.own_samples, student, prompts, 10, share=0)
    refused("nothing to write", lm.own_samples, student, prompts, 4)

def test_a_student_is_trained_on_what_it_writes_as_it_learns(student, teacher):
    x = torch.randint(4, 250, (8, 12), dtype=torch.int32)
    was = {k: v.clone() for k, v in student.model.state_dict().items()}
    how = dict(temperature=1., hard=0., divergence=lm.reverse_kl, inputs=lm.own_samples(student, x[:, :4], 12, refresh=1))
    own = type(student.model)
    with teaching.taught(student, teaching.answering(teacher), **how): m, _ = teaching.retrained(student, x, x[:2], steps=2, batch_size=2, lr=1e-3)
    assert type(m.model) is own and all(v.isfinite().all() for v in m.model.state_dict().values())
    assert sum(not torch.equal(v, was[k]) for k, v in m.model.state_dict().items()) > 5

def test_as_text_goes_by_texts(teacher):
    tok = teacher.tokenizer
    a, b = (tok(t, add_special_tokens=False)["input_ids"] for t in ("one text", "two"))
    assert lm.as_text(torch.tensor([[tok.bos_token_id, *a, tok.eos_token_id, *b]]), tok) == ["one text", "two"]

def test_kept_answers_are_found_by_the_text_and_only_there(tmp_path):
    import numpy as np
    x, y = torch.randint(4, 250, (3, 6)), two(0, 3, 6, 300)[0]
    best = y.log_softmax(-1).topk(4, -1)
    files = dict(windows=x.numpy().astype(np.uint16), logp=best.values.half().numpy(), ids=best.indices.numpy().astype(np.uint16))
    for name, o in files.items(): np.save(tmp_path/name, o)
    ask = lm.remembered(tmp_path)
    ids, logp = ask(x.flip(0))
    assert torch.equal(ids, best.indices.flip(0)) and logp.shape == (3, 6, 5)
    assert_close(logp[..., :4], best.values.flip(0), rtol=2e-3, atol=2e-3)
    refused("not among those", ask, x + 1)

def test_bytes_that_a_loss_moves_grow_with_the_vocabulary():
    few, many = (lm.loss_bytes(lambda z: z.float().logsumexp(-1).sum(), v) for v in (100, 400))
    assert 3.5 < many / few < 4.1 and few > 4 * 100 * 2

def test_parts_of_an_update_follow_what_it_does():
    t, g = models.geometry("embedded:lm", "causal-lm"), models.geometry("embedded:lm-small", "causal-lm")
    alone, data, own = lm.update_parts(g, t, 4, 64, asked=False), lm.update_parts(g, t, 4, 64), lm.update_parts(g, t, 4, 64, drawn=48)
    assert alone.keys() < data.keys() < own.keys()
    assert alone["student, forward and back"].flops == 3 * g.flops(4, 64) and data["teacher, forward"].flops == t.flops(4, 64)

def test_equal_cost_is_the_training_itself_at_its_own_updates():
    short, long = dict(nats=[4., 8.]), dict(nats=[2., 4.])
    assert lm.at_equal_cost(short, long, (10, 40), 10) == [4., 8.]
    assert_close(lm.at_equal_cost(short, long, (10, 40), 40), [2., 4.])
    assert_close(lm.at_equal_cost(short, long, (10, 40), 20), [3., 6.])
    refused("ascend", lm.at_equal_cost, short, long, (10, 10), 20)

def test_several_seeds_are_one_student():
    n = dict(nats=[1., 3.], n_bytes=[1, 2], writes=dict(told=[1.]))
    assert lm.mean_of([n, n | dict(nats=[3., 5.])]) == n | dict(nats=[2., 4.])

def test_the_plan_pays_alike_and_names_every_key():
    for profile in ("smoke", "tiny", "thorough"):
        s = settings(profile)
        plan = lm.plan(s)
        tokens = {name: o["steps"] * o["batch_size"] * o["length"] for (name, _), o in plan.items() if name != lm.LONGER}
        assert all(o["split"] == "validation" for o in lm.search(s).values()) and bool(lm.search(s)) == (profile == "thorough")
        assert len({*tokens.values()}) == 1 and plan[lm.LONGER, s.seed]["steps"] > plan["alone", s.seed]["steps"]
        assert len({store.key(r, **o) for r, o in lm.recipes(s)}) == len(lm.recipes(s))

def test_an_unknown_method_is_refused(tmp_path):
    given = lm.plan(settings("smoke"))["alone", 0]
    refused("method", lm.lm_student.make, tmp_path, **given | dict(method="aloud"))
