"""Rounding in the forward pass: gradients, every architecture, conversion, the packed file, and what is refused."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_better_rounding import CONFIGS, batches_for, drawn, snapshot
from torch.nn.utils import parametrize

from llmlab.kit import compression, training
from llmlab.kit.settings import UsageError
from llmlab.kit.teaching import answering, taught
from llmlab.quantization import better_rounding as br
from llmlab.quantization import qat
from llmlab.quantization.arithmetic import choose_scale


def logits(m, batch):
    with torch.inference_mode(): return m.model(**batch)[0]


def shaken(m, size=.02):
    "As training would leave it: every parameter moved a little, steps included."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in m.model.parameters(): p += size * p.abs().mean() * torch.randn(p.shape, generator=g)
    return m


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 5), st.sampled_from([3, 4, 8]), st.booleans())
def test_gradients_are_those_of_the_detach_trick(seed, bits, group, symmetric):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 10, generator=g), torch.randn(3, 10, generator=g)
    scale, zero = choose_scale(x, bits, symmetric=symmetric, granularity="group", group_size=group, low=-.8, high=.8)
    low, top = (1 - 2**(bits - 1), 2**(bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    spread = lambda t: t.repeat_interleave(group, -1)[:, :10]
    found = []
    for ours in (True, False):
        a, b = x.clone().requires_grad_(), scale.clone().requires_grad_()
        if ours: y = qat.StraightThrough.apply(a, b, zero, bits, group)
        else:
            at, shift = a / spread(b), 0 if symmetric else spread(zero)
            y = ((at + (at.round() - at).detach() + shift).clamp(low, top) - shift) * spread(b)
        (y * weight).sum().backward()
        found.append((y.detach(), a.grad, b.grad))
    for mine, theirs in zip(*found): torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_prepared_and_converted(name, learn):
    m, before, batch = drawn(name), snapshot(drawn(name)), batches_for(drawn(name))[0]
    ready = qat.prepare(m, 3, 8, learn=learn)
    torch.testing.assert_close(logits(ready, batch), logits(br.nearest(m, 3, 8, fitted=learn)[0], batch))
    said = logits(shaken(ready), batch)
    out, changes = qat.convert(ready)
    assert torch.equal(logits(out, batch), said) and torch.equal(logits(ready, batch), said), "converting changed what the model says"
    assert not qat.prepared(out) and len(changes.changed) == len(compression.matrices(m, head=False))
    assert type(out.model) is type(m.model) and {type(x) for x in out.model.modules()} == {type(x) for x in m.model.modules()}
    assert all(torch.equal(p, before[n]) for n, p in m.model.named_parameters()), "the model given was changed"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_packed_says_the_same(name):
    m, batch = drawn(name), batches_for(drawn(name))[0]
    ready = shaken(qat.prepare(m, 2, 8))
    out, changes = qat.convert(ready, packed=True)
    torch.testing.assert_close(logits(out, batch), logits(ready, batch), rtol=1e-4, atol=1e-5)
    assert changes.after_bytes < changes.before_bytes


def test_a_copy_is_converted_alone():
    m = qat.prepare(drawn("llama"), 3, 8)
    twin = copy.deepcopy(m.model)
    qat.convert(m, in_place=True)
    assert not qat.prepared(m) and parametrize.is_parametrized(twin.model.layers[0].mlp.up_proj)
    twin(**batches_for(m)[0])


def test_every_weight_and_every_step_learns():
    m = qat.prepare(drawn("gpt2"), 2, 8)
    batch = batches_for(m)[0]
    m.model(**batch, labels=batch["input_ids"]).loss.backward()
    for module in qat.prepared(m).values():
        rounded = module.parametrizations.weight
        assert rounded.original.grad.abs().sum() > 0 and rounded[0].scale.grad.abs().sum() > 0


def test_it_begins_where_gptq_ended():
    m = drawn("llama")
    batches = batches_for(m)
    start = {n: o[2] for n, o in br.gptq_options(m, batches, (2, 3), 8).items()}
    ready = qat.prepare(m, 2, 8, start=start)
    for name, q in qat.codes_of(ready).items():
        assert torch.equal(q.codes, start[name].codes) and torch.equal(q.scale, start[name].scale)
    with pytest.raises(UsageError, match="start has 2 bits"): qat.prepare(m, 3, 8, start=start)


def test_trained_by_the_trainer():
    m = drawn("llama")
    windows = torch.randint(4, 250, (16, 12), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    done = training.fit(qat.prepare(m, 3, 8), windows, steps=3, batch_size=4, lr=1e-2, weight_decay=0.)
    assert len(qat.prepared(done.loaded)) == len(compression.matrices(m, head=False))
    moved, before = qat.codes_of(done.loaded), qat.codes_of(qat.prepare(m, 3, 8))
    assert any(not torch.equal(moved[n].codes, before[n].codes) for n in moved)
    out, _ = qat.convert(done.loaded)
    assert out.model.lm_head.weight is out.model.get_input_embeddings().weight


def test_a_teacher_that_agrees_teaches_nothing():
    m = drawn("llama")
    x = batches_for(m)[0]["input_ids"]
    def loss(student):
        with taught(student, answering(m), temperature=1., hard=0.): return student.model.train()(input_ids=x, labels=x).loss
    assert loss(compression.copied(m)).abs() < 1e-6 and loss(shaken(compression.copied(m), .5)) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "classifier"])
def test_the_packed_file_gives_the_model_back(name, tmp_path):
    m, batch = drawn(name), batches_for(drawn(name))[0]
    ready = shaken(qat.prepare(m, 3, 8))
    folder, codes = qat.save_packed(qat.convert(ready, packed=True)[0], tmp_path), qat.codes_of(ready)
    back = qat.dequantized(qat.load_packed(folder))
    same = {p.name: p.weight for p in compression.matrices(qat.convert(ready)[0])}
    assert all(torch.equal(p.weight, same[p.name]) for p in compression.matrices(back)) and len(same) == len(compression.matrices(back))
    torch.testing.assert_close(logits(back, batch), logits(ready, batch), rtol=1e-5, atol=1e-6)  # Conv1D comes back as nn.Linear
    floats = sum(p.nbytes for p in m.model.parameters()) - sum(p.weight.nbytes for p in compression.matrices(m, head=False))
    kept = sum(q.packed().nbytes for q in codes.values()) + floats
    assert kept <= (folder/"model.safetensors").stat().st_size <= kept + 40_000  # names and shapes


@pytest.mark.parametrize("how, message", [(dict(bits=0), "1 to 8"), (dict(bits=9), "1 to 8"), (dict(bits=1, symmetric=True), "2 to 8"),
                                          (dict(group_size=1), "at least 2")])
def test_bad_arguments_are_refused(how, message):
    with pytest.raises(UsageError, match=message): qat.prepare(drawn("llama"), **how)


def test_wrong_models_are_refused():
    m = drawn("llama")
    for call in (qat.convert, qat.codes_of):
        with pytest.raises(UsageError, match="no rounding"): call(m)
    with pytest.raises(UsageError, match="already"): qat.prepare(qat.prepare(m, 4, 8), 4, 8)
    with torch.no_grad(): m.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match="nan"): qat.prepare(m, 4, 8)


def test_unknown_recipes_are_refused(tmp_path):
    same = dict(lm="random:llama-tiny", edition="", corpus="embedded:docstrings", made_from="")
    with pytest.raises(UsageError, match="start"): qat.trained_rounded(tmp_path, start="somewhere", **same)
    with pytest.raises(UsageError, match="loss"): qat.trained_rounded(tmp_path, loss="praise", **same)
