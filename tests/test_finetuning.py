"""Full fine-tuning and LoRA: what a reader need not see."""
import math

import pytest
import torch
from hypothesis import given, settings as quick, strategies as st

from llmlab.finetuning import full, lora
from llmlab.kit import compression, geometry, measure, models, training
from llmlab.kit.settings import Unavailable, UsageError
from test_compression import TINY, drawn


@pytest.fixture(scope="module")
def llama(): return models.load("random:llama-tiny", task="causal-lm")


@pytest.fixture(scope="module")
def ids(): return torch.arange(4, 36).view(2, 16)


def logits(loaded, ids):
    with torch.inference_mode(): return loaded.model(input_ids=ids).logits


# full

@quick(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=80), st.integers(1, 40))
def test_every_text_is_in_one_batch_and_fits_it(lengths, size):
    for strategy in full.STRATEGIES:
        batches = full.batches_of(lengths, strategy, size)
        assert sorted(i for b, _ in batches for i in b) == list(range(len(lengths)))
        assert all(lengths[i] <= width for b, width in batches for i in b) and all(len(b) <= size for b, _ in batches)
    n = {k: full.multiplied(lengths, k, size) for k in full.STRATEGIES}
    assert sum(lengths) <= min(n["similar lengths"], n["longest"]) and max(n["similar lengths"], n["longest"]) <= n["to 128"] <= n["to 512"]
    if len(lengths) % size == 0: assert n["similar lengths"] <= n["longest"]  # else the batch that is not full may be the widest by luck


def test_an_unknown_strategy_is_named():
    with pytest.raises(UsageError, match="similar lengths"): full.batches_of([1], "similar length")


def test_the_rate_is_that_of_the_library():
    from transformers import get_linear_schedule_with_warmup
    for steps, warmup in ((10, .2), (7, 0.), (1, .5), (100, .1)):
        w = torch.nn.Parameter(torch.zeros(1))
        adam = torch.optim.SGD([w], lr=1.)
        schedule = get_linear_schedule_with_warmup(adam, round(warmup * steps), steps)
        theirs = []
        for _ in range(steps): theirs.append(adam.param_groups[0]["lr"]); adam.step(); schedule.step()
        assert theirs == pytest.approx([full.linear_rate(i, steps, warmup) for i in range(steps)])


def test_a_training_that_ends_too_soon_cannot_be_killed(tmp_path):
    with pytest.raises(Unavailable, match="by itself: .*no such model"): full.killed_training(tmp_path, after=2, name="no such model")


def test_events_need_a_training(tmp_path):
    with pytest.raises(UsageError, match="tensorboard=True"): full.events(tmp_path)


# LoRA

@pytest.mark.parametrize("name", TINY)
def test_lora_begins_at_the_base_and_merges_into_it(name):
    m = drawn(TINY[name]())
    x = torch.arange(4, 20).view(1, 16)
    with_lora, changes = lora.add_lora(m, r=2)
    assert torch.equal(logits(with_lora, x), logits(m, x)) and not changes.skipped
    for n, p in with_lora.model.named_parameters(): assert p.requires_grad == n.endswith((".A", ".B"))
    with torch.no_grad():
        for o in with_lora.model.modules():
            if isinstance(o, lora.LoraLinear): o.B.normal_(0, .3, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(logits(with_lora, x), logits(m, x))
    merged = lora.merge_lora(with_lora)
    torch.testing.assert_close(logits(merged, x), logits(with_lora, x), rtol=1e-4, atol=1e-4)
    assert [n for n, _ in merged.model.named_parameters()] == [n for n, _ in m.model.named_parameters()]
    back = lora.unmerge_lora(merged, with_lora)
    for a, b in zip(m.model.parameters(), back.model.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_counted_parameters_are_trained(llama):
    for r in (1, 3, 16):
        made, _ = lora.add_lora(llama, r=r)
        trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
        assert trained == lora.lora_parameters([p.shape for p in compression.matrices(llama, head=False)], r)
    assert all(p.requires_grad for p in llama.model.parameters()), "the original is frozen"


@pytest.mark.parametrize("given_, message", [(dict(r=0), "at least 1"), (dict(targets=["q_prj"]), "q_proj")])
def test_bad_input_is_refused(llama, given_, message):
    with pytest.raises(UsageError, match=message): lora.add_lora(llama, **given_)


def test_twice_is_refused_and_so_is_merging_nothing(llama):
    once, _ = lora.add_lora(llama)
    with pytest.raises(UsageError, match="merge_lora"): lora.add_lora(once)
    with pytest.raises(UsageError, match="no LoRA"): lora.merge_lora(llama)


def test_an_adapter_knows_its_base(llama, tmp_path, ids):
    made, _ = lora.add_lora(llama, r=4, targets=["q_proj", "down_proj"])
    with torch.no_grad():
        for n, p in made.model.named_parameters():
            if p.requires_grad: p.normal_(0, .1, generator=torch.Generator().manual_seed(len(n)))
    folder = lora.save_adapter(made, tmp_path/"adapter")
    torch.testing.assert_close(logits(lora.load_adapter(llama, folder), ids), logits(made, ids), rtol=1e-5, atol=1e-5)
    assert models.size_on_disk(folder) < 4 * made.n_parameters / 10
    other = models.load("random:llama-tiny", task="causal-lm", seed=1)
    with pytest.raises(UsageError, match="was trained on random:llama-tiny"): lora.load_adapter(other, folder)
    (folder/"adapter.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no adapter"): lora.load_adapter(llama, folder)


def test_a_classifier_s_head_is_trained_and_saved(tmp_path):
    m = models.load("random:bert-tiny", task="classifier", n_labels=3)
    made, _ = lora.add_lora(m, r=2)
    named = dict(made.model.named_parameters())
    assert named["classifier.weight"].requires_grad and not named["bert.embeddings.word_embeddings.weight"].requires_grad
    with torch.no_grad(): named["classifier.weight"].fill_(.5)
    again = lora.load_adapter(models.load("random:bert-tiny", task="classifier", n_labels=3), lora.save_adapter(made, tmp_path))
    assert (dict(again.model.named_parameters())["classifier.weight"] == .5).all()


def test_an_unknown_variant_is_named(llama):
    with pytest.raises(UsageError, match="dora"): lora._variant(llama, "doora", 8, 16., "all-linear")


def test_qlora_says_what_is_missing(llama):
    if torch.cuda.is_available(): pytest.skip("there is a GPU here")
    with pytest.raises(Unavailable, match="add_lora"): lora.qlora("random:llama-tiny")


@pytest.mark.parametrize("name", ["qwen-tiny", "llama-tiny", "gpt2-tiny"])
def test_bytes_of_nf4_counted_layer_by_layer(name):
    g = models.geometry(f"random:{name}", "causal-lm")
    model, codes, scales, rest = geometry.meta_model(geometry.random_config(name), "causal-lm"), 0, 0, 0
    for n, m in model.named_modules():
        linear = isinstance(m, torch.nn.Linear) and n != "lm_head" or type(m).__name__ == "Conv1D"
        for k, p in m.named_parameters(recurse=False):
            if linear and k == "weight":
                blocks = p.numel() / 64
                codes, scales = codes + p.numel() / 2, scales + blocks + 4 * blocks / 256
            elif n != "lm_head": rest += 2 * p.numel()  # the head of all three is the embedding
    assert lora.nf4_bytes(g) == pytest.approx(codes + scales + rest)
    assert lora.nf4_bytes(g, "float32") == pytest.approx(codes + scales + 2 * rest)
    assert lora.nf4_bits(double=False) == 4.5 and 4.12 < lora.nf4_bits() < 4.13


def test_what_lora_s_pass_should_cost():
    g = models.geometry("random:llama-tiny", "causal-lm")
    here = measure.ceilings("cpu", quick=True)
    full, thin, thick = (lora.pass_forecast(g, 4, 64, here, r) for r in (0, 1, 64))
    assert thin.arithmetic_seconds < full.arithmetic_seconds and thin.seconds < thick.seconds and full.floor_seconds <= full.seconds
    assert 1 < full.arithmetic_seconds / thin.arithmetic_seconds < 1.5  # attention's products stay


def test_memory_of_steps_is_what_is_trained_and_what_is_kept(llama):
    batch = dict(input_ids=torch.arange(4, 68).view(2, 32) % 200, labels=torch.arange(4, 68).view(2, 32) % 200, use_cache=False)
    whole, some = training.step_peak(compression.copied(llama), batch), training.step_peak(lora.add_lora(llama, r=2)[0], batch)
    weights = models.bytes_in_memory(llama)
    assert whole >= 4 * weights and weights < some < whole  # weights, gradients and two averages


def test_scale_is_alpha_over_rank():
    base = torch.nn.Linear(5, 3, bias=False)
    o = lora.LoraLinear(base, (3, 5), r=2, alpha=6.)
    with torch.no_grad(): o.B.fill_(1.)
    x = torch.randn(4, 5)
    torch.testing.assert_close(o(x) - base(x), x @ (o.A.sum(0)[None] * 3).expand(3, 5).t())
    assert math.isclose(o.scale, 3)
