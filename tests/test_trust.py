"""Trust: typos, canaries, injections, counterfactual pairs, attributions."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmlab.kit import models, store
from llmlab.kit.generation import generate
from llmlab.kit.settings import UsageError, settings
from llmlab.selection import candidates
from llmlab.selection import trust as t

TEXT = "Number of the rows, or CODE if TYPE is given by the user."
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=80)


@pytest.fixture(scope="module")
def lm(): return models.load("random:llama-tiny", task="causal-lm")


@examples(max_examples=40, deadline=None)
@given(texts, st.integers(0, 9))
def test_no_typos_at_rate_0_and_the_same_ones_for_the_same_seed(text, seed):
    assert t.typos(text, 0., seed=seed) == text
    assert t.typos(text, .5, seed=seed) == t.typos(text, .5, seed=seed)


@examples(max_examples=40, deadline=None)
@given(texts, st.floats(0, 1), st.integers(0, 9))
def test_each_kind_of_typo_does_what_it_says(text, rate, seed):
    swapped, hit, dropped = (t.typos(text, rate, (kind,), seed) for kind in ("swap", "key", "drop"))
    assert sorted(swapped) == sorted(text) and len(hit) == len(text) and len(dropped) <= len(text)
    for a, b in zip(text, hit): assert a == b or b in t.neighbours(a)


def test_placeholders_are_never_mistyped():
    for seed in range(20): assert {"CODE", "TYPE"} <= set(t.typos(TEXT, 1., seed=seed).split())


@pytest.mark.parametrize("letter", "abcdefghijklmnopqrstuvwxyzQ")
def test_neighbours_are_mutual(letter):
    assert 2 <= len(t.neighbours(letter)) <= 6
    assert all(letter in t.neighbours(o) for o in t.neighbours(letter))


def test_what_is_no_letter_has_no_neighbours(): assert t.neighbours("ß") == t.neighbours("1") == ""


@pytest.mark.parametrize("rate,kinds", [(1.1, ("key",)), (-.1, ("key",)), (.1, ()), (.1, ("shift",))])
def test_wrong_typos_are_refused(rate, kinds):
    with pytest.raises(UsageError): t.typos(TEXT, rate, kinds)


def test_phrases_are_replaced_whole_and_the_longest_first():
    assert t.replaced("Number of uses. The maximum number of rows.", t.SYNONYMS) == "Count of uses. The largest count of rows."
    assert t.replaced("A used MAXIMUM", t.SHORT | t.SYNONYMS) == "A employed MAXIMUM"
    assert t.replaced("size(x) of a resize", t.SYNONYMS) == "size(x) of a resize"


def test_reordering_keeps_every_sentence():
    assert t.reordered("If a is set, b is used.") == "B is used if a is set."
    assert t.reordered("One. Two. Three.") == "Three. One. Two." and t.reordered("One only.") == "One only."


def test_robustness_predicts_equal_texts_once_and_pairs_with_the_clean():
    asked = []
    def predict(batch):
        asked.extend(batch)
        return np.array([int("x" in o) for o in batch])
    found = t.robustness(predict, ["ax", "b", "cx"], np.array([1, 0, 1]), {"gone": lambda o, seed: o.replace("x", ""), "same": lambda o, seed: o}, (0, 1))
    assert len(asked) == len(set(asked)) == 5
    assert found["clean"].accuracy.value == 100 and found["same"].change.value == 0 and found["same"].flips == 0
    assert found["gone"].change.value == pytest.approx(-200 / 3) and found["gone"].flips == 4 and found["gone"].touched == pytest.approx(2 / 3)


def test_the_tree_of_secrets_is_the_list_of_all_sentences(lm):
    c = t.canaries(lm.tokenizer, (1,), 1, length=2, seed=3)[0]
    nats = t.secret_nats(lm, c)
    tok, head = lm.tokenizer, lm.tokenizer(c.prefix, add_special_tokens=False)["input_ids"]
    for secret in ((0, 0), (4, 2), (9, 9)):
        ids = torch.tensor([[tok.bos_token_id, *head, *tok("".join(c.digits[i] for i in secret), add_special_tokens=False)["input_ids"]]])
        with torch.inference_mode(): logp = lm.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-2:].sum()
        assert nats[secret].item() == pytest.approx(-logp.item(), abs=1e-3)


def test_exposure_counts_bits():
    nats = torch.arange(1000.).view(10, 10, 10)
    assert t.exposure(nats, (0, 0, 0)) == pytest.approx(math.log2(1000)) and t.exposure(nats, (9, 9, 9)) == 0
    assert t.exposure(torch.zeros(10, 10), (0, 0)) == 0  # of equal ones the true one is last


def test_exposure_by_chance_is_what_drawing_gives():
    mean, sd = t.chance_exposure(1000)
    drawn = math.log2(1000) - np.log2(np.random.default_rng(0).integers(1, 1001, 100_000))
    assert drawn.mean() == pytest.approx(mean, abs=.02) and drawn.std() == pytest.approx(sd, abs=.02)


def test_chance_explains_what_is_drawn_and_not_what_is_known():
    rng = np.random.default_rng(1)
    p = [t.by_chance(math.log2(1000) - np.log2(rng.integers(1, 1001, 8))) for _ in range(2000)]
    assert np.mean(np.array(p) < .05) == pytest.approx(.05, abs=.015)
    assert t.by_chance([math.log2(1000)] * 3) < 1e-5
    for wrong in ([], [-1.]):
        with pytest.raises(UsageError): t.by_chance(wrong)


def test_canaries_are_the_same_for_the_same_seed_and_have_names_of_their_own(lm):
    a = t.canaries(lm.tokenizer, (0, 4), 3, seed=1)
    assert a == t.canaries(lm.tokenizer, (0, 4), 3, seed=1) != t.canaries(lm.tokenizer, (0, 4), 3, seed=2)
    assert len({c.prefix for c in a}) == 6 and [c.repeats for c in a] == [0] * 3 + [4] * 3
    assert len(t.STATIONS) == len(set(t.STATIONS))
    with pytest.raises(UsageError, match="names"): t.canaries(lm.tokenizer, (0,), 100)


def test_a_tokenizer_that_joins_digits_is_refused():
    joined = lambda text, **_: {"input_ids": [text]}
    with pytest.raises(UsageError, match="digits"): t.digit_pieces(joined)


def test_a_model_that_knows_the_secret_gives_it_away(lm):
    c = t.canaries(lm.tokenizer, (1,), 1)[0]
    ids = lm.tokenizer(c.text, add_special_tokens=False)["input_ids"]
    class Parrot:
        def __call__(self, input_ids, use_cache):
            logits = torch.zeros(1, input_ids.shape[1], lm.model.config.vocab_size)
            for at in range(min(input_ids.shape[1], len(ids))): logits[0, at, ids[at]] = 9.
            return SimpleNamespace(logits=logits)
    known = SimpleNamespace(model=Parrot(), tokenizer=lm.tokenizer, device="cpu")
    assert t.extracted(known, c) and not t.extracted(lm, c)


def test_planting_makes_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(t.data, "load", lambda *a, **k: {"text": ["A long enough line of text that stands for a docstring, told twice over."] * 4})
    notes = t.planted(tmp_path, lm="random:llama-tiny", edition="random:llama-tiny", corpus="any", made_from="x", levels=(0, 2), each=1, tokens=100, biased=1,
                      block=32, batch=4)
    assert notes["tokens"] % 32 == 0 and len(notes["losses"]) == math.ceil(notes["tokens"] / 128)
    made = models.load(str(tmp_path), task="causal-lm")
    assert made.n_parameters == models.load("random:llama-tiny", task="causal-lm").n_parameters and made.weights == "random"


def test_recipes_name_what_the_notebook_asks_for(tmp_path):
    s = settings("smoke", lm="random:llama-tiny", device="cpu", out_dir=tmp_path)
    (first, _), (second, arguments) = t.recipes(s)
    assert first is candidates.features and second is t.planted and store.key(second, **arguments)


@examples(max_examples=60, deadline=None)
@given(texts, st.sampled_from([a for several in t.INJECTIONS.values() for a in several]))
def test_escaping_leaves_no_mark_and_changes_nothing_twice(host, attack):
    clean = t.escaped(host + attack.format(t="hacked", h=host, s="h a c k e d"))
    assert "\n" not in clean and "Type:" not in clean and "Description:" not in clean and t.escaped(clean) == clean


def test_there_are_a_dozen_attacks_of_several_kinds_beside_the_control():
    several = {k: v for k, v in t.INJECTIONS.items() if k != "mention"}
    assert len(several) >= 4 and sum(map(len, several.values())) >= 12
    assert all("{t}" in a or "{s}" in a for v in t.INJECTIONS.values() for a in v)


def test_answers_do_not_depend_on_the_batch(lm):
    prompts = ["Description: rows\nType:", "Description: a longer one of them\nType:", "x"]
    words = ["int", "str", "int"]
    together, pull = t.replies(lm, prompts, words, tokens=2)
    for p, w, said, nats in zip(prompts, words, together, pull):
        one, alone = t.replies(lm, [p], [w], tokens=2)
        assert one == [said] and alone[0] == pytest.approx(nats, abs=1e-3)
    again, twice = t.replies(lm, prompts * 2, words * 2, tokens=2)
    assert again == together * 2 and twice.tolist() == [*pull, *pull]


def test_replies_are_those_of_greedy_generation(lm):
    prompts = ["Description: rows\nType:", "Description: a longer one of them\nType:", "x"]
    said, none = t.replies(lm, prompts, tokens=6, batch_size=2)
    texts = [o.text.partition("\n\n")[0] for o in generate(lm, t._plain(lm, prompts), 6)]
    assert said == [next(iter(re.findall(r"[\w-]+", o)), "") for o in texts] and len(none) == 0
    assert t._first_word(lm.tokenizer, [lm.tokenizer.eos_token_id, *lm.tokenizer("int")["input_ids"]]) == ""


def test_counterfactual_is_the_first_less_the_second():
    score = lambda batch: np.array([len(o) for o in batch])
    assert t.counterfactual(score, (("abc", "d"), ("e", "fg")), ("{}.", "so {}")).tolist() == [2, -1]


def test_pairs_are_a_dozen_and_no_name_stands_on_both_sides():
    for pairs in t.PAIRS.values():
        assert len(pairs) == 12 and not {a for a, _ in pairs} & {b for _, b in pairs}


def test_favour_is_the_likelihood_of_the_endings(lm):
    begun, good, bad = "Anna", " wins.", " loses it."
    def nats(text):
        ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.inference_mode(): return lm.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    got = t.favour(lm, [begun, "A longer beginning"], ((good, bad),), batch_size=3)
    assert got[0] == pytest.approx(nats(begun + good) - nats(begun + bad), abs=1e-3)


@examples(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p):
    from statsmodels.stats.multitest import multipletests
    np.testing.assert_allclose(t.holm(p), multipletests(p, method="holm")[1], atol=1e-12)


def test_holm_refuses_what_is_no_probability():
    with pytest.raises(UsageError): t.holm([.1, 1.2])
    with pytest.raises(UsageError): t.holm([math.nan])


@examples(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40))
def test_gradients_of_a_line_are_complete_with_any_number_of_points(n_tokens, steps):
    g = torch.Generator().manual_seed(n_tokens)
    x, base, w = (torch.randn(n_tokens, 5, generator=g, dtype=torch.float64) for _ in range(3))
    f = lambda e: (e * w).sum((1, 2))
    got = t.integrated_gradients(f, x, base, steps, batch_size=7)
    torch.testing.assert_close(got, ((x - base) * w).sum(-1))
    torch.testing.assert_close(t.occlusion(f, x, base), ((x - base) * w).sum(-1))


def test_the_error_of_a_cubic_falls_with_the_square_of_the_points():
    x, base = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    off = [abs(t.integrated_gradients(lambda e: e.pow(3).sum((1, 2)), x, base, n).item() - 1) for n in (4, 8)]
    assert off[0] / off[1] == pytest.approx(4, rel=1e-6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(UsageError): t.integrated_gradients(lambda e: e.sum((1, 2)), torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(UsageError): t.integrated_gradients(lambda e: e.sum((1, 2)), torch.ones(2, 3), torch.ones(2, 3), steps=0)


def test_the_explained_output_is_that_of_the_probe_and_of_the_model(lm):
    m = models.load("random:bert-tiny")
    rng = np.random.default_rng(0)
    x, y = models.encode(m, [f"word {i}" for i in range(30)]).numpy(), rng.integers(0, 3, 30)
    probe = candidates.probe("p", m, "mean", (x, y), (x, y))
    e = t.label_output(probe, "word 7", 1)
    logits = probe.head.decision_function(models.encode(m, ["word 7"]).numpy())[0]
    with torch.inference_mode(): assert float(e.f(e.x[None])) == pytest.approx(logits[1] - logits.mean(), abs=1e-3)
    assert t.gap(e, t.integrated_gradients(e.f, e.x, e.baseline, 64)) < .05 and len(e.tokens) == len(e.x)
    n = t.next_output(lm, "Return the", 5)
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer("Return the", add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode(): assert float(n.f(n.x[None])) == pytest.approx(lm.model(input_ids=ids).logits[0, -1].log_softmax(-1)[5].item(), abs=1e-3)


def test_coloured_text_is_escaped():
    e = t.Explained(("<b>", "&"), torch.zeros(2, 1), torch.zeros(2, 1), None, "logit of <x>")
    page = t.Coloured([e], [torch.tensor([1., -.5])])._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "&lt;x&gt;" in page
    assert "nan" not in t.Coloured([e], [torch.zeros(2)])._repr_html_()
