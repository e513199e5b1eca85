"""Learned prompts: what a reader need not see."""
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings as quick, strategies as st

from llmlab.finetuning import prompts as p
from llmlab.kit import additions, data, metrics, models, training, yardsticks
from llmlab.kit.settings import Damaged, UsageError, settings
from test_compression import TINY, drawn

WORDS = [65, 66, 67]


@pytest.fixture(scope="module")
def llama(): return models.load("random:llama-tiny", task="causal-lm")


@pytest.fixture(scope="module")
def tok(): return bytewise()


def rows(texts, labels, tok):
    from datasets import Dataset
    return training.tokenized(Dataset.from_dict(dict(text=texts, label=labels)), tok)


def said(loaded, texts): return yardsticks.predictions(p.cloze(loaded, WORDS), texts)


@cache
def bytewise(): return models.load("random:llama-tiny", task="causal-lm").tokenizer


# the cloze

class Pieces:
    "A tokenizer whose words are given."
    def __init__(self, **words): self.words = words
    def __call__(self, text, **_): return dict(input_ids=self.words.get(text.strip(), [7, 8]))
    def decode(self, ids): return f"<{ids[0]}>"


def test_a_word_of_several_tokens_is_refused_by_name():
    with pytest.raises(UsageError, match=r"'maybe' for the class 'c' is 2 tokens .*<7>"): p.verbalizer(Pieces(yes=[1], no=[2]), "abc", ["yes", "no", "maybe"])


def test_a_known_word_stands_in_for_one_in_pieces():
    assert p.verbalizer(Pieces(function=[3], bool=[4]), ["callable", "bool"]) == [3, 4]


@pytest.mark.parametrize("words, message", [(["yes", "yes"], "the same word"), (["yes"], "2 classes and 1 words")])
def test_words_and_classes_go_together(words, message):
    with pytest.raises(UsageError, match=message): p.verbalizer(Pieces(yes=[1]), ["a", "b"], words)


@pytest.mark.parametrize("template", ["Type:", "{text} or {text}", ""])
def test_a_template_needs_one_place(template, tok):
    with pytest.raises(UsageError, match=r"\{text\}"): p.filled(template, ["x"], tok)


@quick(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=5), st.integers(12, 40))
def test_the_question_is_never_cut(texts, most):
    tok = bytewise()
    made = p.filled("{text} Type:", texts, tok, most)
    assert len(made) == len(texts)
    for t, o in zip(texts, made):
        assert o.endswith(" Type:") and t.startswith(o.removesuffix(" Type:"))
        assert len(tok(o)["input_ids"]) <= most


def test_no_room_for_a_text(tok):
    with pytest.raises(UsageError, match="leaves no room"): p.filled("{text} Type:", ["x"], tok, 6)


@pytest.mark.parametrize("name", TINY)
def test_a_cloze_is_the_words_logits_after_the_last_token(name):
    m = drawn(TINY[name]())
    texts = ["a", "some longer text", "xyz"]
    got = said(m, texts)
    for t, row in zip(texts, got):
        with torch.inference_mode(): whole = m.model(input_ids=torch.tensor([m.tokenizer(t)["input_ids"]])).logits[0, -1, WORDS]
        torch.testing.assert_close(row, whole, rtol=1e-4, atol=1e-5)


def test_only_a_language_model_with_a_choice(llama):
    with pytest.raises(UsageError, match="causal-lm"): p.cloze(models.load("random:bert-tiny"), WORDS)
    with pytest.raises(UsageError, match="one class"): p.cloze(llama, [65])


@quick(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_a_prior_that_all_texts_share_is_taken_out(n, classes, seed):
    g = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(n, classes, generator=g, dtype=torch.float64), torch.randn(classes, generator=g, dtype=torch.float64)
    one = torch.zeros(1, classes, dtype=torch.float64)
    found = metrics.calibrated((x + bias).log_softmax(-1), (one + bias).log_softmax(-1))
    torch.testing.assert_close(found.softmax(-1), x.softmax(-1))


def test_a_prior_needs_a_text():
    with pytest.raises(UsageError, match="empty"): metrics.calibrated(torch.zeros(1, 2), torch.zeros(0, 2))


# prompts

@pytest.mark.parametrize("name", TINY)
def test_a_prompt_of_words_is_those_words(name):
    m = drawn(TINY[name]())
    soft = p.add_prompt(m, 6, text="Label:")
    ids = torch.tensor([m.tokenizer("Label:")["input_ids"] + m.tokenizer("abc")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(soft.model(input_ids=ids[:, 6:]).logits, m.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert [n for n, o in soft.model.named_parameters() if o.requires_grad] == ["prompt"]
    assert all(o.requires_grad for o in m.model.parameters()), "the original is frozen"


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_peft_says_the_same_and_a_prompt_may_be_read_once(name):
    import peft
    m = drawn(TINY[name]())
    mine = p.add_prompt(m, 5, seed=3)
    theirs = p.in_peft(m, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with torch.no_grad(): theirs.model.prompt_encoder["default"].embedding.weight.copy_(mine.model.prompt)
    texts = ["a", "some longer text", "xyz"]
    torch.testing.assert_close(said(mine, texts), said(theirs, texts), rtol=1e-4, atol=1e-5)
    kept = p.replace(mine, model=p.ReadOnce(mine.model))
    torch.testing.assert_close(said(mine, texts), said(kept, texts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", p.KINDS)
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_foreseen_parameters_are_trained(name, kind):
    m = drawn(TINY[name]())
    assert p.trained_parameters(p.tunable(m, kind, 4)) == p.prompt_cost(models.geometry(m), 4, kind).trained


@pytest.mark.parametrize("method", p.METHODS)
def test_each_method_learns_and_only_full_moves_the_base(method, llama):
    import copy
    base = copy.deepcopy(llama.model.state_dict())
    tuned = p.cloze(p.tunable(llama, method, 4), WORDS)
    x = rows(["aaaa", "bbbb", "cccc"] * 4, [0, 1, 2] * 4, llama.tokenizer)
    done = training.fit(tuned, x, steps=3, batch_size=12, lr=1e-2, schedule="constant", warmup=0., log_every=1, in_place=True)
    losses = [v for _, v in done.of("loss")]
    assert losses[-1] < losses[0]
    for k, v in llama.model.state_dict().items(): assert torch.equal(v, base[k])
    if method != "full": assert p.trained_parameters(tuned) < llama.n_parameters / 4


@pytest.mark.parametrize("given_, message", [(dict(n_tokens=0), "at least 1"), (dict(n_tokens=10**6), "below the context"), (dict(text=""), "no token")])
def test_prompts_that_cannot_be(llama, given_, message):
    with pytest.raises(UsageError, match=message): p.add_prompt(llama, **given_)


def test_what_a_prompt_does_not_go_before(llama):
    with pytest.raises(UsageError, match="causal-lm"): p.add_prompt(models.load("random:bert-tiny"))
    with pytest.raises(UsageError, match="already"): p.add_prompt(p.add_prompt(llama, 2))
    with pytest.raises(UsageError, match="soft prompt"): p.tunable(llama, "soft promt")
    with pytest.raises(UsageError, match="prefix"): p.prompt_cost(models.geometry(llama), 2, "prefx")


# kept

def test_a_prompt_knows_its_base(llama, tmp_path):
    soft = p.add_prompt(llama, 3)
    with torch.no_grad(): soft.model.prompt.normal_(generator=torch.Generator().manual_seed(1))
    folder = p.save_prompt(p.cloze(soft, WORDS), tmp_path/"prompt")
    torch.testing.assert_close(said(p.load_prompt(llama, folder), ["ab"]), said(soft, ["ab"]))
    assert models.size_on_disk(folder) < 4 * soft.model.prompt.numel() + 400
    other = models.load("random:llama-tiny", task="causal-lm", seed=1)
    with pytest.raises(UsageError, match="trained on random:llama-tiny"): p.load_prompt(other, folder)
    assert not torch.allclose(said(p.load_prompt(other, folder, check=False), ["ab"]), said(soft, ["ab"]))
    with pytest.raises(UsageError, match="vectors of"): p.load_prompt(drawn(TINY["gpt2"]()), folder, check=False)
    (folder/additions.FILE).write_bytes(b"torn")
    with pytest.raises(Damaged, match="cannot be read"): p.load_prompt(llama, folder)


def test_nothing_to_save(llama, tmp_path):
    with pytest.raises(UsageError, match="no soft prompt"): p.save_prompt(llama, tmp_path)


# few examples

@quick(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=60), st.integers(0, 5))
def test_draws_are_balanced_and_nested(y, seed):
    most = min(y.count(c) for c in {*y})
    if len({*y}) < 2: return
    small, large = p.few(y, 1, seed), p.few(y, most, seed)
    assert large[:len(small)] == small and len({*large}) == len(large)
    assert all([y[i] for i in large].count(c) == most for c in {*y})


@pytest.mark.parametrize("y, shots, message", [
    ([0, None, 1], 1, "row 1 has no label"), ([1, 1], 1, "one class"), ([0, 1], 2, "class 0 has 1"), ([0, 1], 0, "at least 1"),
    ([0, -1, 1], 1, "row 1 has no label"), ([0., math.nan], 1, "row 1 has no label")])
def test_draws_that_cannot_be(y, shots, message):
    with pytest.raises(UsageError, match=message): p.few(y, shots)


def test_rows_without_labels_train_nothing(llama):
    with pytest.raises(UsageError, match="no label"): rows(["a", "b"], [0, None], llama.tokenizer)


def test_an_interval_covers_draws_and_texts():
    "Of simulated figures whose truth is known, the interval holds most."
    rng, hits, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        logit = rng.normal(0, .5, (3, 1)) + rng.normal(0, 1, (1, 40))
        e = p.over_draws(rng.random((3, 40)) < 1 / (1 + np.exp(-logit)))
        hits += e.low <= 50 <= e.high
    assert hits > .93 * trials


def test_an_interval_of_one_draw_or_of_no_spread():
    one = p.over_draws([[0, 1, 1, 0]])
    assert one.value == 50 and one.low < 50 < one.high
    same = p.over_draws([[1, 1], [1, 1]])
    assert same.low == same.value == same.high == 100
    assert p.over_draws([[1, 0]] * 2, [[1, 0]] * 2).value == 0
    assert [o.unit for o in (one, p.over_draws([[1, 0]] * 2, [[0, 0]] * 2))] == ["%", "points"]
    with pytest.raises(UsageError, match="other draws"): p.over_draws([[1, 0]], [[1, 0, 1]])


def test_every_profile_asks_for_what_the_task_has():
    train = data.load("embedded:parameter-type", "train")
    least = min(train["label"][:].count(k) for k in {*train["label"]})
    for profile in ("smoke", "tiny", "thorough"):
        asked = [a for _, a in p.recipes(settings(profile)) if "method" in a]
        assert {a["method"] for a in asked} == {*p.METHODS} and all(a["rate_size"] <= least and max(a["sizes"]) <= least for a in asked)
    assert {*asked[0]["sizes"]} >= {4, 256}


def test_rows_without_a_label_column_make_no_cloze(llama):
    from datasets import Dataset
    with pytest.raises(UsageError, match="no column 'label'"): p.cloze_rows(Dataset.from_dict(dict(text=["a"])), "{text}:", llama.tokenizer)
