"""Quantizing a trained model: every architecture, ties, bytes, refusals."""
import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, Qwen2Config, Qwen3Config

from llmlab.kit import compression, models
from llmlab.kit.geometry import TASKS
from llmlab.kit.models import Loaded
from llmlab.kit.settings import Damaged, UsageError
from llmlab.quantization import post_training as pt
from llmlab.quantization.arithmetic import quantize

_small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=259, max_position_embeddings=64)
_llama = dict(_small, num_key_value_heads=1, intermediate_size=40)
CONFIGS = dict(
    llama=lambda: LlamaConfig(**_llama, tie_word_embeddings=True),
    untied=lambda: LlamaConfig(**_llama, tie_word_embeddings=False),
    gpt2=lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=259, n_positions=64),
    opt=lambda: OPTConfig(**_small, ffn_dim=40, word_embed_proj_dim=32),
    qwen2=lambda: Qwen2Config(**_llama, tie_word_embeddings=True),
    qwen3=lambda: Qwen3Config(**_llama, head_dim=16, tie_word_embeddings=True),
    bert=lambda: BertConfig(**_small, intermediate_size=40),
    distilbert=lambda: DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=40, vocab_size=259, max_position_embeddings=64),
)
ENCODERS = ("bert", "distilbert")
IDS = torch.arange(3, 35).reshape(2, 16)


def drawn(name, config=None):
    import transformers
    config = config or CONFIGS[name]()
    task = "encoder" if name in ENCODERS else "causal-lm"
    tok = models.random_tokenizer(config)
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task]).from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.normal_(0, .1)
    return Loaded(model, tok, f"random:{name}", "random", task)


def out(m):
    with torch.inference_mode(): o = m.model(input_ids=IDS)
    return o.logits if hasattr(o, "logits") else o.last_hidden_state


def off(a, b): return ((out(a) - out(b)).norm() / out(b).norm()).item()


def batches(m): return [dict(input_ids=IDS)]


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_every_architecture(name):
    m = drawn(name)
    before = copy.deepcopy(m.model.state_dict())
    small, changes = pt.weight_only(m, 8)
    assert off(small, m) < .05
    assert all(torch.equal(v, before[k]) for k, v in m.model.state_dict().items()), "the original changed"
    assert off(small, pt.dequantized(small)) < 1e-6
    assert changes.before_bytes == sum(p.nbytes for p in m.model.parameters())
    stored = {id(b): b for n, b in small.model.named_buffers() if n.rsplit(".")[-1] in ("codes", "scale", "zero")}
    assert changes.after_bytes == sum(b.nbytes for b in stored.values()) + sum(p.nbytes for p in small.model.parameters())
    assert {c.module for c in changes} >= {p.name for p in compression.matrices(m, embeddings=True)}


@pytest.mark.parametrize("name", CONFIGS)
def test_integers_of_every_architecture(name):
    m = drawn(name)
    moving, changes = pt.dynamic(m)
    still, _ = pt.static(m, batches(m))
    assert off(moving, m) < .08 and off(still, m) < .12
    assert len(changes.changed) == len(compression.matrices(m))
    assert changes.before_bytes == sum(p.nbytes for p in m.model.parameters())
    packed, _ = pt.dynamic(m, embeddings=8)
    assert models.bytes_in_memory(packed) < models.bytes_in_memory(moving) < models.bytes_in_memory(m) * 1.05


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_what_is_tied_stays_tied_and_generates(name):
    m = drawn(name)
    for small in (pt.weight_only(m, 4, 32)[0], compression.copied(pt.weight_only(m, 8)[0])):
        head, table = small.model.get_output_embeddings(), small.model.get_input_embeddings()
        if isinstance(table, pt.QuantizedEmbedding): assert head.packed is table.packed
        assert small.model.generate(IDS[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)
    back = pt.dequantized(small)
    assert back.model.get_output_embeddings().weight is back.model.get_input_embeddings().weight


def test_an_embedding_with_a_forward_of_its_own_is_left_and_named():
    m, changes = pt.weight_only(drawn("opt"), 8)
    left = [c for c in changes.skipped if "position" in c.module]
    assert left and "forward of its own" in left[0].reason


@pytest.mark.parametrize("how", [dict(bits=3, group_size=7), dict(bits=4, symmetric=False, group_size=16), dict(bits=1, symmetric=False),
    dict(bits=4, clip=True), dict(bits=5)])
def test_every_way_gives_what_its_floats_give(how):
    small, _ = pt.weight_only(drawn("qwen3"), **how)
    assert off(small, pt.dequantized(small)) < 1e-5


def test_head_and_embedding_on_purpose():
    m = drawn("untied")
    small, changes = pt.weight_only(m, 4, 32, head=8, embeddings=0)
    assert type(small.model.lm_head) is pt.QuantizedLinear and small.model.lm_head.packed.bits == 8
    assert type(small.model.model.embed_tokens) is nn.Embedding
    assert next(c for c in changes if c.part == "embedding").reason == "in floats, as asked"
    with pytest.raises(UsageError, match="shares its weights"): pt.weight_only(drawn("llama"), 4, head=8)
    both, _ = pt.weight_only(drawn("llama"), 4, head=0, embeddings=0)
    assert both.model.lm_head.weight is both.model.model.embed_tokens.weight


def test_chosen_matrices_alone():
    m = drawn("llama")
    name = "model.layers.0.mlp.up_proj"
    place = next(p for p in compression.matrices(m) if p.name == name)
    small, changes = pt.with_packed(m, {name: quantize(place.weight, 4), "lm_head": "kept for the reader"})
    assert [c.module for c in changes.changed] == [name]
    with pytest.raises(UsageError, match="no matrix 'nowhere'"): pt.with_packed(m, {"nowhere": quantize(place.weight)})
    with pytest.raises(UsageError, match="is to replace it"): pt.with_packed(m, {name: quantize(place.weight[:4])})
    with pytest.raises(UsageError, match="both or neither"): pt.with_packed(m, {"lm_head": quantize(m.model.lm_head.weight), "model.embed_tokens": "kept"})


def test_in_place_only_when_asked():
    m = drawn("gpt2")
    again, _ = pt.weight_only(m, 8, in_place=True)
    assert again.model is m.model and isinstance(m.model.lm_head, pt.QuantizedLinear)


def test_the_state_is_plain_tensors_and_comes_back(tmp_path):
    small, other = pt.weight_only(drawn("llama"), 4, 16)[0], pt.weight_only(drawn("llama"), 4, 16)[0]
    want = out(small)
    state = small.model.state_dict()
    assert all(type(t) is torch.Tensor for t in state.values())
    torch.save(state, tmp_path/"m.pt")
    for m in other.model.modules():
        if isinstance(m, pt.PackedWeight): m.codes.zero_(); m.scale.zero_()
    other.model.load_state_dict(torch.load(tmp_path/"m.pt", weights_only=True))
    assert torch.equal(out(other), want)
    moving = pt.dynamic(drawn("bert"))[0].model.state_dict()
    assert all(type(t) is torch.Tensor for t in moving.values())


def test_a_cast_changes_the_arithmetic_and_not_the_scales():
    small, _ = pt.weight_only(drawn("llama"), 8)
    scale = small.model.lm_head.packed.scale.clone()
    low = compression.copied(small)
    low.model.to(torch.bfloat16)
    assert torch.equal(low.model.lm_head.packed.scale, scale) and out(low).dtype == torch.bfloat16
    assert (out(low).float() - out(small)).norm() / out(small).norm() < .05


@pytest.mark.parametrize("change", [lambda m: pt.weight_only(m, 4), pt.dynamic, lambda m: pt.static(m, batches(m)), pt.library_dynamic])
def test_what_is_quantized_is_not_quantized_again(change):
    m = drawn("bert")
    for done in (pt.weight_only(m)[0], pt.dynamic(m)[0], pt.library_dynamic(m), pt.torchao_quantized(m, pt.torchao_int8())):
        with pytest.raises(UsageError, match="quantized already"): change(done)


def test_weights_that_are_not_numbers():
    m = drawn("llama")
    with torch.no_grad(): m.model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    for f in (pt.weight_only, pt.dynamic):
        with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj.*\[2, 3\]"): f(m)
    with pytest.raises(UsageError, match="NaN"): pt.static(m, batches(m))


@pytest.mark.parametrize("bits", [0, -1, 9, 16])
def test_bits_out_of_range(bits):
    with pytest.raises(UsageError, match="bits"): pt.weight_only(drawn("llama"), bits)


def test_fused_experts_are_refused_or_left():
    config = MixtralConfig(**_llama, num_local_experts=2, num_experts_per_tok=1)
    m = drawn("mixtral", config)
    if not pt.fused(m.model): pytest.skip("this release keeps experts as matrices")
    for f in (pt.weight_only, pt.dynamic, lambda m, **k: pt.static(m, batches(m), **k)):
        with pytest.raises(UsageError, match="partial=True"): f(m)
    small, changes = pt.weight_only(m, 8, partial=True)
    assert any(c.module == "fused tensors" for c in changes.skipped) and off(small, m) < .3
    assert changes.before_bytes == sum(p.nbytes for p in m.model.parameters())


@pytest.mark.parametrize("data, match", [([], "nothing to calibrate"), ([{}], "input_ids"),
    ([dict(input_ids=torch.zeros(0, 4, dtype=torch.long))], "not empty"), ([dict(input_ids=torch.zeros(4, dtype=torch.long))], "B, T"), (["text"], "dict")])
def test_calibration_that_is_none(data, match):
    with pytest.raises(UsageError, match=match): pt.static(drawn("llama"), data)
    with pytest.raises(UsageError, match="share"): pt.static(drawn("llama"), batches(None), share=0.)


def test_padding_does_not_widen_a_range():
    m = drawn("bert")
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    padded = pt.input_ranges(m, [dict(input_ids=IDS, attention_mask=mask)])
    short = pt.input_ranges(m, [dict(input_ids=IDS[:, :8])])
    name = "encoder.layer.0.attention.self.query"
    assert padded[name] == pytest.approx(short[name], rel=1e-5)


def test_a_share_narrows_the_ranges():
    m = drawn("llama")
    whole, most = pt.input_ranges(m, batches(m)), pt.input_ranges(m, batches(m), share=.9)
    assert all(most[n][0] >= whole[n][0] and most[n][1] <= whole[n][1] for n in whole)


def test_integer_layer_is_exact_integer_arithmetic():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 40, generator=g), torch.randn(3, 5, 40, generator=g)
    layer = pt.IntegerLinear(quantize(w))
    want = nn.functional.linear(quantize(x.reshape(-1, 40)).dequantize(), quantize(w).dequantize()).reshape(3, 5, 24)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    fixed = pt.IntegerLinear(quantize(w), None, .05, 100)
    codes = (x / .05 + 100).round().clamp(0, 255)
    torch.testing.assert_close(fixed(x), nn.functional.linear((codes - 100) * .05, quantize(w).dequantize()), rtol=1e-4, atol=1e-4)
    assert fixed(torch.zeros(0, 40)).shape == (0, 24)
    with pytest.raises(UsageError, match="int8"): pt.IntegerLinear(quantize(w, 4))


def test_the_repaired_library_converts_conv1d():
    m = drawn("gpt2")
    assert len(pt.converted(pt.recipe_quantize(m.model))) == 1
    whole = pt.library_dynamic(m)
    assert len(pt.converted(whole.model)) == len(compression.matrices(m)) and off(whole, m) < .1


@pytest.mark.parametrize("some", ["all of it", "head and embedding in floats"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_files_read_back_exactly(name, some, tmp_path):
    m = pt.weight_only(drawn(name), 8, **({} if some == "all of it" else dict(head=0, embeddings=0)))[0]
    back = pt.load_packed(pt.save_packed(m, tmp_path))
    assert torch.equal(out(m), out(back)) and models.bytes_in_memory(back) == models.bytes_in_memory(m)
    assert (back.name, back.weights, back.task) == (m.name, m.weights, m.task)


def test_packed_files_refuse(tmp_path):
    m = drawn("llama")
    with pytest.raises(UsageError, match="no packed weights"): pt.save_packed(m, tmp_path)
    with pytest.raises(UsageError, match="no model.safetensors"): pt.load_packed(tmp_path)
    models.save(m, tmp_path)
    with pytest.raises(UsageError, match="no packed weights"): pt.load_packed(tmp_path)
    pt.save_packed(pt.weight_only(m, 8)[0], tmp_path)
    text = (tmp_path/"config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (tmp_path/"config.json").write_text(text)
    with pytest.raises(UsageError, match="does not fit"): pt.load_packed(tmp_path)
    (tmp_path/"model.safetensors").write_bytes((tmp_path/"model.safetensors").read_bytes()[:5000])
    with pytest.raises(Damaged, match="cannot be read"): pt.load_packed(tmp_path)
