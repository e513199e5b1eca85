"""The quantized cache: every geometry, every byte, and what is refused."""
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from transformers import LlamaConfig, Qwen2Config
from transformers.cache_utils import DynamicCache

from llmlab.kit import models
from llmlab.kit.geometry import TASKS
from llmlab.kit.models import Loaded
from llmlab.kit.settings import UsageError
from llmlab.quantization import kv_cache as kv

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    vocab_size=300, max_position_embeddings=128)


def drawn(config, task="causal-lm"):
    "A tiny model with random weights."
    import transformers
    tok = models.random_tokenizer(config)
    torch.manual_seed(0)
    return Loaded(getattr(transformers, TASKS[task]).from_config(config).eval(), tok, f"random:{config.model_type}", "random", task)


@pytest.fixture(scope="module")
def llama(): return drawn(LlamaConfig(**SHAPE))


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.sampled_from(kv.WAYS), st.integers(1, 3), st.integers(0, 2**31 - 1), st.floats(-3, 3))
def test_a_block_errs_by_half_a_step(bits, by, groups, seed, shift):
    x = torch.randn(2, 3, 8 * groups, 16, generator=torch.Generator().manual_seed(seed)) + shift
    x[0, 0] = shift  # constant
    b = kv.block(x, bits, by, group_size=8)
    off = (b.dequantize() - x).unflatten(2, (-1, 8)).abs()
    spare = x.abs().max() * 2e-3  # lowest value and scale are float16
    assert b.dequantize().shape == x.shape and (off <= b.scale.float() * .5 + spare).all()


@pytest.mark.parametrize("keys", kv.WAYS)
@pytest.mark.parametrize("bits,window,group", [(8, 0, 8), (4, 8, 8), (2, 5, 16), (3, 32, 32)])
def test_bytes_are_those_predicted_however_tokens_come(llama, keys, bits, window, group):
    g = models.geometry(llama)
    for pieces in ([40], [1] * 40, [17, 1, 1, 20, 1]):
        cache = kv.quantized_cache(llama, bits, keys, group_size=group, window=window)
        for n in pieces:
            for layer in cache.layers: layer.update(torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8))
        assert cache.get_seq_length() == 40
        assert kv.counted_bytes(cache) == kv.cache_bytes(g, 40, bits, keys, group_size=group, window=window)


def test_what_update_gives_is_all_there_is(llama):
    layer, x = kv.QuantizedLayer(8, window=4, group_size=4), torch.randn(1, 2, 30, 8)
    for i in range(30):
        k, v = layer.update(x[:, :, i:i + 1], x[:, :, i:i + 1])
        assert k.shape == v.shape == (1, 2, i + 1, 8)
        torch.testing.assert_close(k[:, :, -4:], x[:, :, max(0, i - 3):i + 1], atol=0, rtol=0)  # the newest are exact
        torch.testing.assert_close(k, x[:, :, :i + 1], atol=.05, rtol=0)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0


@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE)])
def test_eight_bits_generate_the_same(config):
    m = drawn(config)
    x = torch.randint(4, 300, (2, 50), generator=torch.Generator().manual_seed(0))
    how = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=300)
    plain = m.model.generate(x, **how)
    wide = m.model.generate(x, past_key_values=kv.quantized_cache(m, 2, window=128), **how)
    assert torch.equal(plain, wide)
    cache, exact = kv.quantized_cache(m, 8, window=4), DynamicCache(config=m.model.config)
    logits = [m.model(x[:, :-1], past_key_values=c).logits[:, -1] + m.model(x[:, -1:], past_key_values=c).logits[:, -1] for c in (cache, exact)]
    torch.testing.assert_close(logits[0], logits[1], atol=.01, rtol=0)


def test_no_beams_and_no_nonsense(llama):
    cache = kv.quantized_cache(llama)
    cache.layers[0].update(torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8))
    for call in (lambda o: o.crop(-1), lambda o: o.batch_repeat_interleave(2), lambda o: o.reorder_cache(torch.tensor([0]))):
        with pytest.raises(UsageError, match="not taken apart"): call(cache.layers[0])
    for how, match in ((dict(bits=9), "bits"), (dict(keys="head"), "way of sharing"), (dict(group_size=0), "group_size"), (dict(window=-1), "window")):
        with pytest.raises(UsageError, match=match): kv.quantized_cache(llama, **how)
    with pytest.raises(UsageError, match="multiple"): kv.block(torch.ones(1, 1, 5, 8), group_size=4)
