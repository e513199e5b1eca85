"""Files that engines read, and the engines: every Llama-like geometry, and what is refused."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from llmlab.kit import models
from llmlab.kit.geometry import TASKS
from llmlab.kit.models import Loaded
from llmlab.kit.settings import UsageError
from llmlab.quantization import engine_files as files
from llmlab.quantization import engines

SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    vocab_size=320, max_position_embeddings=128)
TINY = dict(llama=lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True), untied=lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    biased=lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    qwen2=lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    mistral=lambda: MistralConfig(**SHAPE, sliding_window=16), wide=lambda: LlamaConfig(**SHAPE, head_dim=32))
IDS = [3, 17, 200, 5, 42, 7, 301, 11, 90, 33, 8, 64]


def drawn(config, task="causal-lm"):
    "A tiny model with random weights, biases too."
    import transformers
    tok = models.random_tokenizer(config)
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task]).from_config(config).eval()
    for n, p in model.named_parameters():
        if n.endswith("bias"): torch.nn.init.normal_(p, std=.1)
    return Loaded(model, tok, f"random:{config.model_type}", "random", task)


@pytest.fixture(scope="module")
def llama(): return drawn(TINY["llama"]())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bits,group", [(32, 32), (8, 32), (8, 0), (4, 32)])
def test_graph_is_the_model(name, bits, group, tmp_path):
    m = drawn(TINY[name]())
    engine = engines.onnx_engine(m, bits, group, folder=tmp_path)
    theirs = files.torch_logits(m if bits == 32 else files.rounded(m, bits, group), IDS)
    if bits == 32: np.testing.assert_allclose(engine.prefill(IDS), theirs, atol=1e-4)
    else: assert files.spread_error(engine.prefill(IDS), theirs) < .15
    if bits == 32: assert engine.decode(IDS, 20) == engines.eager(m).decode(IDS, 20)  # beyond Mistral's window
    assert isinstance(engine, engines.Engine) and engine.memory_bytes > engine.size_bytes > 0


@pytest.mark.parametrize("name", TINY)
def test_static_cache_is_the_model(name):
    if name == "mistral": pytest.skip("its static step looks at everything: refused by the sliding window, below")
    m = drawn(TINY[name]())
    engine = engines.compiled(m, compiled=False)
    np.testing.assert_allclose(engine.prefill(IDS), files.torch_logits(m, IDS), atol=1e-4)
    assert engine.decode(IDS, 16) == engines.eager(m).decode(IDS, 16)
    assert engine.decode(IDS[:3], 4) == engines.eager(m).decode(IDS[:3], 4), "a second prompt begins anew"


def test_static_refuses_a_window():
    with pytest.raises(UsageError, match="sliding window"): engines.compiled(drawn(TINY["mistral"]()), compiled=False)


@pytest.mark.parametrize("name", ["llama", "qwen2", "untied"])
@pytest.mark.parametrize("kind", files.KINDS)
def test_gguf_holds_the_model(name, kind, tmp_path):
    m = drawn(TINY[name]())
    back = files.read_gguf(files.write_gguf(m, tmp_path/"m.gguf", kind))
    for n, t, heads in files._gguf_tensors(m, m.model.config):
        w = t.detach().numpy()
        if heads and name != "qwen2": w = files.rope_pairs(w, heads)
        tolerance = dict(F32=0, F16=1e-3, Q8_0=.01, Q4_0=.13)[kind] if w.ndim == 2 else 0
        np.testing.assert_allclose(back[n], w, atol=tolerance * np.abs(w).max())
    assert ("output.weight" in back) == (name == "untied")


def test_gguf_tokens_and_special_ones(tmp_path):
    import gguf
    m = models.load("embedded:lm-small", task="causal-lm")
    fields = gguf.GGUFReader(files.write_gguf(m, tmp_path/"m.gguf")).fields
    tokens = [bytes(fields["tokenizer.ggml.tokens"].parts[i]).decode() for i in fields["tokenizer.ggml.tokens"].data]
    assert tokens == m.tokenizer.convert_ids_to_tokens(range(m.model.config.vocab_size))
    assert bytes(fields["tokenizer.ggml.pre"].parts[-1]).decode() == "smollm"
    assert int(fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == m.tokenizer.eos_token_id
    merges = json.loads(m.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(fields["tokenizer.ggml.merges"].data) == len(merges)


def test_gguf_refuses_an_unknown_tokenizer(tmp_path, llama):
    from tokenizers import pre_tokenizers
    m = drawn(TINY["llama"]())
    m.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="Whitespace"): files.write_gguf(m, tmp_path/"m.gguf")
    with pytest.raises(UsageError, match="Q5_K"): files.write_gguf(llama, tmp_path/"m.gguf", "Q5_K")


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([8, 4]), st.integers(0, 2**32 - 1))
def test_groups_are_those_of_ggml(rows, groups, bits, seed):
    import gguf
    from gguf.quants import dequantize, quantize
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(rows, 32 * groups)) * 10. ** rng.integers(-3, 3)).astype(np.float32)
    w[0, :32] = 0
    to = gguf.GGMLQuantizationType.Q8_0 if bits == 8 else gguf.GGMLQuantizationType.Q4_0
    ours, theirs = files.ungrouped(*files.grouped(w, bits), bits), dequantize(quantize(w, to), to)
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(w).max())
    step = np.abs(files.grouped(w, bits)[1]).repeat(32, 1)
    assert (np.abs(ours - w) <= step * 1.001 + 1e-30).all()


def test_groups_refuse():
    with pytest.raises(UsageError, match="33"): files.grouped(np.ones((2, 33)), 4)
    with pytest.raises(UsageError, match="NaN"): files.grouped(np.full((2, 32), np.nan), 4)
    with pytest.raises(UsageError, match="number of bits"): files.grouped(np.ones((2, 32)), 3)


def test_files_refuse(tmp_path, llama):
    for how, match in ((dict(bits=2), "number of bits"), (dict(bits=4, group_size=0), "4 bits need groups"),
            (dict(bits=8, group_size=24), "power of two"), (dict(bits=8, group_size=64), "divide")):
        with pytest.raises(UsageError, match=match): files.write_onnx(llama, tmp_path, **how)
    gpt2 = models.load("random:gpt2-tiny", task="causal-lm")
    for write in (files.llama_graph, lambda m: files.write_gguf(m, tmp_path/"x")):
        with pytest.raises(UsageError, match="Llama, Mistral and Qwen2"): write(gpt2)
    with pytest.raises(UsageError, match="BERT"): files.bert_graph(models.load("random:distilbert"))
    m = drawn(LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.)))
    with pytest.raises(UsageError, match="linear"): files.write_gguf(m, tmp_path/"x")


def test_quantized_already_is_refused(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    m = drawn(TINY["llama"]())
    quantize_(m.model, Int8WeightOnlyConfig())
    with pytest.raises(UsageError, match="quantized already"): files.write_onnx(m, tmp_path, 8)


def test_bytes_are_foretold(tmp_path):
    for name in ("llama", "untied"):
        m = drawn(TINY[name]())
        for bits, group in ((32, 32), (8, 0), (4, 32)):
            graph = files.llama_graph(m, bits, group, context=128)
            helpers = ("cos", "sin", "minus one", "width", "last")
            weights = sum(len(w.raw_data) for w in graph.graph.initializer if w.name not in helpers and not w.name.endswith(".shape"))
            assert weights == files.file_bytes(m, bits, group)


def test_encoder_padding_changes_nothing():
    m = models.load("random:bert-tiny")
    texts = ["one", "a rather longer text with some more words in it", "three words here"]
    for bits, tolerance in ((32, 1e-4), (8, .1)):
        e = engines.Encoder(m, bits)
        theirs = models.encode(m, texts)
        torch.testing.assert_close(e.encode(texts), theirs, atol=tolerance, rtol=0)
        torch.testing.assert_close(e.encode(texts, batch_size=1), theirs, atol=tolerance, rtol=0)


def test_engines_refuse_what_does_not_fit(llama):
    for engine in (engines.eager(llama), engines.compiled(llama, compiled=False), engines.onnx_engine(llama)):
        with pytest.raises(UsageError, match="do not fit"): engine.decode(IDS, 500)
        with pytest.raises(UsageError, match="empty"): engine.prefill([])
    with pytest.raises(UsageError, match="gpt2"): engines.compiled(models.load("random:gpt2-tiny", task="causal-lm"), compiled=False)


@pytest.mark.parametrize("build", [engines.torchao_int8, engines.torchao_int4])
def test_torchao_adds_little_to_its_rounding(build, llama):
    engine = build(llama, compiled=False)
    theirs = files.torch_logits(engines.as_multiplied(engine.loaded, llama), IDS)
    assert files.spread_error(engine.prefill(IDS), theirs) < .15
    assert llama.model.lm_head.weight is llama.model.model.embed_tokens.weight and llama.dtype == "float32", "the original stays as it is"


def test_products_are_those_of_the_model(llama):
    torch_ones = [engines.eager(llama), engines.compiled(llama, compiled=False), engines.torchao_int8(llama, compiled=False)]
    for engine in torch_ones + [engines.onnx_engine(llama, *how) for how in ((32,), (8, 0), (4,))]:
        for rows in (1, 8): engine.products(rows)()
        engine.rest().decode(IDS[:1], 3); engine.rest().prefill(IDS)
    assert len(engines.onnx_engine(llama, 4).products(3)()) == 4 * 2 + 1  # fused: four a layer, and the head


def test_missing_ones_are_named(llama, monkeypatch):
    import builtins
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name)) if name == "llama_cpp" else real(name, *a, **k))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    found, missing = engines.available({"a": lambda: engines.llamacpp(llama), "b": lambda: engines.bitsandbytes(llama), "c": lambda: engines.float8(llama),
        "d": lambda: engines.compiled(llama), "e": lambda: engines.eager(llama)})
    assert list(found) == ["e"] and all(what in missing[n] for n, what in dict(a="llmlab[llamacpp]", b="CUDA", c="CUDA", d="compiler").items())


def test_llamacpp_is_the_model():
    pytest.importorskip("llama_cpp")
    for name in ("llama", "qwen2", "biased"):
        m = drawn(TINY[name]())
        engine = engines.llamacpp(m, "F32")
        np.testing.assert_allclose(engine.prefill(IDS), files.torch_logits(m, IDS), atol=5e-3)
        assert engine.decode(IDS, 12) == engines.eager(m).decode(IDS, 12)
    lm = models.load("embedded:lm-small", task="causal-lm")
    text = "def f(x, y=12345):\n    \"The élan of x's arguments.  Two  spaces\""
    assert engines.llamacpp(lm).llama.tokenize(text.encode(), add_bos=False) == lm.tokenizer(text, add_special_tokens=False)["input_ids"]
