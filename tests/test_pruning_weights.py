"Masks, formats and whole models of every kind: what a reader of the notebook need not see."
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings as hyp, strategies as st
from torch import nn

from llmlab.kit import compression, models
from llmlab.kit.models import Loaded
from llmlab.kit.settings import UsageError
from llmlab.pruning import weights as W

KINDS = ["llama", "gpt2", "opt", "bert", "distilbert", "qwen2", "qwen3", "mistral"]


def config(kind, **more):
    from transformers import AutoConfig
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=259, max_position_embeddings=64)
    if kind == "gpt2": sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=259, n_positions=64)
    elif kind == "distilbert": sizes = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=259, max_position_embeddings=64)
    elif kind == "opt": sizes |= dict(ffn_dim=64, word_embed_proj_dim=32)
    else: sizes |= dict(intermediate_size=64)
    if kind in ("llama", "qwen2", "qwen3", "mistral"): sizes |= dict(num_key_value_heads=2, tie_word_embeddings=True)
    if kind == "qwen3": sizes |= dict(head_dim=8)
    return AutoConfig.for_model(kind, **(sizes | more))


def tiny(kind, **more):
    import transformers
    cfg = config(kind, **more)
    tokenizer = models.random_tokenizer(cfg)
    encoder = kind in ("bert", "distilbert")
    torch.manual_seed(0)
    model = (transformers.AutoModel if encoder else transformers.AutoModelForCausalLM).from_config(cfg).eval()
    return Loaded(model, tokenizer, f"tiny {kind}", "random", "encoder" if encoder else "causal-lm")


def batches(loaded, n=8):
    return compression.calibration(loaded, ["a few words of text, and some more of them, long enough"] * 40, n=n, length=16)


def bodies(loaded):
    return [p for p in compression.matrices(loaded) if p.part not in ("head", "pooler")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    m = tiny(kind)
    before = {n: p.clone() for n, p in m.model.named_parameters()}
    given_ = batches(m)
    for method in W.METHODS:
        new, changes = W.prune_weights(m, .5, method, batches=given_)
        assert all(torch.equal(before[n], p) for n, p in m.model.named_parameters()), "the original changed"
        for p in bodies(new): assert (p.weight == 0).float().mean().item() == pytest.approx(.5, abs=.02), (method, p.name)
        assert {c.module for c in changes} == {p.name for p in compression.matrices(m)}
        assert all(c.part in ("head", "pooler") and c.reason for c in changes.skipped)
        ids = dict(given_[0])
        assert all(o.isfinite().all() for o in new.model(**ids).values() if torch.is_tensor(o))
        if (head := new.model.get_output_embeddings()) is not None:
            assert (head.weight is new.model.get_input_embeddings().weight) == (m.model.get_output_embeddings().weight is m.model.get_input_embeddings().weight)
            assert torch.equal(head.weight, m.model.get_output_embeddings().weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_saved_and_loaded_the_zeros_stay(kind, tmp_path):
    m, _ = W.prune_weights(tiny(kind), .5)
    models.save(m, tmp_path)
    again = models.load(str(tmp_path), task=m.task)
    for a, b in zip(bodies(m), bodies(again)): assert torch.equal(a.weight, b.weight)


def test_a_mixture_of_experts_is_refused():
    m = tiny("qwen3_moe", intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    with pytest.raises(UsageError, match="experts"): W.prune_weights(m, .5)


def test_the_head_only_when_asked_for_and_tied():
    m = tiny("llama")
    new, changes = W.prune_weights(m, .5, head=True)
    head = new.model.get_output_embeddings().weight
    assert head is new.model.get_input_embeddings().weight and (head == 0).float().mean().item() == pytest.approx(.5, abs=.01)
    assert "shared with" in next(c.done for c in changes if c.part == "head")


def test_in_place_changes_the_model_given():
    m = tiny("llama")
    new, _ = W.prune_weights(m, .5, in_place=True)
    assert new.model is m.model and (bodies(m)[0].weight == 0).any()


@pytest.mark.parametrize("sparsity", [-.1, 1, 1., 1.5, math.nan, "half", None])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(UsageError, match="sparsity"): W.prune_weights(tiny("bert"), sparsity)


@pytest.mark.parametrize("wrong, says", [(dict(method="magic"), "method"), (dict(scope="planet"), "scope"), (dict(pattern="3:7"), "pattern"),
    (dict(method="wanda"), "calibration"), (dict(method="sparsegpt", batches=[]), "calibration"),
    (dict(method="sparsegpt", scope="global", batches=[{}]), "layer by layer")])
def test_wrong_requests(wrong, says):
    with pytest.raises(UsageError, match=says): W.prune_weights(tiny("llama"), .5, **wrong)


def test_a_pattern_wants_half():
    with pytest.raises(UsageError, match="2:4"): W.prune_weights(tiny("llama"), .6, pattern="2:4")


def test_nan_and_quantized_are_refused():
    m = tiny("llama")
    bodies(m)[0].module.weight.data[0, 0] = math.nan
    with pytest.raises(UsageError, match="NaN"): W.prune_weights(m, .5)
    q = tiny("llama")
    bodies(q)[0].module.register_buffer("codes", torch.zeros(3, dtype=torch.int8))
    with pytest.raises(UsageError, match="quantized"): W.prune_weights(q, .5)


@pytest.mark.filterwarnings("ignore")
def test_what_torch_quantized_is_refused():
    m = tiny("bert")
    q = replace(m, model=torch.ao.quantization.quantize_dynamic(m.model, {nn.Linear}, dtype=torch.qint8))
    with pytest.raises(UsageError, match="quantized"): W.prune_weights(q, .5)


def test_sparsity_zero_changes_nothing():
    m = tiny("llama")
    for method in ("magnitude", "random", "wanda"):
        new, _ = W.prune_weights(m, 0, method, batches=batches(m))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(bodies(m), bodies(new)))


def test_pruning_twice_keeps_the_first_zeros():
    once, _ = W.prune_weights(tiny("llama"), .3)
    twice, _ = W.prune_weights(once, .6)
    for a, b in zip(bodies(once), bodies(twice)): assert ((b.weight != 0) & (a.weight == 0)).sum() == 0


@pytest.mark.parametrize("method", W.METHODS)
def test_two_of_four_everywhere(method):
    m = tiny("llama")
    new, _ = W.prune_weights(m, .5, method, pattern="2:4", batches=batches(m))
    for p in bodies(new): assert ((p.weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_global_spreads_unevenly_and_exactly():
    m = tiny("llama")
    bodies(m)[0].module.weight.data.mul_(.01)
    new, _ = W.prune_weights(m, .5, scope="global")
    zeros = [(p.weight == 0).float().mean().item() for p in bodies(new)]
    assert zeros[0] > .99 and min(zeros) < .5
    assert sum((p.weight == 0).sum().item() for p in bodies(new)) == round(.5 * sum(p.weight.numel() for p in bodies(new)))


def test_gpt2_inputs_and_outputs_are_not_confused():
    "Rows are outputs, whichever way a Conv1D stores them."
    m = tiny("gpt2")
    new, _ = W.prune_weights(m, .5, scope="row")
    for p in bodies(new): assert ((p.weight == 0).sum(1) == round(.5 * p.shape[1])).all()


numbers = st.floats(-4, 4, width=16)


@hyp(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.floats(0, .999), st.data())
def test_a_mask_prunes_exactly_so_many(rows, columns, sparsity, data):
    w = torch.tensor(data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))).view(rows, columns)
    for scope, n in (("layer", rows * columns), ("row", columns)):
        kept = W.keep(w.abs(), sparsity, scope)
        gone = ~kept if scope == "row" else ~kept.reshape(1, -1)
        size = w.abs() if scope == "row" else w.abs().reshape(1, -1)
        assert (gone.sum(1) == round(sparsity * n)).all()
        for g, x in zip(gone, size):
            if g.any() and not g.all(): assert x[g].max() <= x[~g].min()


@hyp(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.sampled_from(W.FORMATS), st.integers(0, 99))
def test_what_is_packed_comes_back(rows, fours, zeros, form, seed):
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, 4 * fours, generator=draw) * (torch.rand(rows, 4 * fours, generator=draw) >= zeros)
    if form == "2:4": w = w * W.two_of_four(w.abs())
    parts = W.packed(w, form)
    assert torch.equal(W.unpacked(parts, tuple(w.shape)), w)
    assert sum(t.nbytes for t in parts.values()) == W.predicted_bytes(tuple(w.shape), int((w != 0).sum()), form)


def test_formats_refuse_what_they_cannot_hold():
    with pytest.raises(UsageError, match="2:4"): W.packed(torch.ones(2, 8), "2:4")
    with pytest.raises(UsageError, match="format"): W.packed(torch.ones(2, 8), "zip")
    with pytest.raises(UsageError, match="divide by 4"): W.two_of_four(torch.ones(2, 6))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("form", W.FORMATS)
def test_files_of_whole_models(kind, form, tmp_path):
    m = tiny(kind)
    pruned, _ = W.prune_weights(m, .5, pattern="2:4" if form == "2:4" else None)
    done = W.write_sparse(pruned, tmp_path/"w", form)
    back = W.read_sparse(m, tmp_path/"w")
    for (n, a), b in zip(pruned.model.named_parameters(), back.model.parameters()): assert torch.equal(a, b), n
    assert len(done) == len(bodies(m))
    head = int.from_bytes((tmp_path/"w").read_bytes()[:8], "little")
    assert (tmp_path/"w").stat().st_size - 8 - head == W.predicted_file(pruned, form, done)


@pytest.mark.parametrize("kind", KINDS)
def test_csr_gives_the_same(kind):
    m, _ = W.prune_weights(tiny(kind), .8)
    sparse, changes = W.to_csr(m)
    x = dict(batches(m)[0])
    a, b = (o.model(**x)[0] for o in (m, sparse))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert changes.changed and all(c.reason for c in changes.skipped)


def test_sparsegpt_by_hand():
    "One row, two inputs that are nearly alike: the one that stays takes over."
    x = torch.randn(200, 1) @ torch.tensor([[1., 1.]]) + .01 * torch.randn(200, 2)
    new = W.sparsegpt(torch.tensor([[1., 2.]]), x.T @ x, .5, damp=1e-6)
    assert (new == 0).sum() == 1 and new.max().item() == pytest.approx(3, abs=.05)


def test_sparsegpt_of_silent_inputs_and_wrong_hessians():
    w, x = torch.randn(4, 8), torch.randn(50, 8)
    x[:, 3] = 0
    assert (W.sparsegpt(w, x.T @ x, .25)[:, 3] == 0).all()
    with pytest.raises(UsageError, match="Hessian"): W.sparsegpt(w, torch.eye(4))
    with pytest.raises(UsageError, match="NaN"): W.sparsegpt(w, torch.full((8, 8), math.nan))


def test_2_4_kernels_are_refused_on_the_cpu():
    m, _ = W.prune_weights(tiny("llama"), .5, pattern="2:4")
    with pytest.raises(UsageError, match="sparse tensor cores"): W.semi_structured(m)
