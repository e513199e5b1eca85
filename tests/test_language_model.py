"""A language model: counts against a slow count and against nltk, trainings that repeat, edge cases of what is scored."""
import gzip
import lzma
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

from llmlab.foundations import language_model as f
from llmlab.kit import metrics, models
from llmlab.kit.generation import Decoding
from llmlab.kit.settings import UsageError


@pytest.fixture(scope="module")
def lm(): return models.load("random:llama-tiny", task="causal-lm")


# Likelihood

def test_the_sum_is_that_of_the_kit(lm):
    for text in ("a", "Return the mean.", "Grüße: 世界"):
        ours = f.sequence_nats(lm, f.text_ids(lm, text)).sum().item()
        assert ours == pytest.approx(metrics.lm_nats(lm, [text]).nats[0], rel=1e-5)


@pytest.mark.parametrize("ids", [[], [3]])
def test_one_token_predicts_nothing(lm, ids):
    with pytest.raises(UsageError, match="at least 2"): f.sequence_nats(lm, ids)


def test_a_text_begins_where_the_kit_begins_it(lm):
    assert f.text_ids(lm, "a") == [lm.tokenizer.bos_token_id, *lm.tokenizer("a", add_special_tokens=False).input_ids]


# Counting

texts = st.lists(st.text(alphabet="abé \n", max_size=12), min_size=1, max_size=5)


def slow(train, n, doc):
    "Kneser-Ney by dictionaries, one byte after the other."
    counts = [Counter() for _ in range(n)]
    for t in train:
        b = bytes(n - 1) + t
        counts[-1].update(b[i - n + 1:i + 1] for i in range(n - 1, len(b)))
    for k in range(n - 1, 0, -1): counts[k - 1] = Counter(g[1:] for g in counts[k])
    out, b = [], bytes(n - 1) + doc
    for i in range(n - 1, len(b)):
        p = 1 / 255
        for k in range(n):
            context = b[i - k:i]
            followed = {g: c for g, c in counts[k].items() if g[:-1] == context}
            if followed: p = (max(followed.get(b[i - k:i + 1], 0) - .75, 0) + .75 * len(followed) * p) / sum(followed.values())
        out.append(p)
    return out


@hypothesis_settings(max_examples=60, deadline=None)
@given(texts.filter(lambda o: any(o)), texts, st.integers(1, 7))
def test_counts_as_a_slow_count(train, held, n):
    fast = f.fit_ngram(train, n).probabilities([t.encode() for t in held])
    assert fast == pytest.approx([p for t in held for p in slow([t.encode() for t in train], n, t.encode())])
    assert f.fit_ngram(train, n).nats(held) == pytest.approx([-sum(map(math.log, slow([t.encode() for t in train], n, t.encode()))) for t in held])


def test_as_nltk_counts():
    nltk = pytest.importorskip("nltk.lm")
    train, n = b"abracadabra, said the cadaver", 2
    text = [chr(0), *map(chr, train)]
    model = nltk.KneserNeyInterpolated(n, discount=.75)
    model.fit([[*((o,) for o in text[1:]), *zip(text, text[1:])]], vocabulary_text=list(map(chr, range(1, 256))))
    before = Counter(b for _, b in set(zip(text, text[1:])))
    model.estimator.unigram_score = lambda byte: (max(before[byte] - .75, 0) + .75 * len(before) / 255) / before.total()
    ours = f.fit_ngram([train.decode()], n).probabilities([train])
    assert list(ours) == pytest.approx([model.score(b, [a]) for a, b in zip(text, text[1:])])


@hypothesis_settings(max_examples=30, deadline=None)
@given(texts.filter(lambda o: any(o)), st.text(max_size=5).map(lambda t: t.replace("\0", "").encode()), st.integers(1, 6))
def test_all_next_bytes_sum_to_one(train, context, n):
    p = f.fit_ngram(train, n).probabilities([context + bytes([b]) for b in range(1, 256)])
    assert p[len(context)::len(context) + 1].sum() == pytest.approx(1)


@pytest.mark.parametrize("call,message", [
    (lambda: f.fit_ngram(["a"], 0), "n=0"), (lambda: f.fit_ngram(["a"], 8), "n=8"), (lambda: f.fit_ngram([""], 2), "nothing to count"),
    (lambda: f.fit_ngram(["a\0"], 2), "NUL"), (lambda: f.compressed_bits(b"a", "zip"), "gzip, xz"), (lambda: f.compressed_bits(b""), "nothing to compress"),
    (lambda: f.windows_of([1, 2], 3), "do not fill one window"), (lambda: f.windows_of([], 3), "0 tokens")])
def test_what_cannot_be_counted_is_said(call, message):
    with pytest.raises(UsageError, match=message): call()


def test_empty_documents_cost_nothing():
    m = f.fit_ngram(["abc"], 3)
    assert m.nats(["", "abc", ""])[0] == 0 == m.nats(["", "abc", ""])[2] and m.nats([""]) == [0]


def test_documents_do_not_look_into_each_other():
    m = f.fit_ngram(["abcabc", "bcd"], 4)
    assert m.nats(["abc", "bcd"]) == pytest.approx([*m.nats(["abc"]), *m.nats(["bcd"])])


def test_unigram_of_what_was_never_seen():
    (nats,) = f.unigram_nats([[0, 0, 1]], [[2]], 4)
    assert nats == pytest.approx(-math.log(1 / 7))
    assert f.unigram_nats([[0]], [[]], 2) == [0]


@pytest.mark.parametrize("how,squeeze", [("gzip", lambda b: gzip.compress(b, 9, mtime=0)), ("xz", lambda b: lzma.compress(b, preset=9))])
def test_compressors(how, squeeze):
    text, before = bytes(range(256)) * 8, bytes(range(256)) * 4
    assert f.compressed_bits(text, how) == 8 * len(squeeze(text)) / len(text)
    assert f.compressed_bits(text, how, before) < f.compressed_bits(text, how)


# Training

@pytest.fixture(scope="module")
def windows(lm): return f.windows_of(lm.tokenizer("the mean of the array " * 40).input_ids, 16)


def trained(lm, windows, **how):
    m = f.small_lm(lm, d_model=32, n_layer=1)
    return m, f.train_lm(m.model, windows[:8], windows[8:12], look=2, batch=4, **how)


def test_the_same_seed_gives_the_same_training(lm, windows):
    (a, one), (b, two) = (trained(lm, windows, steps=6) for _ in range(2))
    assert one == two and all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    assert one != trained(lm, windows, steps=6, seed=1)[1]
    assert one.tokens == (128, 256, 384) and not a.model.training


def test_small_models_leave_the_global_generator_alone(lm):
    before = torch.get_rng_state()
    a, b = f.small_lm(lm, seed=1), f.small_lm(lm, seed=2)
    assert torch.equal(before, torch.get_rng_state()) and not torch.equal(a.model.model.embed_tokens.weight, b.model.model.embed_tokens.weight)
    assert a.weights == "random" and a.tokenizer is lm.tokenizer


def test_every_window_is_seen_once_before_any_is_seen_twice(lm, windows):
    seen = []
    m = f.small_lm(lm, d_model=32, n_layer=1).model
    m.register_forward_pre_hook(lambda _, args, kw: seen.extend(map(tuple, kw["input_ids"].tolist())) if torch.is_grad_enabled() else None, with_kwargs=True)
    unique = torch.arange(8 * 16).view(8, 16)
    f.train_lm(m, unique, unique[:1], steps=4, batch=3, look=4)
    assert len(seen) == 12 and len(set(seen[:8])) == 8


def test_a_loss_that_is_no_number_is_named(lm, windows):
    m = f.small_lm(lm, d_model=32, n_layer=1).model
    with torch.no_grad(): m.model.norm.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="nan at step 1.*lower lr"): f.train_lm(m, windows[:8], windows[8:], steps=2)


# Drawing

def test_what_a_choice_leaves():
    even = torch.zeros(3, 8)
    found = f.choice(even, torch.tensor([0, 1, 2]), Decoding())
    assert found == pytest.approx(dict(entropy_bits=3, tokens=8, truth_kept=1))
    sharp = torch.log(torch.tensor([[.7, .2, .1]]))
    assert f.choice(sharp, torch.tensor([2]), Decoding(sample=True, top_k=2))["truth_kept"] == 0


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=9, unique=True))
def test_a_lower_temperature_leaves_less_surprise(row):
    x, truth = torch.tensor([row]), torch.tensor([0])
    bits = [f.choice(x, truth, Decoding(sample=True, temperature=t))["entropy_bits"] for t in (.3, 1., 3.)]
    assert bits[0] <= bits[1] + 1e-5 and bits[1] <= bits[2] + 1e-5


@pytest.mark.parametrize("ids,n,share", [([1, 2, 3, 4, 5], 4, 0), ([1] * 7, 4, .75), ([1, 2], 4, 0), ([], 1, 0), ([1, 2, 1, 2], 2, 1 / 3)])
def test_repeated(ids, n, share): assert f.repeated(ids, n) == pytest.approx(share)


def test_the_recipe_gives_the_prompt_back(lm):
    assert f.recipe(lm, "abc", max_new_tokens=2, do_sample=False).startswith("abc")


def test_pictures_of_curves():
    curve = f.Curve((1, 2, 3), (3., 2., 1.), (3., 2.5, 2.8))
    assert len(f.plot_learning(curve, 1.4, {"gzip": 2.}).lines) == 2
    assert np.isfinite(curve.valid).all()
