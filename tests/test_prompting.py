"""Prompting, the harness, applications and domain adaptation."""
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmlab.kit import metrics, models
from llmlab.kit.settings import UsageError, settings
from llmlab.selection import applications as a
from llmlab.selection import prompting as p


@pytest.fixture(scope="module")
def lm(): return models.load("random:llama-tiny", task="causal-lm")


def alone(lm, context, continuation, start=True):
    "Nats of a continuation, token by token, by the definition."
    ids = ([lm.tokenizer.bos_token_id] if start else []) + lm.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    n = len(lm.tokenizer(continuation, add_special_tokens=False)["input_ids"])
    with torch.inference_mode(): logp = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logp[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids)))


@examples(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.text("ab c", min_size=1, max_size=9), st.text("xyz", min_size=1, max_size=4)), min_size=1, max_size=7),
       st.text("q ", max_size=12), st.booleans(), st.booleans(), st.integers(1, 4))
def test_continuations_cost_what_each_costs_alone(lm, pairs, front, share, start, batch_size):
    pairs = [(front + c, x) for c, x in pairs]
    got = p.continuation_nats(lm, pairs, batch_size=batch_size, share=share, start=start)
    np.testing.assert_allclose(got.numpy(), [alone(lm, *o, start=start) for o in pairs], rtol=1e-4)


def test_labels_of_one_token_share_a_row_and_the_beginning_is_read_once(lm, monkeypatch):
    seen, forward = [], lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda *args, **more: (seen.append(tuple(more["input_ids"].shape)), forward(*args, **more))[1])
    p.continuation_nats(lm, [("one two " + t, w) for t in ("three", "four!") for w in "abc"])
    assert seen == [(1, 9), (2, 5)]  # the start token and "one two " once, then two rows instead of six


def test_scoring_says_what_is_wrong(lm):
    with pytest.raises(UsageError, match="no pairs"): p.continuation_nats(lm, [])
    with pytest.raises(UsageError, match="no token of its own"): p.continuation_nats(lm, [("a", "")])
    with pytest.raises(UsageError, match="nothing before it"): p.continuation_nats(lm, [("", "a")], start=False)
    with pytest.raises(UsageError, match="does not fit into the context .* 2048. Give fewer"): p.continuation_nats(lm, [("a" * 2048, "b")])


def test_likelihood_of_a_whole_text_is_the_kits(lm):
    text = "abc def"
    assert p.continuation_nats(lm, [("", text)]).item() == pytest.approx(metrics.lm_nats(lm, [text]).nats[0], rel=1e-5)


@examples(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_calibration_removes_the_prior_of_a_label(seed):
    g = torch.Generator().manual_seed(seed)
    nats, empty, prior = torch.rand(6, 4, generator=g) * 9, torch.rand(3, 4, generator=g) * 9, torch.rand(4, generator=g) * 9
    torch.testing.assert_close(metrics.calibrated(-nats - prior, -empty - prior), metrics.calibrated(-nats, -empty), rtol=1e-4, atol=1e-4)


def test_prompts():
    assert p.prompt_for(["int", "str"]).words == ("int", "str") and "{text}" in p.prompt_for(["int"]).direct
    plain = p.prompt_for(["neg", "pos"])
    assert plain.meanings == ("This is about neg.", "This is about pos.") and plain.channel.format(label="neg") == "Label: neg\nText:"


def test_examples_stand_in_front_with_their_labels(lm, monkeypatch):
    asked = []
    monkeypatch.setattr(p, "continuation_nats", lambda loaded, pairs, **_: (asked.extend(pairs), torch.zeros(len(pairs)))[1])
    prompt = p.Prompt(("yes", "no"), ("", ""), "Q {text} A")
    assert p.direct_nats(lm, prompt, ["x", "y"], [("e", 1)]).shape == (2, 2)
    assert asked[0] == ("Q e A no\n\nQ x A", " yes") and asked[3] == ("Q e A no\n\nQ y A", " no")


def test_nearest_prototype():
    meanings = torch.eye(3)
    assert p.nearest(torch.tensor([[.1, 2., 0.], [5., 1., 0.]]), meanings).tolist() == [1, 0]
    far = torch.tensor([[0., -1., 0.]])
    assert p.nearest(far, meanings).item() != 1
    assert p.nearest(far, meanings, torch.tensor([[0., -3., 0.]] * 4), [2] * 4).item() == 2


@examples(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 99))
def test_draws_are_balanced_and_repeatable(shots, seed):
    y = np.array([0, 1, 2] * 4)
    i = p.draw(y, shots, seed)
    assert len(set(i)) == len(i) == 3 * shots and sorted(y[i]) == sorted([0, 1, 2] * shots) and i == p.draw(y, shots, seed)


def test_too_few_to_draw_from():
    with pytest.raises(UsageError, match="class 1 has fewer than 2"): p.draw([0, 0, 1], 2)


def test_accuracy_over_texts_is_the_mean_and_its_interval_that_of_texts():
    e = p.over_texts([[True, False, True, False], [True, True, False, False]])
    assert (e.value, e.n, e.unit) == (50, 4, "%")


def test_cost_of_tokens(lm):
    c = p.token_cost(lm.tokenizer, ["ab", "参数"])
    assert c.tokens == (2, 6) and c.characters == (2, 2) and (c.unknown, c.lost) == (0, 0)
    encoder = p.token_cost(models.load("embedded:minilm").tokenizer, ["the size", "损失"])
    assert encoder.unknown >= 1 and encoder.lost == 1
    assert p.language_factor(c, c).value == 1
    assert len({len(pair) for pair in p.PARALLEL}) == 1 and all(z and e for z, e in p.PARALLEL)


def rows(): return [dict(text=f"number {i} of them", label=i % 2, choices=["int", "float"]) for i in range(4)]


def test_harness_is_offline_quiet_and_leaves_nothing_behind(lm, tmp_path, monkeypatch, capfd):
    def refuse(*_): raise AssertionError("the harness wanted the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    texts = ["A text.", "Another text of several words."]
    out = p.harness(lm, [p.harness_task("parameter_type", rows(), tmp_path), p.harness_task("docstrings", [dict(text=t) for t in texts], tmp_path)])
    assert out["results"]["docstrings"]["bits_per_byte"] == pytest.approx(metrics.lm_nats(lm, texts).bits_per_byte.value, abs=1e-4)
    ours = p.direct_nats(lm, p.prompt_for(["int", "float"]), [r["text"] for r in rows()], start=False)
    assert 100 * out["results"]["parameter_type"]["acc"] == metrics.accuracy(ours.argmin(1), [r["label"] for r in rows()]).value
    assert capfd.readouterr() == ("", "") and [f.name for f in tmp_path.iterdir()] == ["harness"]
    assert os.environ["HF_HUB_OFFLINE"] == "0" and "HF_DATASETS_OFFLINE" not in os.environ and lm.tokenizer.padding_side == "left"


def test_harness_tasks_are_files_of_the_package(tmp_path):
    task = p.harness_task("docstrings", [dict(text="é")], tmp_path)
    assert json.loads(open(task["dataset_kwargs"]["data_files"]["test"], encoding="utf-8").read()) == dict(text="é")
    with pytest.raises(UsageError, match="Did you mean docstrings"): p.harness_task("docstring", [dict(text="x")], tmp_path)
    with pytest.raises(UsageError, match="at least one row"): p.harness_task("docstrings", [], tmp_path)


def test_a_fixed_length_is_kept_whatever_ends_a_text(lm):
    every = list(range(lm.model.config.vocab_size))
    assert p.stopwatch(lm, "abc", 8, eos_token_id=every)["tokens"] == 1
    assert p.decoding(lm, "abc", 8, eos_token_id=every)() == p.decoding(lm, "abc", 8)()


def test_prompts_keep_their_end_and_room_for_the_answer(lm):
    long = "x" * 5000 + "the end"
    (cut,) = a.fitting(lm, [long], 4)
    assert [cut] == a.fitting(lm, [long[-2043:]], 4) and len(cut) == 2044 and lm.tokenizer.decode(cut).endswith("the end")
    assert len(a.generate(lm, [cut], 4)) == 1
    with pytest.raises(UsageError, match="leaves no room"): a.fitting(lm, ["x"], 2048)
    assert a.fitting(lm, [], 4) == []


def test_a_stop_text_ends_an_answer_and_is_left_out(lm, monkeypatch):
    monkeypatch.setattr(a, "generate", lambda *_: [SimpleNamespace(text="one|two|"), SimpleNamespace(text="three")])
    app = lambda stop: a.Application("echo", "none", ("a", "b"), ("", ""), lambda x, y: {}, "nothing", ("", ""), stop=stop, read=str)
    assert a.judge(app("|"), lm).answers == ("one", "three") and a.judge(app(""), lm).answers == ("one|two|", "three")


def test_layouts():
    text = "Do it.\n\nParameters\n----------\nn : int\n    How many.\n*args : tuple\n    Rest.\ntol : float, optional\n    When to stop.\n"
    assert a.by_layout(text) == "n: int; tol: float"
    assert a.by_layout("Args:\n    x (`torch.FloatTensor` of shape `(2,)`): The x.\n    flag (bool): Whether.\n") == "x: array; flag: bool"
    assert a.by_layout(" ".join(text.split())) == ""
    assert a.documented(["x\n\n\n" + text + "    More."], 3) == [(text.rstrip("\n"), "n: int; tol: float")]


pair = st.frozensets(st.tuples(st.sampled_from("abc"), st.sampled_from(["int", "str"])), max_size=4)


@examples(max_examples=25, deadline=None)
@given(st.lists(st.tuples(pair, pair), min_size=1, max_size=5))
def test_f1_of_pairs_is_that_of_scikit_learn(documents):
    from sklearn.metrics import precision_recall_fscore_support
    write = lambda o: "; ".join(f"{n}: {t}" for n, t in sorted(o))
    said, true = [], []
    for x, y in documents:
        for o in x | y: said.append(o in x); true.append(o in y)
    got = a.pair_f1([write(x) for x, _ in documents], [write(y) for _, y in documents], resamples=100)
    if said:
        want = precision_recall_fscore_support(true, said, average="binary", zero_division=0)[:3]
        np.testing.assert_allclose([got[k].value for k in ("precision", "recall", "f1")], [100 * v for v in want])
    else: assert got["f1"].value == 0


def test_pairs_in_an_answer():
    assert a.pairs_in("n: int; tol : float and so on") == {("n", "int"), ("tol", "float")} and a.pairs_in("no idea") == frozenset()


def test_lines_of_code():
    follow = a.line_follower(["import os\nimport sys\nimport os\nimport sys\nreturn x", "return x\nreturn x\nreturn x"])
    assert follow("import os\n\n") == "import sys" and follow("unseen line\n") == "return x" and follow("") == "return x"
    (before, after), = a.next_lines(["\n".join(f"line {i}" for i in range(30))], 5, before=3)
    assert after == f"line {int(before.split()[-1]) + 1}" and before.count("\n") == 3
    assert a.next_lines(["too short"], 5) == []
    scores = a.completion_scores(["x = 1 ", "y"], ["x = 1", "z"], resamples=100)
    assert scores["exact match"].value == 50 and scores["edit similarity"].value == 50


@examples(max_examples=30, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_edit_similarity(x, y):
    assert 0 <= a.edit_similarity(x, y) <= 100 and a.edit_similarity(x, x) == 100


def test_a_compressor_gains_from_what_it_was_shown():
    text = "def number_of_nodes(self): return len(self._nodes)"
    assert a.zlib_bits([text], text).value < a.zlib_bits([text]).value / 2
    assert a.first_sentence("One. Two.") == "One." and a.first_sentence("none") == "none"


@examples(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_earlier_turns_begin_a_conversation(lm, turns):
    said = [a.chat(lm, turns[:k], a.CHATML, answer=False) for k in range(1, len(turns) + 1)]
    assert all(later.startswith(earlier) for earlier, later in zip(said, said[1:]))
    assert a.chat(lm, turns, a.CHATML) == said[-1] + "<|im_start|>assistant\n"


def test_a_models_own_template_comes_first(lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{% for o in messages %}[{{ o['content'] }}]{% endfor %}")
    assert a.dialogue(lm).prompts[0] == "".join(f"[{t}]" for t in a.DIALOGUES[0][0])


def test_translation_baseline_and_metric_on_fixed_sentences():
    assert a.word_by_word("默认值是零。") == "default is zero" and a.word_by_word("？") == ""
    app = a.translation(p.PARALLEL, resamples=100)
    assert len(app.prompts) == len(app.by_baseline) == len(p.PARALLEL) - 2 and app.prompts[0].endswith("English:")
    perfect, nothing = app.score(app.references, app.references), app.score([""] * len(app.references), app.references)
    assert perfect["bleu"].value == pytest.approx(100) and perfect["chrf"].value == pytest.approx(100) and nothing["bleu"].value == 0
    assert 0 < app.score(app.by_baseline, app.references)["chrf"].value < 100


def test_a_model_is_left_out_only_with_a_reason(lm):
    app = a.translation(p.PARALLEL, resamples=100)
    with pytest.raises(UsageError, match="say why"): a.judge(app, None)
    skipped = a.judge(app, None, "not here")
    assert skipped.model is None and "not here" in str(a.applications_table([skipped]))
    tried = a.judge(app, lm)
    assert len(tried.answers) == len(app.references) and set(tried.model) == set(tried.baseline)


def test_summaries_are_taken_apart():
    body = "This is what it does in a good many words, which are needed so that it is long enough to count as a body at all."
    assert a.summaries([f"x\n\n\nCount all the nodes.\n\n{body}\n\n\nAnother one of them here.\n\n{body}"], 5) == [(body, "Count all the nodes.")]


def test_the_rate_follows_from_the_size_of_the_model_and_can_be_given(tmp_path):
    s = settings("smoke", lm="random:llama-125m", device="cpu", out_dir=str(tmp_path))
    assert a.continued_lr(6_000_000) == 1e-3 and a.continued_lr(600_000_000) == pytest.approx(1e-4)
    assert a.adapted_of(s)["lr"] == a.continued_lr(models.geometry(s.lm).n_parameters) and a.adapted_of(s, lr=3e-5)["lr"] == 3e-5
    with pytest.raises(UsageError, match="at least 1"): a.continued_lr(0)


def test_held_out_code_is_that_on_which_the_embedded_model_was_scored():
    made = json.loads((Path(models.source("embedded:lm", "causal-lm"))/"made.json").read_text("utf-8"))
    scored, found = set(made["scores"]["embedded:code"]["nats"]), dict(a.code_files()["test"])
    assert scored <= set(found)
    whole = {m for m, path in found.items() if a.code_texts([(m, path)], 1)}
    assert scored <= whole and len(whole - scored) <= 2  # near-duplicates, which the corpus leaves out
    assert not set(found) & set(dict(a.code_files()["train"])) and a.code_files(1)["test"] != a.code_files(2)["test"]


def test_adaptation_mixes_in_what_it_replays(tmp_path, monkeypatch):
    asked = []
    def load(name, split, limit=0, seed=0): asked.append(name); return dict(text=[f"{name} text number {i}, long enough." for i in range(40)])
    monkeypatch.setattr(a.data, "load", load)
    given = dict(lm="random:llama-tiny", lm_edition="", domain="d", general="g", made_from=[], steps=2, batch_size=2, length=16)
    notes = a.adapted(tmp_path/"mixed", replay=.5, **given)
    assert asked == ["d", "g"] and notes["windows"] == 4 and notes["tokens"] == 64 and len(notes["losses"]) == 2
    assert models.load(str(tmp_path/"mixed"), task="causal-lm").weights == "trained"
    asked.clear()
    a.adapted(tmp_path/"plain", **given)
    assert asked == ["d"]


def test_recipes_are_those_that_the_notebook_asks_for(tmp_path):
    s = settings("smoke", lm="random:llama-tiny", out_dir=str(tmp_path))
    assert [(r.name, o["replay"]) for r, o in a.recipes(s)] == [("adapted", 0.), ("adapted", .5)] and a.recipes(s)[0][1] == a.adapted_of(s)


def test_excerpts_come_from_every_document():
    assert a.excerpts(["a" * 30, "b" * 14, "c"], 9, characters=10) == ["a" * 10, "b" * 10, "a" * 10, "a" * 10]
