"""What a model will need, foreseen from its configuration, against the bytes of the tensors that were alive."""

import warnings
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmlab.kit import models
from llmlab.kit.geometry import TASKS, Allocations, geometry_of, memory_needed, random_config
from llmlab.kit.settings import UsageError

geometry = cache(geometry_of)


def real(name, task, dtype="float32"):
    import transformers
    torch.manual_seed(0)
    return getattr(transformers, TASKS[task]).from_config(random_config(name), dtype=getattr(torch, dtype))


def trained(name, task, batch, tokens, training, optimizer="adamw", dtype="float32", lora_rank=8, dropout=True, foreach=False):
    "Bytes at the peak of two training steps."
    m = real(name, task, dtype).train(dropout)
    ids = torch.randint(0, m.config.vocab_size, (batch, tokens))
    if training == "lora":
        from peft import LoraConfig, get_peft_model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            m = get_peft_model(m, LoraConfig(r=lora_rank, target_modules="all-linear"))
    learns = [p for p in m.parameters() if p.requires_grad]
    if optimizer == "adamw": step = torch.optim.AdamW(learns, foreach=foreach)
    else: step = torch.optim.SGD(learns, lr=1e-3, momentum=.9 * (optimizer == "momentum"), foreach=foreach)
    labels = ids if task == "causal-lm" else torch.zeros(batch, dtype=torch.long)
    with Allocations() as seen:
        for _ in range(2):
            m(input_ids=ids, labels=labels).loss.backward()
            step.step(); step.zero_grad()
    return models.bytes_in_memory(m) + seen.peak


CAUSAL, CLASSIFIER = "causal-lm", "classifier"


@pytest.mark.parametrize("name,task,batch,tokens,training,more", [
    ("llama-tiny", CAUSAL, 4, 64, "lora", {}),                                # frozen norms keep less
    ("llama-tiny", CAUSAL, 4, 64, "lora", dict(dtype="bfloat16")),            # adapters in 32 bits, with copies of their inputs
    ("llama-tiny", CAUSAL, 4, 64, "lora", dict(lora_rank=64)),
    ("llama-tiny", CAUSAL, 4, 64, "full", dict(dtype="bfloat16")),
    ("llama-tiny", CAUSAL, 1, 16, "full", dict(optimizer="sgd")),             # the gradient of the tied embedding is there three times
    ("qwen-tiny", CAUSAL, 4, 48, "lora", {}),
    ("qwen-tiny", CAUSAL, 4, 48, "full", dict(optimizer="momentum")),
    ("gpt2-tiny", CAUSAL, 4, 64, "lora", {}),
    ("gpt2-tiny", CAUSAL, 4, 64, "full", dict(dropout=False)),
    ("bert-tiny", CLASSIFIER, 8, 96, "full", {}),
    ("bert-tiny", CLASSIFIER, 8, 96, "full", dict(optimizer="sgd")),          # without a scratch copy of the embedding
    ("bert-tiny", CLASSIFIER, 8, 96, "lora", dict(dropout=False)),            # without masks and scores
    ("bert-tiny", CLASSIFIER, 8, 96, "lora", dict(dtype="bfloat16")),
])
def test_training_needs_what_was_foreseen(name, task, batch, tokens, training, more):
    foreseen = memory_needed(geometry(name, task), batch, tokens, training=training, **more).total_bytes
    assert trained(name, task, batch, tokens, training, **more) == pytest.approx(foreseen, rel=.05)


@pytest.mark.parametrize("name,task", [("llama-tiny", CAUSAL), ("bert-tiny", CLASSIFIER)])
def test_an_optimizer_that_takes_all_tensors_at_once_needs_a_copy_of_them(name, task):
    "As it is on a GPU, where `cuda=True` foresees it; the same code can be asked for on a CPU."
    foreseen = memory_needed(geometry(name, task), 1, 8, training="full", cuda=True).total_bytes
    assert trained(name, task, 1, 8, "full", foreach=True) == pytest.approx(foreseen, rel=.01)


@pytest.mark.parametrize("name", ["llama-tiny", "qwen-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("batch,prompt,new", [(1, 16, 8), (8, 8, 24), (4, 96, 2)])
def test_generating_needs_what_was_foreseen(name, batch, prompt, new):
    m, foreseen = real(name, CAUSAL).eval(), memory_needed(geometry(name, CAUSAL), batch, prompt, new_tokens=new)
    ids = torch.randint(4, m.config.vocab_size, (batch, prompt))
    m.generation_config.eos_token_id = None  # to the last token, and without the copies of logits that a minimum length makes
    with torch.inference_mode(), Allocations() as seen:
        out = m.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0)
    assert out.shape == (batch, prompt + new)
    assert seen.peak == pytest.approx(foreseen.total_bytes - foreseen.parts["weights"], rel=.1)  # weights apart, which would hide an error


@pytest.mark.parametrize("name,task", [("llama-tiny", CAUSAL), ("gpt2-tiny", CAUSAL), ("bert-tiny", CLASSIFIER)])
def test_adapters_are_counted_as_the_library_adds_them(name, task):
    from peft import LoraConfig, get_peft_model
    m, seen = real(name, task), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = get_peft_model(m, LoraConfig(r=4, target_modules="all-linear"))
    inside = [(n, o) for n, o in m.named_modules() if n.endswith("lora_A.default") and not {"pooler", "classifier"} & set(n.split("."))]
    for _, o in inside: seen.append(o.in_features)
    g = geometry(name, task)
    assert (len(inside), sum(seen)) == (g.lora_layers, g.lora_inputs)


@examples(max_examples=30, deadline=None)
@given(st.sampled_from(["llama-tiny", "gpt2-tiny", "qwen-0.5b"]), st.integers(1, 32), st.integers(1, 256), st.integers(1, 256))
def test_generating_more_needs_more_and_logits_of_every_position_most(name, batch, prompt, new):
    g = geometry(name, CAUSAL)
    need = lambda b, p, n: memory_needed(g, b, p, new_tokens=n).total_bytes
    assert need(batch, prompt, new) <= min(need(batch + 1, prompt, new), need(batch, prompt + 1, new), need(batch, prompt, new + 1))
    assert memory_needed(g, batch, prompt, new_tokens=1).moments["in the prefill"] <= memory_needed(g, batch, prompt).total_bytes


def test_dropout_only_adds():
    for name, task in (("bert-tiny", CLASSIFIER), ("gpt2-tiny", CAUSAL), ("llama-tiny", CAUSAL)):
        on, off = (memory_needed(geometry(name, task), 8, 128, training="lora", dropout=o).total_bytes for o in (True, False))
        assert on > off if name != "llama-tiny" else on == off


@pytest.mark.parametrize("change", [dict(new_tokens=-1), dict(new_tokens=4, training="full"), dict(lora_rank=0)])
def test_workloads_that_make_no_sense_are_refused(change):
    with pytest.raises(UsageError): memory_needed(geometry("llama-tiny", CAUSAL), 1, 8, **change)
    with pytest.raises(UsageError, match="causal"): memory_needed(geometry("bert-tiny", CLASSIFIER), 1, 8, new_tokens=4)
