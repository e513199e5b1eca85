"""Generation: token for token the library's loops, whatever else is in the batch; what cannot work is said before the model runs."""
import dataclasses
import math

import pytest
import torch
import transformers
from hypothesis import given, settings as hypothesis_settings, strategies as st

from llmlab.kit import generation as g, measure, models
from llmlab.kit.settings import UsageError

PROMPTS = ["", "a", "Return the mean of x.", "Grüße: 世界"]
N = 12


@pytest.fixture(scope="module")
def lm(): return models.load("random:llama-tiny", task="causal-lm")


@pytest.fixture(scope="module")
def gpt2(): return models.load("random:gpt2-tiny", task="causal-lm")


def ending(lm, *tokens):
    "The same model with other tokens that end a text."
    config = transformers.GenerationConfig(eos_token_id=list(tokens), pad_token_id=lm.tokenizer.pad_token_id)
    return dataclasses.replace(lm, model=Stopping(lm.model, config))


class Stopping(torch.nn.Module):
    "A model with another generation config; the model itself is shared and stays as it is."
    def __init__(self, model, config): super().__init__(); self.inner, self.generation_config, self.config = model, config, model.config
    def forward(self, *args, **kwargs): return self.inner(*args, **kwargs)
    def get_input_embeddings(self): return self.inner.get_input_embeddings()


def library(m, ids, n=N, **options):
    x = torch.tensor([ids])
    eos = options.pop("eos_token_id", m.tokenizer.eos_token_id)
    out = m.model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n, pad_token_id=m.tokenizer.pad_token_id, eos_token_id=eos, **options)
    return out[0, len(ids):].tolist()


# Transforms

rows = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=7, max_size=7), min_size=1, max_size=3)


@hypothesis_settings(max_examples=60, deadline=None)
@given(rows, st.floats(.01, 1), st.integers(1, 9), st.floats(.1, 5), st.floats(.2, 4))
def test_transforms_as_the_library_has_them(rows, p, k, t, penalty):
    x, ids = torch.tensor(rows), torch.randint(7, (len(rows), 4))
    L = transformers.generation.logits_process
    for ours, theirs in ((g.apply_temperature(x, t), L.TemperatureLogitsWarper(t)), (g.keep_top_k(x, k), L.TopKLogitsWarper(k)),
                         (g.keep_top_p(x, p), L.TopPLogitsWarper(p)), (g.keep_min_p(x, p), L.MinPLogitsWarper(p)),
                         (g.penalise_repetition(x, ids, penalty), L.RepetitionPenaltyLogitsProcessor(penalty))):
        assert torch.equal(ours, theirs(ids, x.clone()))
        assert ours.softmax(-1).isfinite().all()


@hypothesis_settings(max_examples=40, deadline=None)
@given(rows, st.floats(.01, 1))
def test_top_p_keeps_enough_and_not_more(rows, p):
    x = torch.tensor(rows, dtype=torch.float64)
    kept = g.keep_top_p(x, p) > -math.inf
    for q, mask in zip(x.softmax(-1), kept):
        assert q[mask].sum() >= p - 1e-9
        if mask.sum() > 1: assert q[mask].sum() - q[mask].min() < p + 1e-9


def test_padding_is_not_said():
    x, ids = torch.ones(2, 4), torch.tensor([[3, 3, 1], [0, 1, 2]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert g.penalise_repetition(x, ids, 2., mask).tolist() == [[1, .5, 1, 1], [.5, .5, .5, 1]]


def test_a_token_that_the_head_does_not_have_is_no_fault_of_the_penalty():
    assert g.penalise_repetition(torch.ones(1, 3), torch.tensor([[0, 7]]), 2.).tolist() == [[.5, 1, 1]]


# What is refused

@pytest.mark.parametrize("options,message", [
    (dict(temperature=.7), "would be ignored"), (dict(top_k=5), "would be ignored"), (dict(top_p=.5, beams=4), "would be ignored"),
    (dict(length_penalty=2.), "would be ignored"), (dict(sample=True, temperature=0), "sample=False"), (dict(sample=True, temperature=-1), "above 0"),
    (dict(sample=True, temperature=math.nan), "above 0"), (dict(sample=True, top_p=0), "top_p=0"), (dict(sample=True, top_p=1.1), "top_p=1.1"),
    (dict(sample=True, top_k=-1), "top_k=-1"), (dict(sample=True, min_p=2), "min_p=2"), (dict(repetition_penalty=0), "repetition_penalty=0"),
    (dict(beams=0), "beams=0"), (dict(sample=True, beams=2), "exclude each other"), (dict(temprature=1.), "temprature")])
def test_impossible_or_idle_options(lm, options, message):
    for call in (g.generate, g.stream):
        with pytest.raises(UsageError, match=message): call(lm, "a", 2, **options)


@pytest.mark.parametrize("prompts,n,message", [
    ("abc", 0, "max_new_tokens=0"), ([], 4, "prompts is empty"), ([3], 4, r"prompts\[0\]"),
    (["a" * 2000], 100, "2000 tokens and 100 new ones .* 2048 .* at most 48"),
    (["a" * 2100], 100, "Cut the prompt to 1948"),
    ([[4096]], 4, "tokenizer does not fit the model"), ([[-1]], 4, "does not fit"), ([["a"]], 4, "does not fit")])
def test_prompts_that_do_not_fit(lm, prompts, n, message):
    with pytest.raises(UsageError, match=message): g.generate(lm, prompts, n)


def test_the_context_can_be_filled_to_the_last_token(lm):
    assert g.generate(lm, ["a" * 2046], 2, ignore_eos=True)[0].new_tokens == 2


def test_an_encoder_does_not_generate():
    with pytest.raises(UsageError, match="task='causal-lm'"): g.generate(models.load("random:bert-tiny"), "a", 2)


def test_a_model_of_nan_is_named(lm):
    broken = models.load("random:llama-tiny", task="causal-lm")
    with torch.no_grad(): broken.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="NaN"): g.generate(broken, "a", 2)
    with pytest.raises(UsageError, match="NaN"): g.generate(broken, "a", 2, beams=2)


def test_what_is_wrong_is_raised_before_the_first_piece(lm):
    with pytest.raises(UsageError): g.stream(lm, "a", 0)
    with pytest.raises(UsageError, match="cannot be streamed"): g.stream(lm, "a", 4, beams=2)


@pytest.mark.parametrize("seed,batch,message", [([1], 2, "1 seeds for 2 prompts"), (0, 0, "batch_size=0")])
def test_seeds_and_batches(lm, seed, batch, message):
    with pytest.raises(UsageError, match=message): g.generate(lm, ["a", "b"], 2, seed=seed, batch_size=batch, sample=True)


# Equal to the library

@pytest.mark.parametrize("name", ["random:llama-tiny", "random:gpt2-tiny", "random:qwen-tiny"])
def test_greedy(name):
    m = models.load(name, task="causal-lm")
    ids = g.prompt_ids(m, PROMPTS, N)
    together = g.generate(m, PROMPTS, N, ignore_eos=True)
    for o, c in zip(ids, together): assert list(c.ids) == [t for t in library(m, o, eos_token_id=None, do_sample=False) if t not in m.tokenizer.all_special_ids]
    assert together == [g.generate(m, [p], N, ignore_eos=True)[0] for p in PROMPTS] == g.generate(m, PROMPTS, N, ignore_eos=True, batch_size=2)


@pytest.mark.parametrize("options", [dict(), dict(temperature=.7), dict(top_k=5), dict(top_p=.6, temperature=2.), dict(min_p=.2), dict(repetition_penalty=1.5)])
def test_sampling(lm, options):
    ids = g.prompt_ids(lm, PROMPTS, N)
    ours = g.generate(lm, PROMPTS, N, sample=True, seed=3, **options)
    for i, (o, c) in enumerate(zip(ids, ours)):
        torch.manual_seed(3 + i)
        theirs = library(lm, o, do_sample=True, **{"top_k": 0, **options})
        assert list(c.ids) == [t for t in theirs if t not in lm.tokenizer.all_special_ids]
        assert g.generate(lm, [o], N, sample=True, seed=3 + i, **options)[0] == c
    assert g.generate(lm, PROMPTS, N, sample=True, seed=[3, 4, 5, 6], **options) == ours


def test_the_same_prompt_many_times_gives_many_texts(lm):
    assert len({c.ids for c in g.generate(lm, ["a"] * 6, N, sample=True)}) == 6


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("length_penalty", [0., 1., 2.])
def test_beams_that_end_at_different_lengths(gpt2, beams, length_penalty):
    common = [t for t in g.generate(gpt2, ["a"] * 4, N, sample=True, temperature=.3)[0].ids][1:3]
    m = ending(gpt2, *common)
    for ids in g.prompt_ids(gpt2, PROMPTS, N):
        theirs = library(gpt2, ids, eos_token_id=common, num_beams=beams, length_penalty=length_penalty, do_sample=False)
        ours = g._beam(m, ids, N, g.Decoding(beams=beams, length_penalty=length_penalty), g._stops(m))
        assert ours == theirs[:len(ours)] and set(theirs[len(ours):]) <= {gpt2.tokenizer.pad_token_id}


def test_beams_with_a_repetition_penalty(lm):
    ids = g.prompt_ids(lm, ["Return"], N)[0]
    assert list(g.generate(lm, [ids], N, beams=3, repetition_penalty=1.3)[0].ids) == library(lm, ids, num_beams=3, repetition_penalty=1.3, do_sample=False)


def test_more_beams_than_tokens():
    m = models.load("random:llama-tiny", task="causal-lm")
    m.model.resize_token_embeddings(259)
    assert g.generate(m, ["a"], 3, beams=200)[0].new_tokens <= 3


def test_a_beam_finds_at_least_what_exhaustive_search_of_two_steps_finds(lm):
    ids = g.prompt_ids(lm, ["ab"], 2)[0]
    def scores(o): return g.next_logits(lm.model, torch.tensor([o]), torch.ones(1, len(o), dtype=torch.long))[0][0].log_softmax(-1)
    first = scores(ids)
    top = first.topk(60).indices.tolist()
    best = max(((first[a] + (s := scores([*ids, a])).max()).item(), (a, s.argmax().item())) for a in top)[1]
    assert tuple(g._beam(lm, ids, 2, g.Decoding(beams=60), frozenset())) == best


# Where a text ends

def test_it_stops_at_any_of_the_ends_and_says_so(lm):
    free = g.generate(lm, ["a"], N, ignore_eos=True)[0].ids
    stopped = g.generate(ending(lm, free[3], 258), ["a", "bcd"], N)
    at = free.index(free[3])
    assert stopped[0].ids == free[:at] and stopped[0].finish == "stop" and stopped[0].new_tokens == at + 1
    assert stopped[1] == g.generate(ending(lm, free[3], 258), ["bcd"], N)[0]
    assert g.generate(lm, ["a"], 2, ignore_eos=True)[0].finish == "length"


def test_an_end_at_once_leaves_an_empty_text(lm):
    first = g.generate(lm, ["a"], 1, ignore_eos=True)[0].ids[0]
    m = ending(lm, first)
    (c,) = g.generate(m, ["a"], N)
    assert (c.ids, c.text, c.finish, c.new_tokens) == ((), "", "stop", 1)
    assert [dataclasses.astuple(p) for p in g.stream(m, "a", N)] == [(None, "", "stop")]
    assert g.generate(m, ["a"], N, beams=1) == g.generate(m, "a", N)


def test_special_tokens_are_never_in_the_answer(lm):
    found = g.generate(lm, ["a"] * 8, 40, sample=True, temperature=50., ignore_eos=True)
    assert all(not {256, 257, 258} & set(c.ids) and "<" + "s>" not in c.text for c in found)


# Text

@hypothesis_settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=6), st.integers(0, 50))
def test_pieces_add_up_to_the_text(lm, ids, seed):
    whole = g.generate(lm, [ids], 10, sample=True, temperature=3., seed=seed)[0]
    pieces = list(g.stream(lm, ids, 10, sample=True, temperature=3., seed=seed))
    assert "".join(p.text for p in pieces) == whole.text and len(pieces) == whole.new_tokens
    assert [p.finish for p in pieces] == [""] * (len(pieces) - 1) + [whole.finish]


def test_a_character_of_several_tokens_comes_whole(lm, monkeypatch):
    spelt = lm.tokenizer("né世!").input_ids
    monkeypatch.setattr(g, "_steps", lambda loaded, ids, n, how, seeds, stops: ([t] for t in spelt))
    assert [p.text for p in g.stream(lm, "a", 99)] == ["n", "", "é", "", "", "世", "!"]


def test_a_character_that_never_becomes_whole_is_told_at_the_end(lm, monkeypatch):
    spelt = lm.tokenizer("世").input_ids[:2]
    monkeypatch.setattr(g, "_steps", lambda loaded, ids, n, how, seeds, stops: ([t] for t in spelt))
    assert [p.text for p in g.stream(lm, "a", 2)] == ["", "\ufffd"]


class Spaced:
    "A tokenizer whose decoder drops the space of the first word, as SentencePiece does."
    def decode(self, ids, **_): return "".join(f" word{i}" for i in ids)[1:]


def test_the_space_before_a_continuation_is_kept():
    assert g._text(Spaced(), [1, 2], [3]) == " word3"


# Neighbours

def test_the_model_is_left_in_its_mode_and_its_gradients_work(lm):
    list(zip(range(2), g.stream(lm, "a", 5)))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert lm.model(torch.tensor([[1, 2]])).logits.requires_grad


def test_the_global_generator_is_not_touched(lm):
    before = torch.get_rng_state()
    g.generate(lm, ["a"], 3, sample=True)
    assert torch.equal(before, torch.get_rng_state())


def test_a_wrapped_model_generates_the_same(lm):
    assert g.generate(ending(lm, 258), PROMPTS, N) == g.generate(lm, PROMPTS, N)


def test_a_model_without_a_cache_is_refused(lm):
    class Forgetful(Stopping):
        def forward(self, *args, **kwargs): return self.inner(*args, **(kwargs | dict(use_cache=False, past_key_values=None)))
    with pytest.raises(UsageError, match="keeps no cache"):
        g.generate(dataclasses.replace(lm, model=Forgetful(lm.model, lm.model.generation_config)), "a", 2)


def test_the_kit_can_time_it(lm):
    times = measure.generation_times(lambda: g.stream(lm, "a", 4, ignore_eos=True), runs=2, warmup=0)
    assert times.n_tokens == 4
