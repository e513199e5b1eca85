"""Metrics: equal to the reference implementations, on easy and on awkward cases; what is missing is an error."""
import math
import warnings

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from rouge_score import rouge_scorer
from sklearn.metrics import accuracy_score, label_ranking_average_precision_score, precision_recall_fscore_support

from llmlab.kit import metrics, models
from llmlab.kit.settings import Unavailable, UsageError
from llmlab.kit.stats import difference, mcnemar

FEW = dict(resamples=20)


# Labels

labels = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@hypothesis_settings(max_examples=60, deadline=None)
@given(labels, st.sampled_from(["macro", "micro", "weighted"]))
def test_labels_as_scikit_learn_scores_them(pairs, average):
    predicted, truth = zip(*pairs)
    assert metrics.accuracy(predicted, truth, **FEW).value == pytest.approx(100 * accuracy_score(truth, predicted))
    theirs = precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)[:3]
    ours = metrics.precision_recall_f1(predicted, truth, average, **FEW)
    assert [e.value for e in ours.values()] == pytest.approx([100 * o for o in theirs])
    for e in ours.values(): assert e.n == len(pairs) and e.low <= e.value <= e.high


@pytest.mark.parametrize("predicted,truth", [([1, 1, 0], [1, 0, 0]), ([0, 0, 0], [1, 0, 1]), ([1, 0, 1], [0, 0, 0])])
def test_binary_as_scikit_learn(predicted, truth):
    theirs = precision_recall_fscore_support(truth, predicted, average="binary", zero_division=0)[:3]
    ours = metrics.precision_recall_f1(predicted, truth, "binary", **FEW)
    assert [e.value for e in ours.values()] == pytest.approx([100 * o for o in theirs])


def test_labels_of_any_kind():
    for kind in (np.array, torch.tensor, tuple): assert metrics.accuracy(kind([1, 2, 3, 4]), [1, 2, 3, 0]).value == 75
    assert metrics.accuracy(["a", "b"], ["a", "c"]).value == 50
    assert metrics.precision_recall_f1(["a", "b"], ["a", "c"], "binary", positive="a", **FEW)["f1"].value == 100


def test_labels_compare_in_pairs():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300); a = np.where(rng.random(300) < .8, truth, 9); b = np.where(rng.random(300) < .1, 9, a)
    x, y = (metrics.accuracy(o, truth) for o in (a, b))
    assert difference(x, y).low > 0 and mcnemar(x, y).p_value < 1e-3
    f, g = (metrics.precision_recall_f1(o, truth, resamples=200)["f1"] for o in (a, b))
    d = difference(f, g, resamples=200)
    assert d.value == pytest.approx(f.value - g.value) and d.high - d.low < f.high - f.low  # the same items: noise they share is gone


@pytest.mark.parametrize("predicted,truth", [([], []), ([1], [1, 2]), ([math.nan], [1]), ([1], [None]), (torch.tensor([float("nan")]), [1])])
@pytest.mark.parametrize("metric", [metrics.accuracy, metrics.precision_recall_f1])
def test_missing_labels_are_refused(metric, predicted, truth):
    with pytest.raises(UsageError): metric(predicted, truth)


def test_unknown_averages_and_classes_are_refused():
    with pytest.raises(UsageError, match="macro"): metrics.precision_recall_f1([1], [1], "makro")
    with pytest.raises(UsageError, match="neither"): metrics.precision_recall_f1([1], [1], "binary", positive=7)


# Texts

CASES = {
    "plain": (["the cat sat on the mat", "a dog ran home quickly today"], [["the cat sat on a mat"], ["the dog ran home today"]]),
    "equal": (["the same words here now", "and again the same words"], [["the same words here now"], ["and again the same words"]]),
    "empty answers": (["", "the cat sat on the mat"], [["something was meant"], ["the cat sat on the mat"]]),
    "all empty": (["", ""], [["something"], ["else"]]),
    "empty references": (["a cat sat on it", "the cat sat on the mat"], [[""], ["the cat sat on the mat"]]),
    "several references": (["the cat sat on the mat", "a dog ran home"],
        [["a cat sat there", "the cat is on the mat", "no"], ["the dog ran", "dogs run home", "a dog went home"]]),
    "case and punctuation": (["Hello, World! It's 3.14."], [["hello world it's 3.14"]]),
    "Chinese": (["模型在文本上训练", "猫坐在垫子上。"], [["模型在文本上训练过"], ["猫坐在了垫子上。"]]),
    "one word": (["yes"], [["yes"]]),
}
streams = lambda references: [list(o) for o in zip(*references)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokenize", ["13a", "zh", "char", "intl", "none"])
def test_bleu_is_sacrebleus(case, tokenize):
    predicted, references = CASES[case]
    ours, theirs = metrics.bleu(predicted, references, tokenize=tokenize, **FEW), sacrebleu.corpus_bleu(predicted, streams(references), tokenize=tokenize)
    assert ours.value == pytest.approx(theirs.score) and ours.n == len(predicted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_is_sacrebleus(case, word_order):
    predicted, references = CASES[case]
    theirs = sacrebleu.corpus_chrf(predicted, streams(references), word_order=word_order)
    assert metrics.chrf(predicted, references, word_order, **FEW).value == pytest.approx(theirs.score)


@pytest.mark.parametrize("case", ["plain", "equal", "several references", "case and punctuation", "Chinese"])
def test_bleu_and_chrf_as_torchmetrics_has_them(case):
    "On usual texts. torchmetrics does not smooth BLEU, and differs from sacrebleu in chrF of empty and of very short texts."
    from torchmetrics.functional.text import chrf_score, sacre_bleu_score
    predicted, references = CASES[case]
    tokenize = "zh" if case == "Chinese" else "13a"
    theirs = sacre_bleu_score(predicted, references, tokenize=tokenize).item()
    if theirs: assert metrics.bleu(predicted, references, tokenize=tokenize, **FEW).value == pytest.approx(100 * theirs, rel=1e-4)
    assert metrics.chrf(predicted, references, **FEW).value == pytest.approx(100 * chrf_score(predicted, references, n_word_order=0).item(), rel=1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokenize", ["english", "stemmed", "characters"])
def test_rouge_is_rouge_scores(case, tokenize):
    predicted, references = CASES[case]
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    if case == "Chinese" and tokenize != "characters":
        with pytest.raises(UsageError, match="characters"): metrics.rouge(predicted, references, tokenize=tokenize)
        return
    scorer = rouge_scorer.RougeScorer(list(kinds), use_stemmer=tokenize == "stemmed", tokenizer=metrics.Characters() if tokenize == "characters" else None)
    found = [scorer.score_multi(r, p) for p, r in zip(predicted, references)]
    ours = metrics.rouge(predicted, references, kinds, tokenize, **FEW)
    for k in kinds: assert ours[k].value == pytest.approx(100 * np.mean([f[k].fmeasure for f in found]))


@pytest.mark.parametrize("case", ["plain", "equal", "empty answers", "several references", "case and punctuation"])
def test_rouge_as_torchmetrics_has_it(case):
    from torchmetrics.functional.text import rouge_score
    predicted, references = CASES[case]
    theirs = rouge_score(predicted, references, rouge_keys=("rouge1", "rouge2", "rougeL"), accumulate="best")
    ours = metrics.rouge(predicted, references, **FEW)
    for k in ("rouge1", "rouge2"): assert ours[k].value == pytest.approx(100 * theirs[f"{k}_fmeasure"].item(), abs=1e-3)
    if len(references[0]) == 1: assert ours["rougeL"].value == pytest.approx(100 * theirs["rougeL_fmeasure"].item(), abs=1e-3)


def test_references_may_differ_in_number():
    predicted, references = ["a cat sat", "a dog ran"], ["a cat sat down", ["a dog ran off", "the dog ran"]]
    theirs = sacrebleu.corpus_bleu(predicted, [["a cat sat down", "a dog ran off"], [None, "the dog ran"]])
    assert metrics.bleu(predicted, references, **FEW).value == pytest.approx(theirs.score)
    assert metrics.chrf(predicted, references, **FEW).n == 2


@pytest.mark.parametrize("metric", [metrics.bleu, metrics.chrf, metrics.rouge])
@pytest.mark.parametrize("predicted,references", [([], []), (["a"], []), (["a"], [[]]), (["a"], [[None]]), ([None], ["a"]), ([3], ["a"]), ([math.nan], ["a"])])
def test_missing_texts_are_refused(metric, predicted, references):
    with pytest.raises(UsageError): metric(predicted, references)


def test_unknown_tokenizers_and_kinds_are_refused():
    with pytest.raises(UsageError, match="Did you mean char"): metrics.bleu(["a"], ["a"], tokenize="chars")
    with pytest.raises(UsageError, match="english"): metrics.rouge(["a"], ["a"], tokenize="englisch")
    with pytest.raises(UsageError, match="rougeX"): metrics.rouge(["a"], ["a"], kinds=("rougeX",))


def test_a_corpus_interval_covers_the_corpus():
    rng = np.random.default_rng(0)
    words = np.array("the a cat dog ran sat on mat home fast".split())
    truth = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    said = [" ".join(w if rng.random() < .8 else "x" for w in t.split()) for t in truth]
    e = metrics.bleu(said, truth, resamples=200)
    assert e.low < e.value < e.high and e.high - e.low < 25 and metrics.bleu(said, truth, resamples=200) == e


# Rankings

@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_ranks_as_scikit_learn_breaks_ties(n, m, seed):
    "Documents drawn from few directions, so that many are tied; the label ranking precision counts ties against the right one too."
    rng = np.random.default_rng(seed)
    directions = torch.eye(3)
    q, d, right = directions[rng.integers(0, 3, n)], directions[rng.integers(0, 3, m)], rng.integers(0, m, n)
    found = metrics.ranks(q, d, right)
    truth = np.eye(m, dtype=int)[right]
    if m > 1: assert metrics.mrr(found, **FEW).value == pytest.approx(label_ranking_average_precision_score(truth, (q @ d.T).numpy()))
    assert metrics.recall_at_k(found, m, **FEW).value == 100


def test_ranks_as_torchmetrics_without_ties():
    from torchmetrics.retrieval import RetrievalMRR, RetrievalRecall
    torch.manual_seed(0)
    q, d = torch.randn(20, 8), torch.randn(30, 8)
    found = metrics.ranks(q, d, chunk=7)
    scores = torch.nn.functional.cosine_similarity(q[:, None], d[None], dim=-1).sigmoid()  # of negative scores torchmetrics 1.9 makes another MRR
    which, target = torch.arange(20)[:, None].expand(20, 30), torch.eye(20, 30, dtype=torch.bool)
    assert metrics.mrr(found, **FEW).value == pytest.approx(RetrievalMRR()(scores, target, indexes=which).item(), rel=1e-5)
    assert metrics.recall_at_k(found, 5, **FEW).value == pytest.approx(100 * RetrievalRecall(top_k=5)(scores, target, indexes=which).item(), rel=1e-5)


def test_a_model_without_opinion_is_last():
    assert metrics.ranks(torch.ones(3, 4), torch.ones(5, 4)).tolist() == [5, 5, 5] and metrics.ranks(torch.zeros(1, 4), torch.ones(5, 4)).tolist() == [5]


@pytest.mark.parametrize("q,d,right", [((2, 3), (2, 4), None), ((3, 4), (2, 4), None), ((2, 4), (2, 4), [0]), ((2, 4), (2, 4), [0, 2]), ((0, 4), (2, 4), None)])
def test_rankings_that_do_not_fit_are_refused(q, d, right):
    with pytest.raises(UsageError): metrics.ranks(torch.ones(*q), torch.ones(*d), right)


def test_rankings_of_nan_are_refused():
    with pytest.raises(UsageError, match="NaN"): metrics.ranks(torch.full((1, 4), math.nan), torch.ones(1, 4))
    for bad in ([], [0], [math.nan]):
        with pytest.raises(UsageError): metrics.mrr(bad)
    with pytest.raises(UsageError, match="k must"): metrics.recall_at_k([1], 0)


# Likelihood

@given(st.integers(0, 300), st.integers(1, 64), st.data())
def test_windows_score_every_token_once(n, window, data):
    stride = data.draw(st.integers(1, window))
    found = list(metrics.windows(n, window, stride))
    assert [i for begin, end, first in found for i in range(first, end)] == list(range(n))
    for begin, end, first in found:
        assert begin <= first < end and end - begin <= window
        assert begin == 0 or first - begin >= window - stride


@pytest.fixture(scope="module")
def lm(): return models.load("random:llama-tiny", task="causal-lm", seed=1)


def test_likelihood_is_the_models_own_loss(lm):
    texts = ["Return the mean.", "模型", "", "x"]
    found = metrics.lm_nats(lm, texts, batch_size=3)
    for text, nats in zip(texts, found.nats):
        ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(text).input_ids]])
        with torch.no_grad(): assert nats == pytest.approx(lm.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) if text else 0, rel=1e-5)
    assert found.n_bytes == (16, 6, 0, 1) and found.tokens == (16, 6, 0, 1)


def test_likelihood_by_torchmetrics(lm):
    from torchmetrics.text import Perplexity
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer("Return the mean of x.").input_ids]])
    with torch.no_grad(): theirs = Perplexity()(lm.model(ids).logits[:, :-1], ids[:, 1:]).item()
    assert metrics.lm_nats(lm, ["Return the mean of x."]).perplexity.value == pytest.approx(theirs, rel=1e-4)


def test_windows_with_full_context_change_nothing(lm):
    text = "Return the mean of the values, ignoring NaN. " * 3
    whole, batches = metrics.lm_nats(lm, [text, "x"]), metrics.lm_nats(lm, [text, "x"], batch_size=1)
    assert whole.nats == pytest.approx(batches.nats, rel=1e-6)
    assert metrics.lm_nats(lm, [text], window=20, stride=1).tokens == (len(text),)


def test_likelihood_refusals(lm):
    with pytest.raises(UsageError, match="causal-lm"): metrics.lm_nats(models.load("random:llama-tiny"), ["a"])
    with pytest.raises(UsageError, match="empty"): metrics.lm_nats(lm, [])
    with pytest.raises(UsageError, match="nothing to score"): _ = metrics.lm_nats(lm, [""]).bits_per_byte
    for wrong in (dict(window=0), dict(window=10**6), dict(window=8, stride=9), dict(stride=0)):
        with pytest.raises(UsageError, match="window"): metrics.lm_nats(lm, ["a"], **wrong)


@pytest.mark.parametrize("nats,below", [(math.nan, 1), ([1, math.nan], [1, 1]), (1, 0), ([1, 1], [1, 0]), ([1], [1, 2]), ([], []), (1, -1), (math.inf, 1)])
@pytest.mark.parametrize("metric", [metrics.perplexity, metrics.bits_per_byte])
def test_impossible_likelihoods_are_refused(metric, nats, below):
    with pytest.raises(UsageError): metric(nats, below)


def test_perplexity_of_a_fair_die():
    assert metrics.perplexity([math.log(6) * 10, math.log(6) * 4], [10, 4]).value == pytest.approx(6)
    assert metrics.bits_per_byte([math.log(2) * 16, 0], [2, 0]).value == pytest.approx(8)


# The metrics of others

SCRIPT = """
import datasets
import evaluate
class Metric(evaluate.Metric):
    def _info(self): return evaluate.MetricInfo(description="", citation="", inputs_description="",
        features=datasets.Features(predictions=datasets.Value("string"), references=datasets.Value("string")))
    def _compute(self, predictions, references, scale=1):
        import sacrebleu
        return {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score * scale}
"""


def test_a_local_metric_script_gives_the_same_result(tmp_path):
    (tmp_path/"script.py").write_text(SCRIPT)
    predicted, references = CASES["plain"]
    theirs = metrics.evaluated(tmp_path/"script.py", predicted, [r[0] for r in references], scale=2)
    assert theirs["bleu"] / 2 == pytest.approx(metrics.bleu(predicted, references, **FEW).value)


def test_a_metric_that_cannot_be_had_names_the_way_on(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no metric script"): metrics.evaluated(tmp_path/"none.py", [1], [1])
    (tmp_path/"broken.py").write_text("1 / 0")
    with pytest.raises(Unavailable, match="accuracy, precision_recall_f1, bleu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics.evaluated(tmp_path/"broken.py", [1], [1])
    import evaluate
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no hub here")))
    with pytest.raises(Unavailable, match="no hub here.*bleu"): metrics.evaluated("accuracy", [1], [1])
