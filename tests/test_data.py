"""Corpora and data: determinism, masking, duplicates, splits, files, hubs."""
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hub import Hub
from hypothesis import given, settings, strategies as st

from llmlab.kit import corpora, data, store
from llmlab.kit.settings import Unavailable, UsageError

QUICK = settings(deadline=None, max_examples=60)
WORDS = st.lists(st.sampled_from("the a model data array of number rows fits returns".split()), min_size=1, max_size=12).map(" ".join)


def python(code, **env):
    "The output of a new process."
    more = {"PYTHONPATH": os.pathsep.join(sys.path)} | env
    return subprocess.run([sys.executable, "-c", code], env=os.environ | more, capture_output=True, text=True, timeout=120)


# Text

@QUICK
@given(st.text())
def test_clean_is_idempotent(text):
    assert data.clean(data.clean(text)) == data.clean(text)


@QUICK
@given(st.text())
def test_masking_twice_masks_nothing_new_and_keeps_clean_text(text):
    masked, counts = data.mask_personal(text)
    assert data.mask_personal(masked)[0] == masked
    if not counts: assert masked == text


@pytest.mark.parametrize("text,kind", [("write to jane.doe+x@mail.example.org.", "email"),
    ("<a_b@x-y.co.uk>", "email"), ("jane (at) example (dot) com", "email"),
    ("call +49 30 1234 5678 now", "phone"), ("from 192.168.3.14:80", "address"), ("in /home/jane/x", "home"), (r"C:\Users\jane\x", "home"),
    ("Author: Jane Doe", "author"), ("  # Written by J. Doe, 2001", "author"), ("Copyright (c) 1999 Jane Doe", "author")])
def test_what_is_personal_goes(text, kind):
    masked, counts = data.mask_personal(text)
    assert counts == {kind: 1} and f"[{kind}]" in masked and "jane" not in masked.lower() and "doe" not in masked.lower()


@pytest.mark.parametrize("text", ["A @ B.T", "u@np.diag(s)", "U@V.T", "@property", "x@y", "1.2.3", "127.0.0.1", "version 3.11",
                                  "the author of this", "authors\nmany", "1 + 2", "", "authorization: Bearer",
                                  "home/made"])
def test_what_is_not_personal_stays(text):
    assert data.mask_personal(text) == (text, {})


@QUICK
@given(st.lists(WORDS, max_size=12))
def test_equal_words_are_found_and_the_first_of_a_kind_stays(texts):
    found = data.near_duplicates(texts)
    assert len(found) == len(texts) and (not texts or not found[0])
    for i, t in enumerate(texts):
        if t.upper() in [o.upper() for o in texts[:i]]: assert found[i]
    kept = [t for t, f in zip(texts, found) if not f]
    assert data.near_duplicates(kept) == [False] * len(kept)
    assert data.near_duplicates(texts + [t.upper() + "!" for t in texts])[len(texts):] == [True] * len(texts)


def test_one_changed_word_in_a_long_text_is_a_duplicate_and_another_text_is_not():
    long = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(120))
    assert data.near_duplicates([long, long.replace("wordca", "other"), " ".join(reversed(long.split()))]) == [False, True, False]
    assert data.near_duplicates([long, long.replace("wordca", "other")], threshold=1) == [False, False]
    with pytest.raises(UsageError, match="threshold"): data.near_duplicates([], threshold=0)


@QUICK
@given(st.lists(st.text(max_size=6), max_size=30), st.integers(0, 5))
def test_a_split_depends_on_the_key_alone(keys, seed):
    splits = data.split_by_key(keys, seed=seed)
    assert splits == [data.split_by_key([k], seed=seed)[0] for k in keys]
    assert data.split_by_key(keys[::-1], seed=seed) == splits[::-1]


def test_shares_of_a_split():
    n = data.split_by_key(range(20_000), dict(a=.5, b=.25, c=.25))
    assert abs(n.count("a") - 10_000) < 300 and abs(n.count("b") - 5000) < 300
    for wrong in (dict(a=.5), dict(a=1.5, b=-.5)):
        with pytest.raises(UsageError, match="add up"): data.split_by_key(["x"], wrong)


# What docstrings say

def test_docstrings_are_found_without_running_the_source():
    source = b'"""M."""\nraise SystemExit\nclass A:\n  "C."\n  async def f(self):\n    "F."\n    def g():\n      \'\'\'G.\'\'\'\nx = """no"""\n'
    assert corpora.docstrings_in(source) == [("", "M."), ("A", "C."), ("A.f", "F."), ("A.f.g", "G.")]
    assert corpora.docstrings_in(b"def f(:\n") == [] == corpora.docstrings_in(b"\x00") == corpora.docstrings_in(b"")


@pytest.mark.parametrize("spec,label", [("int", "int"), ("bool, optional (default=True)", "bool"), ("array_like, shape (n,)", "array"),
    ("`str`, *optional*, defaults to `'x'`", "str"),
    ("{'a', 'b'}, default 'a'", "str"), ("callable or None", "callable"), ("dict[str, int]", "dict"), ("dict of lists", "dict"), ("torch.Tensor", "array"),
    (":class:`float`", "float"), ("int or str", None), ("list of int", None), ("Graph", None), ("", None),
    ("2-D ndarray", "array"), ("np.ndarray of shape (3,)", "array")])
def test_labels_of_types(spec, label):
    assert corpora.type_label(spec) == label


def test_source_files_are_sorted_and_hold_no_tests():
    files = [name for name, _ in corpora.source_files("networkx")]
    assert files == sorted(files) and files and not [f for f in files if "/tests/" in f]
    assert all(path.is_file() for _, path in corpora.source_files("networkx"))


def test_a_library_that_is_missing(monkeypatch):
    monkeypatch.setitem(corpora.LIBRARIES, "networkx", "no-such-distribution")
    with pytest.raises(Unavailable, match="make install"): corpora.source_files("networkx")


def test_reading_does_not_depend_on_the_hash_seed(tmp_path):
    code = f"from llmlab.kit.corpora import _read_libraries; _read_libraries(['networkx'], {str(tmp_path/'out')!r})"
    hashes = set()
    for seed in ("0", "1"):
        assert python(code, PYTHONHASHSEED=seed).returncode == 0
        out = tmp_path/"out"
        hashes.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert str(sys.prefix).encode() not in out.read_bytes()
        out.unlink()
    assert len(hashes) == 1


def test_tasks_do_not_depend_on_the_hash_seed(tmp_path):
    few = [r for i, r in enumerate(corpora._read(store.build(corpora.docstrings, progress=False)/"docstrings.jsonl")) if i % 60 == 0]
    corpora._write(tmp_path/"docstrings.jsonl", few)
    code = """if 1:
        import hashlib
        from pathlib import Path
        from llmlab.kit import corpora
        source = Path({source!r})
        for recipe in (corpora.parameter_type, corpora.docstring_library, corpora.summary_body, corpora.running_text):
            folder = source/recipe.name; folder.mkdir(exist_ok=True)
            recipe(folder, source=source)
            for f in sorted(folder.iterdir()): print(recipe.name, f.name, hashlib.sha256(f.read_bytes()).hexdigest())
    """.replace("{source!r}", repr(str(tmp_path)))
    one, two = python(code, PYTHONHASHSEED="0"), python(code, PYTHONHASHSEED="7")
    assert one.returncode == 0 and one.stdout.count("\n") == 13 and one.stdout == two.stdout, one.stderr


# The embedded data sets

@pytest.mark.parametrize("name", data.names())
def test_embedded(name):
    d = data.load(name)
    assert set(d) == {"train", "validation", "test"}
    modules = [set(d[k]["module"][:]) for k in d]
    assert not (modules[0] & modules[1] or modules[0] & modules[2] or modules[1] & modules[2])
    text = d["test"]["text" if "text" in d["test"].column_names else "query"][:]
    assert all(t.strip() for t in text) and not any(data.mask_personal(t)[1].get("email") for t in text)
    assert not any(str(sys.prefix) in t for t in text)
    assert data.fingerprint(d) == data.fingerprint(data.load(name))


def test_labels_are_not_in_the_text():
    d = data.load("embedded:parameter-type", "test")
    assert d.features["label"].names == sorted(corpora.PARAMETER_TYPES)
    assert not [t for t in d["text"][:] if corpora._TYPE.search(t)]
    libraries = data.load("embedded:docstring-library", "test")
    assert libraries.features["label"].names == sorted(corpora.LIBRARIES) and not [t for t in libraries["text"][:] if "pandas" in t.lower().split()]


def test_unlabelled_rows_are_from_training_modules():
    d, more = data.load("embedded:parameter-type"), data.load("embedded:parameter-type", "unlabelled")
    assert set(more["label"][:]) == {None} and len(more) > 10_000
    assert not set(more["module"][:]) & (set(d["test"]["module"][:]) | set(d["validation"]["module"][:]))
    assert not set(more["text"][:]) & set(d["test"]["text"][:])


def test_limit_draws_at_random_and_the_same_again():
    one, two, other = (data.load("embedded:parameter-type", "test", limit=50, seed=s) for s in (1, 1, 2))
    assert len(one) == 50 and data.fingerprint(one) == data.fingerprint(two) != data.fingerprint(other)
    assert len(data.load("embedded:parameter-type", "test", limit=10**6)) == len(data.load("embedded:parameter-type", "test"))
    with pytest.raises(UsageError, match="limit"): data.load("embedded:parameter-type", limit=-1)


def test_unknown_names():
    with pytest.raises(UsageError, match="Did you mean embedded:docstrings"): data.load("embedded:docstring")
    with pytest.raises(UsageError, match="Did you mean test"): data.load("embedded:docstrings", "tests")


# Local files

def rows(n=40): return [dict(text=f"text number {i} of these", label="yes" if i % 3 else "no") for i in range(n)]


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path/name)
    return write


def test_csv_and_jsonl_hold_the_same(file):
    c = data.load(file("a.csv", "text,label\n" + "".join(f"{r['text']},{r['label']}\r\n" for r in rows())))
    j = data.load(file("a.jsonl", "\n\n".join(json.dumps(r) for r in rows()) + "\n"))
    assert data.fingerprint(c) == data.fingerprint(j) and c["train"].features["label"].names == ["no", "yes"]
    assert sum(map(len, c.values())) == 40


def test_txt_is_split_at_blank_lines(file):
    d = data.load(file("a.txt", "\n\n".join(f"paragraph {i}\nwith a second line" for i in range(60)) + "\n\n"))
    assert sum(map(len, d.values())) == 60 and "\n" in d["train"][0]["text"] and "label" not in d["train"].column_names


def test_own_columns_splits_groups_and_numbers(file):
    lines = [json.dumps(dict(body=f"t {i}", stars=i % 11, split=("train", "test", "validation")[i % 3], module=f"m{i}")) for i in range(33)]
    d = data.load(file("a.jsonl", "\n".join(lines)), text="body", label="stars")
    assert len(d["test"]) == 11 and d["test"].features["label"].names == [str(i) for i in range(11)] and d["train"][0]["module"] == "m0"


def test_equal_texts_stay_together(file):
    d = data.load(file("a.csv", "text\n" + "".join(f"text {i % 30}\n" for i in range(120))))
    assert not set(d["train"]["text"][:]) & set(d["test"]["text"][:])


def test_bom_quotes_and_chinese(file):
    d = data.load(file("a.csv", b"\xef\xbb\xbftext,label\n" + "".join(f'"第{i}句, ""引""\n行",好\n' for i in range(40)).encode()), "train")
    assert d["text"][0].startswith("第") and '"引"\n行' in d["text"][0]


FAULTS = {
    "no such file": (None, "there is no file"),
    "empty.csv": ("", "is empty"),
    "head.csv": ("text,label\n", "is empty"),
    "empty.jsonl": ("\n\n", "is empty"),
    "empty.txt": (" \n\n", "is empty"),
    "latin.csv": ("text\ncafé\n".encode("latin-1"), "iconv"),
    "utf16.txt": ("hello".encode("utf-16"), "not UTF-8"),
    "columns.csv": ("id,words\n1,x\n", "Columns there: id, words"),
    "ragged.csv": ("text,label\na,b,c\n", "line 2"),
    "short.csv": ("text,label\na\n", "line 2"),
    "quote.csv": ('text\n"a\n', "not a csv file"),
    "broken.jsonl": ('{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": ("[1]\n", "not an object"),
    "missing.jsonl": ('{"text": "a"}\n{"word": "b"}\n', "row 2"),
    "blank.csv": ("text,label\n ,x\n", "holds no text"),
    "nolabel.csv": ("text,label\na,\n", "'label' is empty"),
    "float.jsonl": ('{"text": "a", "label": 0.5}\n', "whole number"),
    "split.csv": ("text,split\na,trian\n", "Did you mean train"),
    "few.csv": ("text\na\n", "too few rows"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_ends_in_a_sentence_that_helps(file, tmp_path, name):
    content, match = FAULTS[name]
    path = str(tmp_path/"gone.csv") if content is None else file(name, content)
    with pytest.raises(UsageError, match=match) as e: data.load(path)
    assert os.path.basename(path) in str(e.value)


def test_wrong_column_names(file):
    path = file("a.csv", "review,stars\nx,1\n")
    with pytest.raises(UsageError, match="Did you mean stars"): data.load(path, label="star")
    with pytest.raises(UsageError, match="unknown column 'body'"): data.load(path, text="body")


# Hubs

HUB = """if 1:
    import sys
    from llmlab.kit import data
    from llmlab.kit.settings import LabError
    try: data.load("hub:someone/something@main")
    except LabError as e: print(type(e).__name__, e.exit_status, e)
"""


def refused(done):
    assert done.stdout.startswith("Unavailable 4") and "embedded:parameter-type" in done.stdout, done.stdout + done.stderr[-2000:]
    return True


def test_a_hub_that_is_not_there_names_the_alternative(tmp_path):
    done = python(HUB, HF_ENDPOINT="http://127.0.0.1:9", LLMLAB_HOME=str(tmp_path), HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert refused(done) and "127.0.0.1:9" in done.stdout


def test_an_offline_hub_names_the_alternative(tmp_path):
    done = python(HUB, HF_HUB_OFFLINE="1", LLMLAB_HOME=str(tmp_path))
    assert refused(done)


@pytest.mark.parametrize("answer", [404, 401, 503, 500, "slow", "not json"])
def test_a_hub_that_answers_badly(tmp_path, answer):
    class Bad(BaseHTTPRequestHandler):
        def do_GET(self):
            if answer == "slow": time.sleep(5)
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(b"<html>")
        do_HEAD = do_GET
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: done = python(HUB, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", LLMLAB_HOME=str(tmp_path), HF_HUB_DOWNLOAD_TIMEOUT="1")
    finally: server.shutdown()
    assert refused(done)


@pytest.mark.parametrize("fault, said", [("hash", "Damaged 4.*other bytes than the hub announced: test.csv, train.csv"),
    ((404, "/resolve/"), "Unavailable 4"), ((503, "/resolve/"), "Unavailable 4.*503")])
def test_a_hub_that_knows_the_data_and_sends_other_bytes_or_none(tmp_path, monkeypatch, fault, said):
    for o in ("HF_HOME", "HF_HUB_CACHE"): monkeypatch.delenv(o, raising=False)
    table = b"text,label\n" + b"".join(b"text number %d,%d\n" % (i, i % 2) for i in range(60))
    home, elsewhere = tmp_path/"home", tmp_path/"elsewhere"
    code = HUB.replace("import sys", "import huggingface_hub") + '    else: print("all is well")\n'
    with Hub() as hub:
        hub.add("someone/something", {"README.md": b"---\nlicense: apache-2.0\n---\n", "train.csv": table, "test.csv": table}, kind="datasets")
        env = dict(HF_ENDPOINT=hub.url, LLMLAB_HOME=str(home), HOME=str(elsewhere), XDG_CACHE_HOME=str(elsewhere), HF_HUB_DOWNLOAD_TIMEOUT="1")
        hub.fault = fault
        done = python(code, **env)
        assert re.match(said, done.stdout) and "embedded:parameter-type" in done.stdout, done.stdout + done.stderr[-2000:]
        hub.fault = None
        assert python(code, **env).stdout == "all is well\n", "what was wrong is gone"
        hub.fault = 503
        assert python(code, **env).stdout == "all is well\n", "what was fetched is kept"
    assert not (elsewhere/"huggingface").exists() and list(home.rglob("train.csv")), "downloads stay in the store, whatever was imported first"


def test_what_a_hub_gives_becomes_the_usual_columns(monkeypatch):
    import datasets
    asked = {}
    def fake(path, config, revision, cache_dir):
        asked.update(path=path, config=config, revision=revision)
        make = lambda n, y: datasets.Dataset.from_dict(dict(text=[f"film {i}" for i in range(n)] + [""], label=[y] * (n + 1)))
        return datasets.DatasetDict(train=make(200, 1), test=make(20, 0), unsupervised=make(9, -1))
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    d = data.load("hub:imdb@abc")
    assert asked == dict(path="stanfordnlp/imdb", config=None, revision="abc")
    assert set(d) == {"train", "validation", "test"} and len(d["test"]) == 20 and len(d["train"]) + len(d["validation"]) == 200
    assert set(data.load("hub:imdb", "unlabelled")["label"][:]) == {None}
    data.load("hub:a/b:small@1")
    assert asked == dict(path="a/b", config="small", revision="1")


# Card and leak

def test_card_counts(file):
    d = data.load(file("a.jsonl", "\n".join(map(json.dumps, rows(60)))))
    c = data.card(d, "mine")
    assert sum(c.rows.values()) == 60 and c._totals() == dict(no=20, yes=40) and c.shared == 0 and c.hash == data.fingerprint(d) and c.personal == {}
    assert "mine" in repr(c) and "<table" in c._repr_html_() and len(c.plot()) == 2


def test_card_sees_what_is_wrong():
    from datasets import Dataset, DatasetDict
    d = DatasetDict(train=Dataset.from_dict(dict(text=["one two three four", "mail a@b.org"], module=["m", "n"])),
                    test=Dataset.from_dict(dict(text=["One two three four!"], module=["m"])))
    c = data.card(d)
    assert (c.repeated, c.shared, c.personal) == (1, 1, dict(email=1)) and len(c.plot()) == 2


def test_leak_sees_a_leak_and_needs_labels():
    import random
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    rng, out = random.Random(0), {}
    for split, modules in dict(train=range(40), test=range(40, 60)).items():  # the only clue is a word of the module, whose label is a coin
        found = [(f"word m{m}x and {rng.choice('abcdef')}z", m) for m in modules for _ in range(8)]
        coin = {m: rng.random() < .5 for m in modules}
        out[split] = Dataset.from_dict(dict(text=[t for t, _ in found], label=[int(coin[m]) for _, m in found], module=[str(m) for _, m in found]),
                                       features=Features(text=Value("string"), label=ClassLabel(names=["a", "b"]), module=Value("string")))
    leak = data.leak(DatasetDict(out))
    assert leak.at_random.value > 95 and leak.by_module.value < 80 and leak.leak.low > 0
    assert "unseen modules" in repr(leak) and "<table" in leak._repr_html_()
    with pytest.raises(UsageError, match="labelled"): data.leak("embedded:summary-body")


def test_the_kit_without_data_stays_light():
    heavy = ("torch", "datasets", "pandas", "sklearn", "numpy")
    done = python(f"import sys, llmlab.kit.store, llmlab.kit.data; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_the_origin_changes_with_the_data(tmp_path):
    mine = tmp_path/"mine.csv"
    mine.write_text("text,label\na,0\n")
    before = data.origin(str(mine))
    mine.write_text("text,label\nb,0\n")
    assert data.origin(str(mine)) != before and data.origin("hub:imdb@abc") == "hub:imdb@abc"
    assert len({data.origin(n) for n in data.names()}) == len(data.names())
    with pytest.raises(UsageError, match="embedded:docstrings"): data.origin("embedded:docstring")
