"""Instruction and preference tuning: what a reader need not see."""
import json
import math
import stat

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings as quick, strategies as st
from transformers import LlamaConfig

from llmlab.finetuning import instruction as it, preference as pt
from llmlab.finetuning.preference import Pair, Rating
from llmlab.kit import compression, models, stats, training
from llmlab.kit.settings import UsageError
from test_compression import TINY, drawn

WORDS = st.text(st.sampled_from("abcde .\n\"\\é{}"), min_size=1, max_size=20).filter(str.strip)


@pytest.fixture(scope="module")
def llama():
    return drawn(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=259, max_position_embeddings=256))


def row(loaded, prompt="Summarise.", answer="Return it.", **more): return it.row_of(loaded.tokenizer, prompt, answer, it.context_of(loaded), **more)


# instruction

def test_what_counts_of_a_row(llama):
    everything, answer, endless = (row(llama, counted=o) for o in ("everything", "answer", "answer without its end"))
    assert everything["labels"] == everything["input_ids"] == answer["input_ids"] == endless["input_ids"]
    n = len(it.prompt_tokens(llama.tokenizer, "Summarise."))
    assert answer["labels"] == [-100] * n + answer["input_ids"][n:] and answer["labels"][-1] == llama.tokenizer.eos_token_id
    assert endless["labels"] == [*answer["labels"][:-1], -100]
    assert llama.tokenizer.decode(answer["input_ids"][n:-1]) == "Return it."


@pytest.mark.parametrize("given, said", [(dict(prompt=" "), "prompt is empty"), (dict(answer="\n"), "is empty"),
    (dict(counted="all"), "answer without its end")])
def test_a_row_that_teaches_nothing_is_refused(llama, given, said):
    with pytest.raises(UsageError, match=said): row(llama, **given)


def test_a_row_over_the_context_is_refused_and_measured(llama):
    with pytest.raises(UsageError, match="10 of the answer.*context of 12"): it.row_of(llama.tokenizer, "Summarise.", "Return it.", 12)


def test_a_tokenizer_without_an_end_is_refused(llama):
    import copy
    tok = copy.deepcopy(llama.tokenizer)
    tok.eos_token = None
    with pytest.raises(UsageError, match="eos_token"): it.row_of(tok, "a", "b", 99)


def test_a_chat_template_is_used_where_there_is_one(llama):
    import copy
    tok = copy.deepcopy(llama.tokenizer)
    tok.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    assert tok.decode(it.prompt_tokens(tok, "hi")) == "[user]hi[a]"


def test_the_embedded_tokenizer_has_turns():
    tok = models.load("embedded:lm-small", task="causal-lm").tokenizer
    assert tok.decode(it.prompt_tokens(tok, "hi")) == "<s><|user|>hi<|assistant|>"


def test_an_unknown_instruction_is_named():
    with pytest.raises(UsageError, match="summarise"): it.ask("a text", "sumarise")


@quick(max_examples=25, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_padding_hides_nothing_and_adds_nothing(llama, pairs):
    rows = [row(llama, p, a) for p, a in pairs]
    for pad in (0, llama.tokenizer.eos_token_id):  # a token that pads may be one that counts
        b = it.padded(rows, pad)
        for r, x, mask, y in zip(rows, b["input_ids"], b["attention_mask"], b["labels"]):
            assert x[mask.bool()].tolist() == r["input_ids"] and y[mask.bool()].tolist() == r["labels"] and (y[mask == 0] == -100).all()


@pytest.mark.parametrize("name", TINY)
def test_losses_are_those_of_the_library(name):
    m = drawn(TINY[name]())
    rows = [row(m, "one", "two three"), row(m, "a longer request", "four")]
    b = it.padded(rows)
    with torch.no_grad():
        logits = m.model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), b["labels"][:, 1:].flatten())
        torch.testing.assert_close(it.sft_loss(logits, b["labels"]), theirs)
        torch.testing.assert_close(it.answers_alone(m, b), theirs, rtol=1e-4, atol=1e-5)
        one = m.model(input_ids=torch.tensor([rows[1]["input_ids"]])).logits
    torch.testing.assert_close(it.answer_logps(logits, b["labels"])[1:], it.answer_logps(one, torch.tensor([rows[1]["labels"]])), rtol=1e-4, atol=1e-4)


def test_rows_need_a_way_to_become_a_batch(llama):
    with pytest.raises(UsageError, match="collate"): training.fit(llama, [row(llama)], steps=1)
    with pytest.raises(UsageError, match="empty"): training.fit(llama, [], steps=1, collate=it.padded)


def test_the_end_is_learned_only_if_it_counts(llama):
    prompt, end = "Say it.", llama.tokenizer.eos_token_id
    for counted, learned in (("answer", True), ("answer without its end", False)):
        done = training.fit(llama, [row(llama, prompt, "Yes.", counted=counted)] * 4, steps=30, batch_size=4, lr=1e-2, collate=it.padded).loaded
        x = torch.tensor([row(llama, prompt, "Yes.")["input_ids"][:-1]])
        with torch.inference_mode(): likely = done.model(input_ids=x).logits[0, -1].softmax(-1)[end].item()
        assert (likely > .5) == learned


# ratings

def test_ratings_are_masked_before_they_are_written(tmp_path):
    file = tmp_path/"r.jsonl"
    assert pt.keep(file, [Rating("Mail a.b@example.org", "See /home/alice/x", True)]) == dict(email=1, home=1)
    text = file.read_text()
    assert "example.org" not in text and "alice" not in text and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert pt.kept(file).ratings == (Rating("Mail [email]", "See [home]/x", True),)


@quick(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=4), st.integers(0, 400))
def test_a_writer_that_dies_costs_no_more_than_its_line(tmp_path_factory, given_, cut):
    file = tmp_path_factory.mktemp("r")/"r.jsonl"
    rows = [Rating(*o) for o in given_]
    pt.keep(file, rows)
    whole = file.read_bytes()
    file.write_bytes(whole[:min(cut, len(whole))])
    left = whole[:min(cut, len(whole))].decode("utf-8", "replace").split("\n")
    before = [o for line in left if (o := _rating(line))]
    pt.keep(file, [Rating("new", "one", True)])
    found = pt.kept(file)
    assert list(found.ratings) == [*before, Rating("new", "one", True)] and len(found.torn) <= 1


def _rating(line):
    try: return Rating(**json.loads(line))
    except ValueError: return None


def test_nothing_written_is_nothing_lost(tmp_path):
    file = tmp_path/"r.jsonl"
    pt.keep(file, [Rating("a", "b", True)])
    pt.keep(file, [])
    assert len(pt.kept(file).ratings) == 1


@pytest.mark.parametrize("content, said", [("", "holds no rating"), ("[1]\n{}\n{\"prompt\": 1, \"answer\": \"\", \"up\": true}\n", "3 lines that are none")])
def test_a_file_without_ratings_is_refused(tmp_path, content, said):
    (tmp_path/"r.jsonl").write_text(content)
    with pytest.raises(UsageError, match=said): pt.kept(tmp_path/"r.jsonl")
    with pytest.raises(UsageError, match="no ratings at"): pt.kept(tmp_path/"none.jsonl")


def test_a_rating_of_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"ratings\[1\] has no answer"): pt.keep(tmp_path/"r", [Rating("a", "b", True), Rating("a", " ", True)])
    assert not (tmp_path/"r").exists()


# pairs

def test_pairs_come_from_one_prompt_and_the_majority():
    up, down = True, False
    ratings = [Rating("p", "good", up), Rating("p", "bad", down), Rating("p", "torn", up), Rating("p", "torn", down), Rating("q", "good", up),
               Rating("r", "bad", down), Rating("s", "x", up), Rating("s", "x", up), Rating("s", "x", down), Rating("s", "y", down)]
    assert pt.pairs_of(ratings) == [Pair("p", "good", "bad"), Pair("s", "x", "y")]
    with pytest.raises(UsageError, match="2 ratings of 2 prompts make no pair"): pt.pairs_of(ratings[4:6])
    with pytest.raises(UsageError, match="no pair"): pt.pairs_of([])


@pytest.mark.parametrize("pairs, said", [([], "pairs is empty"), ([Pair("p", "a", "b"), Pair("p", "a", "a ")], r"pairs\[1\]: chosen equals rejected"),
    ([Pair("", "a", "b")], r"pairs\[0\]: the prompt is empty"),
    ([Pair("p", "a", "")], r"pairs\[0\]: the answer"), ([Pair("p", "a" * 9000, "b")], "over the context")])
def test_pairs_that_teach_nothing_are_refused(llama, pairs, said):
    with pytest.raises(UsageError, match=said): pt.pair_rows(llama.tokenizer, pairs, it.context_of(llama))


# DPO

@quick(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-50, 0)] * 4), min_size=1, max_size=6), st.floats(.01, 2))
def test_the_loss_of_dpo(rows, beta):
    pc, pr, rc, rr = torch.tensor(rows, dtype=torch.float64).t()
    policy, reference = torch.cat([pc, pr]), torch.cat([rc, rr])
    margin = beta * ((pc - rc) - (pr - rr))
    torch.testing.assert_close(pt.dpo_loss(policy, reference, beta), -F.logsigmoid(margin).mean())
    assert pt.dpo_loss(policy, policy, beta).item() == pytest.approx(math.log(2))
    turned = pt.dpo_loss(torch.cat([pr, pc]), torch.cat([rr, rc]), beta)
    torch.testing.assert_close(turned - pt.dpo_loss(policy, reference, beta), margin.mean())  # −log σ(−x) + log σ(x) = x


def test_rewards_refuse_what_is_no_pair():
    with pytest.raises(UsageError, match="same pairs"): pt.rewards(torch.zeros(3), torch.zeros(3))
    with pytest.raises(UsageError, match="same pairs"): pt.rewards(torch.zeros(2), torch.zeros(4))
    for beta in (0, -1, math.nan):
        with pytest.raises(UsageError, match="beta"): pt.dpo_loss(torch.zeros(2), torch.zeros(2), beta)


def test_dpo_learns_and_the_cache_is_the_reference(llama):
    rows = pt.pair_rows(llama.tokenizer, [Pair("p", "good", "bad answer"), Pair("q", "fine", "poor")], it.context_of(llama))
    reference, batch = pt.cached(llama, rows), pt.paired(rows)
    torch.testing.assert_close(reference(batch), pt.live(llama)(batch), rtol=1e-4, atol=1e-3)
    begun = pt.judged(llama, rows, reference)
    assert begun["margin"].value == pytest.approx(0, abs=1e-3)
    policy = compression.copied(llama)
    pt.tune(policy, rows, reference, steps=12, batch_size=2, lr=1e-3)
    after = pt.judged(policy, rows, reference)
    assert after["accuracy"].value == 100 and after["margin"].value > .1
    assert type(policy.model) is type(llama.model)  # the loss is gone with the training
    with pytest.raises(UsageError, match="rows is empty"): pt.judged(llama, [], reference)


def test_another_tokenizer_is_refused(llama):
    small = models.load("embedded:lm-small", task="causal-lm")
    with pytest.raises(UsageError, match="lm-small.*different tokenizers"): pt.same_words(small, llama)
    with pytest.raises(UsageError, match="different tokenizers"): pt.divergence(small, llama, [])


def test_a_model_has_not_left_itself(llama):
    asked = [it.Example("Summarise.", "x")]
    rows = pt.said_rows(llama, asked, it.answers(llama, asked, 4, sample=True))
    assert rows[0]["labels"].count(-100) == len(it.prompt_tokens(llama.tokenizer, "Summarise."))
    assert pt.divergence(llama, compression.copied(llama), rows).value == 0


@pytest.mark.parametrize("answer, good", [("Return the sum of all elements.", True), ("Returns the sum of all.", False), ("Return it.", False),
    ("return the sum of all.", False), ("Return the sum of all", False), ("Return the sum. Then the mean.", False), ("Return the sum of all...", False),
    ("Return " + "a " * 12 + "b.", False), ("", False), (".", False)])
def test_the_rater(answer, good): assert pt.keeps_style(answer) == good


# the gate

def test_the_gate():
    old, new = [0.] * 60 + [1.] * 40, [0.] * 20 + [1.] * 80
    fine, bad, open_ = (stats.Estimate(v, v - .1, v + h, 50) for v, h in ((0, .1), (1, .1), (.1, 1)))
    assert pt.gate(old, new, 80).verdict == "release"
    assert pt.gate(old, new, 80, dict(bits=(fine, .5))).verdict == "release"
    assert pt.gate(old, new, 80, dict(bits=(bad, .5))).verdict.startswith("keep the old one: bits lost 1")
    assert pt.gate(old, new, 80, dict(bits=(open_, .5))).verdict.startswith("keep the old one: not known to be harmless (bits lost 0.1")
    assert pt.gate(new, old, 80).verdict == "keep the old one: it is liked more often"
    assert pt.gate(old, old, 80).verdict == "keep the old one: no difference was found"
    assert pt.gate(old, old, 800).verdict == "go on measuring: 100 of 800 answers"
    with pytest.raises(UsageError, match="same questions|numbers"): pt.gate(old, new[1:], 80)
    with pytest.raises(UsageError, match="needed=0"): pt.gate(old, new, 0)
    assert "verdict" in pt.gate(old, new, 80)._repr_html_()


def test_the_gate_says_nothing_before_all_that_was_planned_is_there():
    old, new = [0.] * 60 + [1.] * 40, [0.] * 20 + [1.] * 80
    fine, bad, open_ = (stats.Estimate(v, v - .1, v + h, 50) for v, h in ((0, .1), (1, .1), (.1, 1)))
    assert pt.gate(old, new, 101).test.p_value < 1e-6
    for guards in ({}, dict(bits=(fine, .5)), dict(bits=(open_, .5))):
        assert pt.gate(old, new, 101, guards).verdict == pt.gate(new, old, 101, guards).verdict == "go on measuring: 100 of 101 answers"
        assert "go on" not in pt.gate(old, new, 100, guards).verdict
    assert pt.gate(old, new, 101, dict(bits=(bad, .5))).verdict.startswith("keep the old one: bits lost 1")  # harm may be seen early


@quick(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 200))
def test_the_gate_releases_by_a_test_that_is_complete_and_in_favour(only_old, only_new, both, needed):
    n = only_old + only_new + both
    if not n: return
    test = stats.mcnemar([1.] * only_new + [0.] * only_old + [1.] * both, [0.] * only_new + [1.] * only_old + [1.] * both)
    found = pt.Gate(stats.exact(100 * (only_new - only_old) / n), test, needed, {})
    assert (found.verdict == "release") == (n >= needed and test.p_value < .05 and only_new > only_old)
    assert found.verdict.startswith("go on measuring") == (n < needed)
