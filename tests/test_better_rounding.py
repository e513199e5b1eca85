"""Rounding that looks at inputs: on every architecture, at the edges, and against what can be computed in full."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, Qwen2Config, Qwen3Config

from llmlab.kit import compression, models
from llmlab.kit.geometry import TASKS
from llmlab.kit.models import Loaded
from llmlab.kit.settings import UsageError
from llmlab.kit.stats import estimate
from llmlab.quantization import better_rounding as br
from llmlab.quantization.arithmetic import choose_scale, from_codes

small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=259, max_position_embeddings=64)
CONFIGS = dict(
    llama=(LlamaConfig(**small, intermediate_size=32, tie_word_embeddings=True), "causal-lm"),
    gpt2=(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=259, n_positions=64), "causal-lm"),
    opt=(OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=16), "causal-lm"),
    qwen2=(Qwen2Config(**small, num_key_value_heads=1, intermediate_size=32), "causal-lm"),
    qwen3=(Qwen3Config(**small, num_key_value_heads=1, head_dim=8, intermediate_size=32), "causal-lm"),
    moe=(MixtralConfig(**small, num_key_value_heads=1, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1), "causal-lm"),
    bert=(BertConfig(**small, intermediate_size=32), "encoder"),
    distilbert=(DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=259, max_position_embeddings=64), "encoder"),
    classifier=(BertConfig(**small, intermediate_size=32, num_labels=3), "classifier"),
)


def drawn(name):
    import transformers
    config, task = CONFIGS[name]
    tok = models.random_tokenizer(config)
    torch.manual_seed(0)
    return Loaded(getattr(transformers, TASKS[task]).from_config(config).eval(), tok, f"random:{name}", "random", task)


def batches_for(m, n=2, length=12):
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 250, (4, length), generator=g) for _ in range(n)]
    return [dict(input_ids=x) if m.task == "causal-lm" else dict(input_ids=x, attention_mask=torch.ones_like(x)) for x in ids]


def snapshot(m): return {n: p.clone() for n, p in m.model.named_parameters()}


def layer_inputs(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=g) @ torch.randn(n, n, generator=g)
    return torch.randn(5, n, generator=g), x.T @ x


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_rounded(name):
    m, before = drawn(name), snapshot(drawn(name))
    batches = batches_for(m)
    for out, changes in (br.nearest(m, 3, 8), br.gptq(m, batches, 3, 8, act_order=True), br.gptq(m, batches, 3, 8, sequential=True, fitted=True)):
        assert len(changes.changed) == len(compression.matrices(m, head=False)) and changes.after_bytes < changes.before_bytes
        assert all(p.weight.unique(dim=None).numel() <= p.weight.numel() for p in compression.matrices(out))
        assert all(torch.equal(p, before[n]) for n, p in m.model.named_parameters()), "the model given was changed"
        with torch.inference_mode(): assert all(o.isfinite().all() for o in out.model(**batches[0]).values() if torch.is_tensor(o))
    for p in compression.matrices(out, head=False):
        rows = p.weight.reshape(p.shape[0], -1, 8) if p.shape[1] % 8 == 0 else None
        if rows is not None: assert max(len(set(g.tolist())) for r in rows for g in r) <= 8, "more levels than three bits have"


def test_tied_head_stays_tied_and_fused_experts_are_named():
    out, changes = br.nearest(drawn("llama"), 4, 8)
    assert out.model.lm_head.weight is out.model.get_input_embeddings().weight
    assert [c.reason for c in changes.skipped] == ["tied to model.embed_tokens"]
    _, changes = br.nearest(drawn("moe"), 4, 8)
    assert any("experts" in c.reason for c in changes.skipped)


def test_in_place_is_asked_for():
    m = drawn("llama")
    before = snapshot(m)
    out, _ = br.gptq(m, batches_for(m), 2, 8, in_place=True)
    assert out.model is m.model and any(not torch.equal(p, before[n]) for n, p in m.model.named_parameters())


@pytest.mark.parametrize("name, places", dict(llama=8, gpt2=4, opt=8, qwen2=6, qwen3=6, bert=2, distilbert=2).items())
def test_what_is_folded_changes_nothing(name, places):
    m = drawn(name)
    batches, folds = batches_for(m), None
    folds = br.foldable(m, batches)
    out = compression.copied(m)
    widths = {p.name: p.shape[1] for p in compression.matrices(m)}
    for f in folds: br.scale_columns(out, f, torch.rand(widths[f.targets[0]]).add(.5))
    with torch.inference_mode():
        for b in batches: torch.testing.assert_close(out.model(**b)[0], m.model(**b)[0], rtol=1e-3, atol=1e-4)
    assert len(folds) >= places - 2


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_smoothing_keeps_the_function(name):
    m = drawn(name)
    batches = batches_for(m)
    out, changes = br.smooth(m, batches, .7)
    with torch.inference_mode(): torch.testing.assert_close(out.model(**batches[0])[0], m.model(**batches[0])[0], rtol=1e-3, atol=1e-4)
    assert changes.changed and changes.before_bytes == changes.after_bytes


def test_smoothing_brings_the_range_down():
    m = drawn("llama")
    batches = batches_for(m)
    spiky = br.with_outliers(m, br.foldable(m, batches), columns=1)
    high = compression.outlier_profile(compression.input_statistics(spiky, batches))
    low = compression.outlier_profile(compression.input_statistics(br.smooth(spiky, batches)[0], batches))
    assert max(low.values()) < max(high.values()) / 5


def test_awq_is_never_worse_than_nearest_in_any_layer():
    for seed in range(5):
        w, h = layer_inputs(16, seed)
        by, alpha, errors = br.awq_scale([w], h, (h.diagonal() / 48).sqrt(), 3, 8)
        assert min(errors) <= errors[0] and 0 <= alpha < 1 and (by > 0).all()
    out, changes = br.awq(drawn("gpt2"), batches_for(drawn("gpt2")), 4, 8)
    assert any("AWQ" in c.done for c in changes) and any("no place to fold" in c.done for c in changes)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
def test_gptq_codes_lie_on_the_grid(seed, bits, act_order):
    w, h = layer_inputs(12, seed)
    q = br.gptq_matrix(w, h, bits, 5, act_order=act_order)
    assert q.codes.min() >= 0 and q.codes.max() < 2**bits and q.scale.shape == (5, 3) and q.dequantize().shape == w.shape
    assert torch.equal(q.packed().unpacked().dequantize(), q.dequantize())


def test_gptq_with_unrelated_inputs_is_plain_rounding():
    w, _ = layer_inputs(16)
    for symmetric in (False, True):
        q = br.gptq_matrix(w, torch.eye(16) * 7, 3, 4, symmetric=symmetric)
        assert torch.equal(q.dequantize(), br.nearest_matrix(w, 3, 4, symmetric=symmetric).dequantize())


def test_gptq_beats_nearest_and_not_the_best():
    won = 0
    for seed in range(20):
        w, h = layer_inputs(5, seed)
        scale, zero = choose_scale(w[:1], 2, symmetric=False)
        best = from_codes(br.best_rounding(w[0], h, scale[0, 0], zero[0, 0]), scale[0, 0], zero[0, 0])
        e = [br.layer_error(q - w[:1], h) for q in (best[None], br.gptq_matrix(w[:1], h, 2, 5, scale_dtype=torch.float32).dequantize(),
                                                  br.nearest_matrix(w[:1], 2, 5, scale_dtype=torch.float32).dequantize())]
        assert e[0] <= min(e[1:]) * 1.0001
        won += e[1] <= e[2]
    assert won >= 12


def test_lazy_blocks_change_nothing():
    w, h = layer_inputs(300)
    whole, parts = br.gptq_matrix(w, h, 4, 300, static=True), br.gptq_matrix(w, h, 4, 100, static=True)
    assert whole.codes.shape == parts.codes.shape
    plain = br.layer_error(br.nearest_matrix(w, 4, 100).dequantize() - w, h)
    assert br.layer_error(parts.dequantize() - w, h) < plain


def test_dead_inputs_do_no_harm():
    w, h = layer_inputs(8)
    h[3], h[:, 3] = 0, 0
    assert br.gptq_matrix(w, h, 3, 8).dequantize().isfinite().all()


def test_a_constant_and_a_zero_matrix_stay():
    h = layer_inputs(8)[1]
    for w in (torch.zeros(2, 8), torch.full((2, 8), .5)): torch.testing.assert_close(br.gptq_matrix(w, h, 2, 8).dequantize(), w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how, message", [(dict(bits=0), "1 to 8"), (dict(bits=9), "1 to 8"), (dict(group_size=1), "at least 2"),
    (dict(damping=-1.), "damping"), (dict(flow={}, sequential=True), None)])
def test_bad_arguments_are_refused(how, message):
    m = drawn("llama")
    if message is None: how["flow"] = compression.input_statistics(m, batches_for(m), hessian=True)
    with pytest.raises(UsageError, match=message): br.gptq(m, batches_for(m), **how)


@pytest.mark.parametrize("call", [br.gptq, br.awq, br.smooth, lambda m, b: br.gptq_options(m, b), br.foldable])
def test_no_calibration_is_refused(call):
    with pytest.raises(UsageError, match="batches is empty"): call(drawn("llama"), [])


def test_wrong_calibration_is_refused():
    with pytest.raises(UsageError, match="dict with input_ids"): br.gptq(drawn("llama"), [torch.ones(1, 4)])
    with pytest.raises(UsageError, match="needs H of"): br.gptq_matrix(torch.ones(2, 4), torch.eye(3))


def test_nan_weights_are_refused():
    m = drawn("llama")
    with torch.no_grad(): m.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    for call in (lambda: br.nearest(m, 4, 8), lambda: br.gptq(m, batches_for(m), 4, 8)):
        with pytest.raises(UsageError, match="NaN"): call()


def test_indefinite_hessian_is_refused():
    with pytest.raises(UsageError, match="not positive definite"): br.gptq_matrix(torch.ones(2, 4), -torch.eye(4))


def test_too_many_to_try():
    with pytest.raises(UsageError, match="too many"): br.best_rounding(torch.ones(11), torch.eye(11), torch.tensor(1.), torch.tensor(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "classifier"])
def test_the_forecast_is_the_fisher_form(name):
    "Against ½ (gᵀδ)² from the gradient of each sequence's loss, for the same draws."
    m = drawn(name)
    batch = {k: v[:2] for k, v in batches_for(m, 1)[0].items()}
    options = br.gptq_options(m, batches_for(m), (2, 4), 8)
    felt = br.sensitivity(m, [batch], options, seed=5)
    logits = m.model(**batch).logits
    drawn_ids = torch.multinomial(logits.flatten(0, -2).detach().softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0].view(logits.shape[:-1])
    place = compression.matrices(m, head=False)[0]
    dw, total = options[place.name][2].dequantize() - place.weight, 0.
    for i in range(2):
        m.model.zero_grad()
        out = m.model(**{k: v[i:i + 1] for k, v in batch.items()}).logits
        torch.nn.functional.cross_entropy(out.flatten(0, -2), drawn_ids[i].reshape(-1), reduction="sum").backward()
        g = place.module.weight.grad
        total += .5 * ((g.t() if place.turned else g) * dw).sum().item()**2
    assert felt.nats[place.name][2] == pytest.approx(total / drawn_ids.numel(), rel=1e-2)
    assert all(p.requires_grad for p in m.model.parameters())


def test_an_encoder_predicts_nothing():
    m = drawn("bert")
    with pytest.raises(UsageError, match="predicts nothing"): br.sensitivity(m, batches_for(m), {})


def test_the_plan_is_the_best_of_all():
    m = drawn("llama")
    options = dict(list(br.gptq_options(m, batches_for(m), (2, 3, 4), 8).items())[:5])
    g = torch.Generator().manual_seed(0)
    felt = br.Sensitivity({n: {b: torch.rand(1, generator=g).item() / b**2 for b in o} for n, o in options.items()}, 1)
    budget = sum(o[3].nbytes for o in options.values())
    plan, best = br.plan_bits(options, felt, budget), float("inf")
    for choice in itertools.product((2, 3, 4), repeat=5):
        bits = dict(zip(options, choice))
        if sum(options[n][b].nbytes for n, b in bits.items()) <= budget: best = min(best, felt.total(bits))
    assert plan.size_bytes <= budget and plan.nats == pytest.approx(best, rel=1e-3)


def test_mixed_precision_stays_within_its_bytes():
    m = drawn("qwen3")
    budget = sum(br.nearest_matrix(p.weight, 3, 8).nbytes for p in compression.matrices(m, head=False))
    out, changes = br.mixed_precision(m, batches_for(m, 2), budget, bits=(2, 3, 4), group_size=8)
    assert sum(c.after_bytes for c in changes.changed) <= budget
    with pytest.raises(UsageError, match="fewer than"): br.mixed_precision(m, batches_for(m, 2), 10, group_size=8)
    with pytest.raises(UsageError, match="at least two"): br.mixed_precision(m, batches_for(m, 1), budget, group_size=8)
    with pytest.raises(UsageError, match="nothing to choose"): br.mixed_precision(m, batches_for(m, 2), budget, bits=(3,), group_size=8)


def test_share_of_loss():
    e = [estimate([(a, 10.) for a in x], "bits/byte", "pooled") for x in ([1., 2, 3], [3., 4, 5], [2., 3, 4])]
    assert br.share_of_loss(*e).value == pytest.approx(.5)
    with pytest.raises(UsageError, match="loses nothing"): br.share_of_loss(e[1], e[0], e[0])
