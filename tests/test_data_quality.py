"""Data quality: the figures on known data, edge cases, and what must not happen to a text."""

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmlab.foundations import data_quality as q
from llmlab.kit import stats
from llmlab.kit.settings import UsageError

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60)


@examples(max_examples=60, deadline=None)
@given(LABELS)
def test_cohen_kappa_is_scikit_learns(pairs):
    import warnings
    from sklearn.metrics import cohen_kappa_score
    a, b = map(list, zip(*pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = cohen_kappa_score(a, b)
    np.testing.assert_allclose(q.cohen_kappa(a, b), theirs, atol=1e-12)


@examples(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.integers(0, 10**6))
def test_fleiss_kappa_is_that_of_statsmodels(annotators, classes, seed):
    from statsmodels.stats.inter_rater import fleiss_kappa
    votes = np.random.default_rng(seed).integers(0, classes, (30, annotators))
    counts = np.stack([(votes == c).sum(1) for c in range(classes)], 1)
    np.testing.assert_allclose(q.fleiss_kappa(counts), fleiss_kappa(counts), atol=1e-12)


def test_agreement_refuses_what_is_no_agreement():
    with pytest.raises(UsageError, match="same items"): q.cohen_kappa([1, 2], [1])
    with pytest.raises(UsageError, match="same items"): q.cohen_kappa([], [])
    with pytest.raises(UsageError, match="same number"): q.fleiss_kappa([[2, 0], [1, 0]])
    with pytest.raises(UsageError, match="at least 2"): q.fleiss_kappa([[1, 0], [0, 1]])
    assert np.isnan(q.cohen_kappa([1, 1], [1, 1])) and np.isnan(q.fleiss_kappa([[3, 0], [3, 0]]))
    assert q.cohen_kappa(["a", "b"], ["b", "a"]) == -1


def test_a_simulated_annotator_errs_as_often_as_it_should_and_never_into_the_truth():
    truth = np.arange(20_000) % 5
    said = q.annotate(truth, .3, 5, seed=1)
    assert abs(np.mean(said != truth) - .3) < .02 and set(said) == set(range(5))
    assert (q.annotate(truth, 0., 5) == truth).all() and (q.annotate(truth, 1., 5) != truth).all()
    with pytest.raises(UsageError): q.annotate(truth, 1.5, 5)
    with pytest.raises(UsageError): q.annotate(truth, .1, 1)


@pytest.mark.parametrize("shares", [(.5, .5), (.9, .1), (.5, .3, .2)])
def test_expected_kappa_is_what_many_items_show(shares):
    truth = np.random.default_rng(0).choice(len(shares), 60_000, p=shares)
    found = q.cohen_kappa(q.annotate(truth, .1, len(shares), 1), q.annotate(truth, .25, len(shares), 2))
    assert abs(found - q.expected_kappa(shares, .1, .25)) < .02


def test_a_majority_of_one_is_that_one_and_a_clear_majority_wins():
    assert (q.majority_vote([[2, 0, 1]]) == [2, 0, 1]).all()
    assert (q.majority_vote([[2, 0], [2, 1], [0, 1]]) == [2, 1]).all()


def test_masking_takes_the_traceback_too_and_leaves_the_rest(tmp_path):
    text = q.log_requests(tmp_path/"a.log", formatter=q.MaskingFormatter("%(levelname)s %(message)s"))
    assert not any(o in text for o in q.PLANTED) and "[email]" in text and "ValueError" in text and "Please answer" in text
    kept = q.log_requests(tmp_path/"b.log", filter=q.MaskingFilter())
    assert all(o in kept for o in q.PLANTED)                     # by the traceback
    assert "service" not in logging.root.manager.loggerDict      # no logger is left behind


@examples(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "dd"]), min_size=1, max_size=80))
def test_diversity_lies_between_its_ends(words):
    assert 0 < q.type_token(words) <= 1
    at, seen = q.vocabulary_growth(words)
    assert seen[-1] == len(set(words)) and (np.diff(seen) >= 0).all() and at[-1] == len(words)
    assert 1 <= q.effective_number(list(Counter(words).values())) <= len(set(words)) + 1e-9


def test_diversity_on_known_texts():
    assert q.distinct_n(["a"] * 11, 2) == .1 and q.distinct_n(list("abcd"), 2) == 1
    assert q.type_token(list("abab"), 2) == 1 and q.type_token(list("aaaa"), 2) == .5
    for wrong in (lambda: q.type_token([]), lambda: q.type_token(["a"], 5), lambda: q.distinct_n(["a"], 2), lambda: q.effective_number([0, 0])):
        with pytest.raises(UsageError): wrong()


def test_vendi_does_not_see_the_length_of_a_vector():
    x = np.random.default_rng(0).normal(size=(12, 5))
    assert abs(q.vendi(x) - q.vendi(x * np.arange(1, 13)[:, None])) < 1e-9 and 1 < q.vendi(x) <= 5 + 1e-9


@examples(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["the", "there", "in", "into", "to", "we", "x"]), min_size=1, max_size=12))
def test_segmentations_lose_no_character(words):
    known, text = Counter(dict(the=9, there=2, into=2, to=5, we=3)) + Counter({"in": 4}), "".join(words)
    for way in (q.longest_match, q.most_likely): assert "".join(way(text, known)) == text
    assert q.boundary_f1([words], [words], resamples=100).value == (100. if len(words) > 1 else 0.)


def test_the_most_likely_segmentation_prefers_what_is_frequent():
    known = Counter(a=5, man=50, aman=1, plan=40)
    assert q.most_likely("amanplan", known) == ["a", "man", "plan"] and q.longest_match("amanplan", known) == ["aman", "plan"]
    assert q.most_likely("", known) == []


def test_stop_words_go_and_the_rest_stays():
    assert q.without_stop_words("This is not the end.\nOr is it?") == "end.\n ?"
    assert q.without_stop_words("cat  dog", words={"x"}) == "cat dog"
    text = "Ünd the end"
    assert bytes(b for b, hit in zip(text.encode(), q.stop_word_bytes(text)) if hit) == b"the"


def test_bits_of_an_ngram_are_those_of_its_documents():
    counter, texts = q.fit_ngram(["abcabcabc" * 30], 4), ["abcabcabc", "é"]
    bits = q.ngram_bits(counter, texts, 100)
    assert bits.unit == "bits/byte" and bits.value == pytest.approx(sum(counter.nats(texts)) / 11 / np.log(2))


@examples(max_examples=40, deadline=None)
@given(st.text(max_size=80), st.floats(0, 1), st.integers(0, 5))
def test_typos_change_letters_only(text, rate, seed):
    noisy = q.with_typos(text, rate, seed)
    assert len(noisy) == len(text)
    assert all(a == b for a, b in zip(text, noisy) if not ("a" <= a.lower() <= "z" and a.isascii()))
    assert q.with_typos(text, 0.) == text


@examples(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.floats(0, .99), st.integers(0, 5))
def test_copies_keep_the_number_and_use_nothing_new(n, share, seed):
    found = q.with_copies(range(n), share, seed)
    assert len(found) == n and set(found) <= set(range(n)) and len(set(found)) == max(1, round(n * (1 - share)))


def test_a_curve_needs_its_clean_end_and_draws_it_once():
    drawn = []
    run = lambda r, i: drawn.append((r, i)) or np.array([1., 0.]) * (1 - r)
    found = q.curve((0, .5), run, seeds=3)
    assert drawn == [(0, 0), (.5, 0), (.5, 1), (.5, 2)] and isinstance(found[.5], stats.Estimate) and found[.5].value == .25
    with pytest.raises(UsageError, match="clean"): q.curve((.1, .2), run)
    with pytest.raises(UsageError): q.with_copies([1, 2], 1.)


def test_passages_are_enough_or_an_error_says_how_many_there_are():
    texts = ["a" * 900, "b" * 3000, "c" * 50]
    found = q.passages(texts, 2000, longest=1000)
    assert sum(map(len, found)) >= 2000 and all(200 <= len(o) <= 1000 for o in found)
    with pytest.raises(UsageError, match="3,900"): q.passages(texts, 10_000, longest=1000)


def test_rules_speak_only_when_one_of_them_does():
    assert q.by_rules("Whether to stop.") == "bool" and q.by_rules("Something else.") is None
    assert q.by_rules("Whether the number of rows counts.") is None


def test_one_changed_word_is_one_changed_word():
    text = "one two three four five"
    for seed in range(5): assert sum(a != b for a, b in zip(text.split(), q.one_word_changed(text, seed).split())) == 1
