"""Instruments on simulated clocks and machines (no real timing decides here), the hollow twin, and that the exercises' checks name the usual slips."""

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmlab.foundations import exercises as e
from llmlab.foundations import measuring as m
from llmlab.kit import geometry, measure, models, stats


def test_in_turns_finds_the_ratio_that_one_after_the_other_misses():
    for seed in range(5):
        machine = m.DriftingMachine(ratio=2., seed=seed)
        found = measure.compare({"a": machine.a, "b": machine.b}, baseline="b", pairs=31, clock=machine.clock, least_s=0)["a"].ratio
        assert abs(found.value / 2 - 1) < .05
    still = m.DriftingMachine(ratio=2., drift=0., disturbed=0.)
    a, b = (measure.time_calls(f, n=31, clock=still.clock, least_s=0) for f in (still.a, still.b))
    assert abs(b.value / a.value / 2 - 1) < .05


def test_coverage_counts_the_intervals_that_hold_the_truth():
    wide, wrong = stats.Estimate(1., 0., 2., 5), stats.Estimate(5., 4., 6., 5)
    assert m.coverage(lambda i: wide if i % 4 else wrong, 1., n=40).value == 75
    assert m.coverage(m.simulated_ratio, 1.25, 40).value > 80


def test_a_slow_device_returns_at_once_and_does_all_of_its_work():
    device = m.SlowDevice(seconds=.001, first=.002)
    for _ in range(3): device.launch()
    assert device.waiting
    device.wait()
    assert not device.waiting and device.first == 0.
    device.close()


def test_a_neighbour_comes_and_goes():
    n = m.Neighbour(1)
    n.leave()
    n.arrive()
    process = n.process
    assert process.poll() is None
    n.leave()
    assert process.returncode == 0 and n.process is None


def test_system_difference_keeps_the_thing_while_it_reads():
    seen = []
    class Kept:
        def __del__(self): seen.append("gone")
    assert isinstance(m.system_difference(Kept, meanwhile=lambda: seen.append("meanwhile")), int)
    assert seen == ["meanwhile", "gone"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_events_need_cuda():
    with pytest.raises((RuntimeError, AssertionError)): m.cuda_event_ms(lambda: None)


@pytest.mark.parametrize("name", ["llama-tiny", "qwen-tiny", "gpt2-tiny"])
def test_the_hollow_twin_dispatches_the_same_operations_with_next_to_no_weights(name):
    config = geometry.random_config(name)
    before = config.to_dict()
    twin = m.hollow(config)
    assert config.to_dict() == before, "the original was changed"
    whole, empty = m.random_model(config), m.random_model(twin)
    assert sum(p.numel() for p in empty.parameters()) < .05 * sum(p.numel() for p in whole.parameters())
    assert measure.count_ops(m.decode_step(whole)) == measure.count_ops(m.decode_step(empty))


def test_random_weights_are_finite_and_leave_the_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    model = m.random_model(m.llama_config(32, 2, 2, 48, 64))
    assert torch.rand(1) == want
    assert all(p.isfinite().all() and p.abs().max() > 0 for p in model.parameters())
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("name, width", [("Llama 6M", 6), ("Llama 13M", 13), ("Llama 60M", 60)])
def test_the_sizes_are_what_they_are_called(name, width):
    n = geometry.geometry_of(m.llama_config(*m.LLAMAS[name])).n_parameters / 1e6
    assert abs(n / width - 1) < .05


def cost(millions, ratio):
    one = stats.exact(1.)
    return m.StepCost(f"{millions}M", int(millions * 1e6), millions * 4e6, None, one, one, stats.exact(ratio))


def test_the_crossover_lies_between_the_sizes_or_is_none():
    assert m.crossover([cost(10, .5), cost(40, 2.)]) == pytest.approx(20e6, rel=1e-6)
    assert m.crossover([cost(10, 1.5), cost(40, 2.)]) == 10e6
    assert m.crossover([cost(10, .2), cost(40, .9)]) is None


def test_step_cost_on_a_simulated_clock_is_a_share():
    ticks = iter(range(10**6))
    found = m.step_cost("t", m.llama_config(32, 2, 2, 48, 64), pairs=3, warmup=1, clock=lambda: next(ticks) * 1e-3)
    assert found.reading.value > 0 and found.dispatch.value > 0 and found.weights_over_dispatch.value > 0 and found.read_bytes > 0


def test_greedy_tokens_of_the_stream_are_those_of_generate():
    loaded = models.load("random:llama-tiny", task="causal-lm")
    prompt = [5, 6, 7, 8]
    ids = torch.tensor([prompt])
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=4095)
    assert list(m.token_stream(loaded, prompt, 6)) == loaded.model.generate(ids, **options)[0, 4:].tolist()


def plain(q, k, v, mask): return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
def right_mask(lengths, T):
    i = torch.arange(T)
    return (((i <= i[:, None]) & (i >= T - torch.tensor(lengths)[:, None, None])) | torch.eye(T, dtype=torch.bool))[:, None]
def unscaled(p, top_p):
    value = p.sort(descending=True).values
    return torch.where(p >= value[(value.cumsum(0) < top_p).sum().clamp(max=len(p) - 1)], p, 0.)
def place(g): return int.from_bytes(hashlib.sha256(g.encode()).digest()[:8], "big") / 2**64
def rank(groups, share):
    known = sorted(set(groups))
    return [known.index(g) < share * len(known) for g in groups]


@pytest.mark.parametrize("check, wrong, says", [
    (e.check_attention, lambda q, k, v, mask: plain(q * q.shape[-1]**.5, k, v, mask), "not divided by √d"),
    (e.check_attention, lambda q, k, v, mask: plain(q / q.shape[-1]**.5, k, v, mask), "divided by d"),
    (e.check_attention, lambda q, k, v, mask: plain(q, k, v, torch.ones_like(mask)), "not applied"),
    (e.check_attention, lambda q, k, v, mask: (q @ k.mT / q.shape[-1]**.5).masked_fill(~mask, -math.inf).softmax(-2) @ v, "softmax over the keys|NaN"),
    (e.check_attention, lambda q, k, v, mask: None, "tensor is asked for"),
    (e.check_causal_mask, lambda lengths, T: torch.ones(len(lengths), 1, T, T, dtype=torch.bool), "later token"),
    (e.check_causal_mask, lambda lengths, T: torch.ones(T, T, dtype=torch.bool).tril().expand(len(lengths), 1, T, T), "padding is seen"),
    (e.check_causal_mask, lambda lengths, T: right_mask(lengths, T).int(), "bools"),
    (e.check_rotate, lambda x, positions, base: x, "distance|largest|alone"),
    (e.check_rotate, lambda x, positions, base: x + positions[:, None], "keeps the length"),
    (e.check_scores, lambda logits, ids, n: (F.cross_entropy(logits, ids, reduction="sum").item(),) * 3, "perplexity"),
    (e.check_scores, lambda logits, ids, n: (nats := F.cross_entropy(logits, ids, reduction="mean").item() * (len(ids) - 1),
                                             math.exp(nats / (len(ids) - 1)), nats / math.log(2) / n), "shift by one|nats are right"),
    (e.check_nucleus, lambda p, top_p: p, "keeps the tokens"),
    (e.check_nucleus, unscaled, "add up to 1"),
    (e.check_split, lambda groups, share: [i < share * len(groups) for i in range(len(groups))], "both sets"),
    (e.check_split, rank, "other rows"),
    (e.check_split, lambda groups, share: [hash(g) % 1000 < 1000 * share for g in groups], "hashlib"),
    (e.check_split, lambda groups, share: [place(g + str(share)) < share for g in groups], "larger share"),
    (e.check_kappa, lambda a, b: np.mean([x == y for x, y in zip(a, b)]), "chance has to be taken off"),
    (e.check_kappa, lambda a, b: (np.mean([x == y for x, y in zip(a, b)]) - 1/len({*a})) / (1 - 1/len({*a})), "number of labels"),
    (e.check_ttft_tpot, lambda stream, clock: (0., 0.), "first token"),
])
def test_a_check_names_the_slip(check, wrong, says):
    with pytest.raises(AssertionError, match=says): check(wrong)


def test_collecting_the_tokens_first_is_noticed():
    def late(stream, clock):
        start, tokens = clock(), list(stream())
        return 1e3 * (clock() - start), 1e3 * (clock() - start) / len(tokens)
    with pytest.raises(AssertionError, match="read at the first token"): e.check_ttft_tpot(late)


def test_another_right_answer_is_right():
    assert e.check_attention(plain) == e.check_causal_mask(right_mask) == "correct"
    assert e.check_split(lambda groups, share: [place(g) < share for g in groups]) == "correct"
