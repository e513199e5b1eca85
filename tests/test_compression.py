"""What every compression chapter stands on: places, changes, calibration, yardsticks."""
import pytest
import torch
from transformers import GPT2Config, OPTConfig, Qwen3Config

from llmlab.kit import compression as c
from llmlab.kit import models, yardsticks
from llmlab.kit.geometry import TASKS
from llmlab.kit.models import Loaded
from llmlab.kit.settings import UsageError


def drawn(config, task="causal-lm"):
    "A tiny model of any architecture, with random weights."
    import transformers
    tok = models.random_tokenizer(config)
    torch.manual_seed(0)
    return Loaded(getattr(transformers, TASKS[task]).from_config(config).eval(), tok, f"random:{config.model_type}", "random", task)


TINY = dict(
    gpt2=lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=259, n_positions=64),
    opt=lambda: OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, vocab_size=259,
        max_position_embeddings=64, word_embed_proj_dim=16),
    qwen3=lambda: Qwen3Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=32,
        vocab_size=259, max_position_embeddings=64),
)


@pytest.fixture(scope="module")
def llama(): return models.load("random:llama-tiny", task="causal-lm")


@pytest.mark.parametrize("name", TINY)
def test_every_matrix_is_a_place(name):
    m = drawn(TINY[name]())
    places = c.matrices(m, embeddings=True)
    counted = {id(p.module.weight): p.module.weight.numel() for p in places}
    assert sum(counted.values()) == sum({id(q): q.numel() for q in m.model.parameters() if q.ndim == 2}.values())
    for p in c.matrices(m): assert tuple(p.weight.shape) == p.shape


def test_conv1d_is_turned():
    m = drawn(TINY["gpt2"]())
    place = next(p for p in c.matrices(m) if p.name.endswith("c_attn"))
    assert place.turned and place.shape == (48, 16)
    c.set_weight(place, torch.arange(48. * 16).view(48, 16))
    assert place.module.weight[0, 1] == 16


def test_tied_head_is_known(llama):
    lm = models.load("embedded:lm", task="causal-lm")
    head = c.matrices(lm)[-1]
    assert head.part == "head" and head.tied == ("model.embed_tokens",)
    copy = c.copied(lm)
    assert copy.model.lm_head.weight is copy.model.get_input_embeddings().weight
    assert copy.model.lm_head.weight is not lm.model.lm_head.weight


def test_set_weight_refuses_another_shape(llama):
    with pytest.raises(UsageError, match="new weight is"): c.set_weight(c.matrices(c.copied(llama))[0], torch.zeros(2, 2))


def test_no_matrix_is_said():
    with pytest.raises(UsageError, match="compressed already"): c.matrices(torch.nn.Sequential(torch.nn.ReLU()))


def test_changes_add_up():
    found = c.Changes([c.Change("a", "mlp", "int8", 8, 2), c.Change("b", "mlp", "int8", 8, 2), c.Change("c", "head", "", 4, 4, "asked to stay")])
    assert (found.before_bytes, found.after_bytes, len(found.changed), len(found.skipped)) == (20, 8, 2, 1)
    assert "2 modules" in str(found.by_part()) and "skipped: asked to stay" in str(found)


def test_statistics_leave_padding_out():
    e = models.load("random:bert-tiny" if "random:bert-tiny" in models.names() else "embedded:minilm")
    texts = ["a", "a much longer text that makes the other one be padded", "b c"]
    together = c.input_statistics(e, c.calibration(e, texts, n=3, batch_size=3), hessian=True)
    alone = c.input_statistics(e, c.calibration(e, texts, n=3, batch_size=1), hessian=True)
    for name, o in together.items():
        assert o.n == alone[name].n or o.n < alone[name].n + 3  # the pooler sees one vector a text
        torch.testing.assert_close(o.square_sum, alone[name].square_sum, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(o.hessian.diag(), o.square_sum, rtol=1e-3, atol=1e-3)


def test_statistics_are_those_of_the_input(llama):
    batches = [dict(input_ids=torch.randint(4, 200, (2, 9)))]
    place = c.matrices(llama)[0]
    seen = []
    h = place.module.register_forward_pre_hook(lambda _, a: seen.append(a[0].detach().reshape(-1, a[0].shape[-1])) or None)
    found = c.input_statistics(llama, batches)[place.name]
    h.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(found.square_sum, x.square().sum(0))
    torch.testing.assert_close(found.absmax, x.abs().amax(0))
    assert found.n == 18 and not place.module._forward_pre_hooks


@pytest.mark.parametrize("batches, message", [([], "empty"), ([torch.ones(2, 2)], "dict with input_ids")])
def test_bad_calibration_is_refused(llama, batches, message):
    with pytest.raises(UsageError, match=message): c.input_statistics(llama, batches)
    assert not any(m._forward_pre_hooks for m in llama.model.modules())


def test_each_input_is_shown_as_it_flows(llama):
    place, seen = c.matrices(llama, head=False)[0], []
    ids = torch.randint(5, 100, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    c.each_input(llama, [dict(input_ids=ids, attention_mask=mask)] * 2, [place], lambda p, x: seen.append((p.name, tuple(x.shape))))
    assert seen == [(place.name, (10, place.shape[1]))] * 2
    with pytest.raises(UsageError, match="not empty"): c.each_input(llama, [dict(input_ids=ids[0])], [place], print)


def test_nan_is_noticed(llama):
    broken = c.copied(llama)
    with torch.no_grad(): broken.model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(UsageError, match="NaN or infinity flowed"): c.input_statistics(broken, [dict(input_ids=torch.full((1, 4), 5))])


@pytest.mark.parametrize("texts, n, message", [([], 4, "empty"), (["short"], 4, "fewer than one window|fill"), (["x"], 0, "out of range")])
def test_calibration_needs_text(llama, texts, n, message):
    with pytest.raises(UsageError, match=message): c.calibration(llama, texts, n=n)


def test_calibration_is_the_seed_s(llama):
    texts = [f"{i} is a number, and this is a sentence about it. " * 40 for i in range(80)]
    one, again, other = (c.calibration(llama, texts, n=4, length=32, seed=k)[0]["input_ids"] for k in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_classified_needs_a_classifier(llama):
    with pytest.raises(UsageError, match="task='classifier'"): yardsticks.predictions(llama, ["x"])


def test_predictions_do_not_depend_on_the_batch():
    m = models.load("embedded:minilm", task="classifier", n_labels=3)
    texts = ["one", "a somewhat longer text than that", "", "three words here"]
    torch.testing.assert_close(yardsticks.predictions(m, texts, batch_size=4), yardsticks.predictions(m, texts, batch_size=1), rtol=1e-4, atol=1e-4)


def test_calls_have_their_length(llama):
    assert yardsticks.decode_call(llama, 5, 3)().shape == (1, 8)
    assert yardsticks.prefill_call(llama, 7, 2)().shape[0] == 2


def test_codes_of_every_library_are_known():
    import warnings
    from llmlab.quantization.post_training import dynamic, weight_only
    plain = drawn(TINY["qwen3"]())
    assert c.already_quantized(plain) == c.already_quantized(plain.model) == ""
    for changed in (weight_only(plain, 8)[0], weight_only(plain, 4, group_size=8)[0], dynamic(plain)[0]): assert c.already_quantized(changed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert c.already_quantized(torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)), {torch.nn.Linear}))
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(linear := torch.nn.Sequential(torch.nn.Linear(32, 32)), Int8WeightOnlyConfig())
    assert c.already_quantized(linear)
    configured = c.copied(plain)
    configured.model.config.quantization_config = dict(quant_method="awq")
    assert "configuration" in c.already_quantized(configured)
