"Early exit, routers, neurons and tokens on models of every kind, and what they refuse."
import math
from dataclasses import replace

import pytest
import torch

from llmlab.kit import compression, models, yardsticks
from llmlab.kit.settings import UsageError
from llmlab.pruning import dynamic as D
from test_pruning_weights import tiny

CAUSAL, LLAMA = ["llama", "gpt2", "opt", "qwen2", "qwen3", "mistral"], ["llama", "qwen2", "qwen3", "mistral"]


def windows(m): return compression.calibration(m, ["words of a text that is long enough to fill a window or two of tokens"] * 60, n=16, length=32)


def logits(m, ids): return m.model(input_ids=ids).logits.detach()


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_threshold_out_of_reach_changes_nothing(kind):
    m = tiny(kind)
    ids, exits = windows(m)[0]["input_ids"][:2], D.fit_exits(m, windows(m))
    for by in ("probe", "softmax"):
        before = logits(m, ids)
        with D.early_exit(m, replace(exits, by=by)) as r: assert torch.equal(logits(m, ids), before)
        assert (r.exits() == 0).all()
        assert torch.equal(logits(m, ids), before), "something was left behind"


@pytest.mark.parametrize("kind", CAUSAL)
def test_all_leave_after_the_first_layer(kind):
    m = tiny(kind)
    ids, exits = windows(m)[0]["input_ids"][:2], D.fit_exits(m, windows(m), layers=(1,))
    with torch.inference_mode():
        state = m.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        want = m.model.get_output_embeddings()(D.applied(state, exits.shortcuts[1]))
        with D.early_exit(m, replace(exits, threshold=-math.inf)) as r: got = logits(m, ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (r.exits() == 1).all()


@pytest.mark.parametrize("kind", LLAMA)
def test_layers_left_out_step_by_step_equal_the_whole_text(kind):
    m = tiny(kind)
    exits, ids = D.fit_exits(m, windows(m), layers=(1,)), windows(m)[1]["input_ids"][:1]
    scores = []
    with D.early_exit(m, replace(exits, threshold=math.inf)): pass
    with torch.inference_mode(): scores = D.applied(m.model(input_ids=ids, output_hidden_states=True).hidden_states[1], exits.probes[1])
    some = replace(exits, threshold=scores.median().item())
    with torch.inference_mode():
        with D.early_exit(m, some) as a: whole = logits(m, ids)[0]
        with D.early_exit(m, some, skip=True) as b:
            cache, steps = None, []
            for i in range(ids.shape[1]):
                out = m.model(input_ids=ids[:, i:i + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values; steps.append(out.logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), whole, atol=1e-4, rtol=1e-3)
    assert torch.equal(a.exits(), b.exits()) and 0 < (a.exits() > 0).float().mean() < 1


def test_layers_cannot_be_left_out_of_gpt2():
    m = tiny("gpt2")
    with pytest.raises(UsageError, match="skip=True"), D.early_exit(m, D.fit_exits(m, windows(m)), skip=True): pass


def test_wrong_exits():
    m = tiny("llama")
    for layers in ((0,), (2,), ()):
        with pytest.raises(UsageError, match="layers"): D.fit_exits(m, windows(m), layers=layers)
    with pytest.raises(UsageError, match="cannot fit"): D.fit_exits(m, [dict(input_ids=torch.ones(1, 8, dtype=torch.long))])
    with pytest.raises(UsageError, match="asking"), D.early_exit(m, replace(D.fit_exits(m, windows(m)), by="mood")): pass
    with pytest.raises(UsageError, match="empty"): D.calibrate(m, D.fit_exits(m, windows(m)), [], .1, (1.,), None)


def test_the_model_is_whole_again_after_an_error():
    m = tiny("llama")
    with pytest.raises(RuntimeError, match="stop"), D.early_exit(m, D.fit_exits(m, windows(m))): raise RuntimeError("stop")
    assert all("forward" not in vars(layer) for layer in models.layers_of(m)) and not m.model.get_output_embeddings()._forward_pre_hooks


def test_operations_without_exits_are_those_of_the_matrices():
    m = tiny("llama")
    exits = D.fit_exits(m, windows(m))
    want = 2 * sum(p.weight.numel() for p in compression.matrices(m))
    assert D.exit_flops(m, exits, torch.zeros(3)) == want
    assert D.exit_flops(m, replace(exits, threshold=0.), torch.ones(3)) < want


@pytest.mark.parametrize("kind", CAUSAL)
def test_routers(kind):
    m = tiny(kind, num_hidden_layers=4) if kind != "gpt2" else tiny(kind, n_layer=4)
    ids = windows(m)[0]["input_ids"]
    before = logits(m, ids)
    with D.skipped_layers(m, D.fit_router(m, windows(m), 0.)): assert torch.equal(logits(m, ids), before)
    with D.skipped_layers(m, D.fit_router(m, windows(m), .5)) as r: assert not torch.equal(logits(m, ids), before)
    with D.skipped_layers(m, D.at_random(r)) as drawn: logits(m, ids)
    for o in (r, drawn): assert set(o.shares()) == {2, 3} and all(.2 < q < .8 for q in o.shares().values())
    assert torch.equal(logits(m, ids), before)
    with pytest.raises(UsageError, match="share"): D.fit_router(m, windows(m), 1.)


@pytest.mark.parametrize("kind", [*CAUSAL, "bert", "distilbert"])
def test_neurons_of_every_kind(kind):
    m = tiny(kind)
    x = compression.calibration(m, ["some words of text that are here to be read"] * 40, n=4, length=12)[0]
    before = m.model(**x)[0].detach()
    with D.top_neurons(m, 1.): torch.testing.assert_close(m.model(**x)[0], before)
    with D.top_neurons(m, .25): assert not torch.equal(m.model(**x)[0], before)
    static = compression.input_statistics(m, [x], places=D.mlp_ends(m))
    with D.top_neurons(m, 1., "static", static): torch.testing.assert_close(m.model(**x)[0], before)
    if kind in LLAMA:
        with D.top_neurons(m, 1., "gate"): torch.testing.assert_close(m.model(**x)[0], before)
    else:
        with pytest.raises(UsageError, match="gate"), D.top_neurons(m, .5, "gate"): pass
    with pytest.raises(UsageError, match="static"), D.top_neurons(m, .5, "static"): pass
    with pytest.raises(UsageError, match="share"), D.top_neurons(m, 0.): pass
    assert torch.equal(m.model(**x)[0], before)


@pytest.mark.parametrize("kind", LLAMA)
def test_gathered_neurons_equal_masked_ones(kind):
    m = tiny(kind)
    new, changes = D.with_top_neurons(m, .3)
    ids = windows(m)[0]["input_ids"][:1, :6]
    with torch.inference_mode(), D.top_neurons(m, .3, "gate"): want = logits(m, ids)
    torch.testing.assert_close(logits(new, ids), want, atol=1e-5, rtol=1e-4)
    one = models.layers_of(new)[0].mlp
    x = torch.randn(1, 1, 32)
    torch.testing.assert_close(one(x), one(torch.cat([x, x], 1))[:, :1])
    assert len(changes) == 2 and m.model.state_dict().keys() == tiny(kind).model.state_dict().keys()
    with pytest.raises(UsageError, match="gated"): D.with_top_neurons(tiny("opt"), .5)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_tokens_dropped(kind):
    m = tiny(kind, num_hidden_layers=4) if kind == "bert" else tiny(kind, n_layers=4)
    texts = ["short", "a text of some more words than the other", "x y z"]
    before = models.encode(m, texts)
    with D.dropped_tokens(m, {1: 1., 2: 1.}): torch.testing.assert_close(models.encode(m, texts), before, atol=1e-5, rtol=1e-4)
    with D.dropped_tokens(m, {1: .5, 2: .3}): batched = models.encode(m, texts)
    assert not torch.allclose(batched, before) and batched.isfinite().all()
    with D.dropped_tokens(m, {1: .5, 2: .3}): alone = torch.cat([models.encode(m, [t]) for t in texts])
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-4, msg="padding decides what is dropped")
    with D.dropped_tokens(m, {2: .5}, "random"): assert models.encode(m, texts).shape == before.shape
    torch.testing.assert_close(models.encode(m, texts), before)


def test_tokens_dropped_really_saves():
    m = tiny("bert", num_hidden_layers=4)
    call = yardsticks.encode_call(m, 4, 32)
    whole = D.counted_flops(call)
    def shorter():
        with D.dropped_tokens(m, {1: .25}): call()
    assert D.counted_flops(shorter) < .55 * whole


def test_wrong_plans():
    m = tiny("bert")
    for plan, says in (({2: .5}, "layers"), ({1: 0.}, "shares"), ({1: 1.2}, "shares")):
        with pytest.raises(UsageError, match=says), D.dropped_tokens(m, plan): pass
    with pytest.raises(UsageError, match="dropping"), D.dropped_tokens(m, {1: .5}, "taste"): pass
    with pytest.raises(UsageError, match="continues text"), D.dropped_tokens(tiny("llama"), {1: .5}): pass
