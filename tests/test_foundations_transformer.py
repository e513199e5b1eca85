"""Attention and the transformer from scratch: what their notebooks do not show."""
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from llmlab.foundations import attention as a
from llmlab.foundations import transformer as t
from llmlab.kit import geometry, models, store
from llmlab.kit.settings import UsageError, settings


def drawn(seed): return torch.Generator().manual_seed(seed)


@examples(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_attention_is_torchs_for_any_mask(tokens, memory, seed, double):
    g, dtype = drawn(seed), torch.float64 if double else torch.float32
    q = torch.randn(2, 3, tokens, 8, generator=g, dtype=dtype)
    k, v = torch.randn(2, 2, 3, memory, 8, generator=g, dtype=dtype)
    mask = torch.rand(2, 1, tokens, memory, generator=g) < .6  # rows that allow nothing among them
    out, weights = a.attend(q, k, v, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(weights.sum(-1), mask.any(-1).expand(2, 3, tokens).to(dtype))
    assert (weights.masked_select(~mask.expand_as(weights)) == 0).all()


def test_a_row_that_may_look_nowhere_has_a_gradient_of_zero():
    q, k, v = torch.randn(3, 2, 4, generator=drawn(0)).requires_grad_().unbind()
    leaf = q.clone().detach().requires_grad_()
    a.attend(leaf, k, v, torch.tensor([[True, True], [False, False]]))[0].sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[1] == 0).all()


@pytest.mark.parametrize("n_kv_head", [8, 4, 2, 1])
@pytest.mark.parametrize("rotary", [None, 10_000.])
def test_the_fused_layer_is_the_one_from_scratch(n_kv_head, rotary):
    layer, x = a.MultiHeadAttention(64, 8, n_kv_head, bias=True, rotary_base=rotary), torch.randn(2, 7, 64, generator=drawn(1))
    mask = a.causal_mask(7) & a.padding_mask(torch.tensor([7, 4]), 7)
    plain, weights = layer(x, mask)
    layer.fused = True
    fused, none = layer(x, mask)
    torch.testing.assert_close(fused, plain)
    assert none is None and weights.shape == (2, 8, 7, 7)


def test_cross_attention_takes_its_keys_from_the_memory():
    layer, x, memory = a.MultiHeadAttention(16, 2), torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    out, weights = layer(x, memory=memory)
    assert out.shape == (1, 3, 16) and weights.shape == (1, 2, 3, 5)
    torch.testing.assert_close(layer(x, memory=memory[:, torch.tensor([4, 2, 0, 1, 3])])[0], out)  # a memory has no order of its own


@examples(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.integers(1, 12), st.sampled_from([2, 8, 64]))
def test_rotary_scores_depend_on_the_distance_only(start, tokens, d):
    q, k = torch.randn(2, tokens, d, generator=drawn(d + tokens))
    torch.testing.assert_close(a.rotary_scores(q, k, start), a.rotary_scores(q, k), atol=2e-3, rtol=0)
    turned = a.rotate(q, a.rotary_angles(tokens, d, start=start))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))  # turning keeps lengths


def test_sinusoidal_positions_are_those_of_the_paper():
    p = a.sinusoidal_positions(5, 8)
    assert p[3, 4] == pytest.approx(math.sin(3 / 10_000 ** (4 / 8))) and p[3, 5] == pytest.approx(math.cos(3 / 10_000 ** (4 / 8)))


@pytest.mark.parametrize("make", [lambda: a.MultiHeadAttention(48, 5), lambda: a.MultiHeadAttention(48, 4, 3), lambda: a.rotary_angles(3, 7),
    lambda: a.padding_mask(torch.tensor([4]), 3), lambda: a.padding_mask(torch.tensor([-1]), 3), lambda: t.FeedForward(4, 8, "relu6"),
    lambda: t.Block(8, 2, 16, norm="batch"), lambda: t.recaller("tree"), lambda: a.from_torch(nn.MultiheadAttention(8, 2, kdim=4))])
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(UsageError): make()


def test_a_causal_mask_lets_earlier_memory_be_seen():
    assert a.causal_mask(2, memory=3).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert a.causal_mask(1).tolist() == [[True]]


def test_a_block_refuses_a_memory_it_cannot_look_at():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(UsageError, match="decoder-only"): t.Block(8, 2, 16)(x, memory=x)
    with pytest.raises(UsageError, match="memory"): t.Block(8, 2, 16, cross=True)(x)


@pytest.mark.parametrize("kv", [4, 2])
def test_a_whole_llama_with_shared_heads_and_a_head_of_its_own(kv):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(kv)
    theirs = t.scrambled(LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv,
        intermediate_size=48, vocab_size=64, tie_word_embeddings=kv == 4, rope_theta=500.)))
    ours, ids = t.decoder_of(theirs), torch.randint(64, (2, 9))
    with torch.no_grad(): torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    g = geometry.geometry_of(theirs.config)
    assert t.counted_parameters(ours) == g.parameters and t.counted_flops(ours, ids) == t.predicted_flops(g, 2, 9)
    assert (ours.lm_head.weight is ours.embed.weight) == (kv == 4)


@pytest.mark.parametrize("changed", [dict(attention_bias=True), dict(hidden_act="gelu"),
    dict(rope_parameters=dict(rope_type="linear", factor=2., rope_theta=1e4))])
def test_a_llama_that_is_not_plain_is_refused(changed):
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=16, **changed))
    with pytest.raises(UsageError): t.decoder_of(model)


def test_another_architecture_is_refused_whole():
    with pytest.raises(UsageError, match="gpt2"): t.decoder_of(models.load("random:gpt2-tiny", task="causal-lm").model)


@pytest.mark.parametrize("make", [lambda: t.Decoder(9, 16, 2, 2, 32, max_tokens=6), lambda: t.Decoder(9, 16, 2, 2, 32, rotary_base=100., fused=True)])
def test_a_decoder_never_looks_ahead(make):
    model, ids = make().eval(), torch.randint(9, (2, 6), generator=drawn(0))
    for at in range(6):
        other = ids.clone(); other[:, at] = (other[:, at] + 1) % 9
        with torch.no_grad(): moved = (model(ids) - model(other)).abs().amax((0, 2))
        assert (moved[:at] == 0).all() and moved[at] > 0


def test_too_many_tokens_are_refused_by_learned_positions():
    with pytest.raises(UsageError, match="positions for 4"): t.Decoder(9, 16, 1, 2, 32, max_tokens=4)(torch.zeros(1, 5, dtype=torch.long))


@examples(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 5))
def test_reversals_are_words_backwards(seed, least, more):
    source, real, into, out = t.reversals(5, seed, least, least + more)
    for i in range(5):
        n = int(real[i].sum()) - 1
        word = source[i, :n].tolist()
        assert least <= n <= least + more and source[i, n] == t.END and (source[i, n + 1:] == t.PAD).all() and max(word) < t.LETTERS
        assert out[i, :n + 1].tolist() == word[::-1] + [t.END] and (out[i, n + 1:] == -100).all()
        assert into[i, :n + 1].tolist() == [t.START, *word[::-1]]


@pytest.mark.parametrize("length", [1, 12])
def test_recalls_ask_for_what_stood_there(length):
    ids, answers = t.recalls(50, seed=3, length=length)
    assert ids.shape == (50, length + t.QUESTIONS) and ids[:, :length].max() < t.SYMBOLS
    for row, right in zip(ids.tolist(), answers.tolist()):
        for question, answer in zip(row[length:], right): assert row[length - 1 - (question - t.SYMBOLS)] == answer


def line(model, batch): return (model(batch) - batch * 2).square().mean()


def test_fit_goes_downhill_and_leaves_evaluation_mode():
    model = nn.Linear(1, 1)
    h = t.fit(model, line, lambda step: torch.randn(16, 1, generator=drawn(step)), 200, lr=.05)
    assert h.train[-1] < .05 * h.train[0] and not model.training and h.best_step is None and "200 steps" in repr(h)


def test_fit_keeps_the_best_weights_and_stops():
    model, seen = nn.Linear(1, 1), []
    def validate(m):
        seen.append(m.weight.item())
        return [3., 1., 2., 2., 2., 2.][len(seen) - 1]
    h = t.fit(model, line, lambda step: torch.ones(4, 1), 60, validate=validate, every=10, patience=20)
    assert h.best_step == 19 and len(h.train) == 40 and model.weight.item() == seen[1]


def test_a_loss_that_is_no_number_is_named():
    with pytest.raises(UsageError, match="nan at step 1"):
        t.fit(nn.Linear(1, 1), line, lambda step: torch.full((2, 1), math.nan if step else 1.), 3)


def test_attention_weights_switch_fusing_off_and_on_again():
    model, (source, real, into, _) = t.EncoderDecoder(t.PAD + 1, d_model=16, n_layer=2, n_head=2), t.reversals(3, 0)
    seen = t.attention_weights(model, source, real, into)
    assert len(seen) == 6 and all(torch.allclose(w.sum(-1), torch.ones(())) for w in seen.values())
    assert all(m.fused for m in model.modules() if isinstance(m, a.MultiHeadAttention)) and not any(m._forward_hooks for m in model.modules())
    assert (seen["decoder.1.cross_attention"].masked_select(~real.expand(3, 2, 9, 9)) == 0).all()
    with pytest.raises(UsageError): t.attention_weights(model, source.repeat(1, 4), real, into)
    assert all(m.fused for m in model.modules() if isinstance(m, a.MultiHeadAttention))


def test_written_words_do_not_depend_on_the_batch():
    model, (source, real, *_) = t.EncoderDecoder(t.PAD + 1, d_model=16, n_head=2).eval(), t.reversals(4, 0)
    alone = torch.cat([t.write(model, source[i:i + 1], real[i:i + 1], 9) for i in range(4)])
    assert (t.write(model, source, real, 9) == alone).all()


def test_the_recall_recipe_gives_the_same_twice_and_knows_what_it_is_made_of(tmp_path):
    arguments = dict(kind="LSTM", length=5, steps=3, seed=1, lr=1e-2)
    made = [t.recall_fit.make(Path(tempfile.mkdtemp(dir=tmp_path)), **arguments) for _ in range(2)]
    assert made[0]["accuracy"] == made[1]["accuracy"] and made[0]["loss"] == made[1]["loss"] and len(made[0]["accuracy"]) == 5
    in_notebook = store.Recipe(t.recall_fit.make, "recall_fit", t.recall_fit.version, t.recall_fit.uses)
    assert store.key(in_notebook, **arguments) == store.key(t.recall_fit, **arguments) != store.key(t.recall_fit, **arguments | dict(seed=2))


def test_the_plan_gives_every_kind_the_same_seeds(tmp_path):
    plan = t.recall_plan(settings("tiny", device="cpu", out_dir=tmp_path))
    assert {o[1:] for o in plan if o[0] == "LSTM"} == {o[1:] for o in plan if o[0] == "transformer"} and len(t.recipes(settings("smoke", device="cpu"))) == 3
