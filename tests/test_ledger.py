"Rows and claims: what is refused, what replaces what, who judges, and what survives a full disk."
import errno
import json
import math
import os
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llmlab.kit import ledger
from llmlab.kit.claims import Claim, Claims, judge
from llmlab.kit.ledger import Ledger, Row, Workload, merge, read, start
from llmlab.kit.settings import ClaimsFailed, Damaged, Unavailable, UsageError, runs, settings
from llmlab.kit.stats import Estimate, estimate, exact

WORK = dict(task="classify", phase="encode", batch=1)
AT_81 = Estimate(81, 79, 83, 1000, "%")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    "Rows do not wait for a look at the machine and at git."
    monkeypatch.setattr(ledger, "_hardware", lambda: dict(cpu="a cpu", cores=2, gpus=[], threads=1, torch="2"))
    monkeypatch.setattr(ledger, "revision", lambda: "abc")


def settings_for(folder, profile="tiny", **more): return replace(settings(profile, device="cpu", resolve=False, out_dir=folder), **more)


@pytest.fixture
def book(tmp_path): return start("selection/candidates", settings_for(tmp_path))


# --- rows

def test_a_row_has_every_field_and_reads_back(book):
    row = book.row("int8", model="embedded:minilm", weights="trained", baseline="fp32", workload=WORK, quality=dict(accuracy=AT_81), size_bytes=24e6,
                   memory_bytes=25_000_000, time_ms=estimate([1, 2, 3.5], "ms", "median"), ttft_ms=12., metrics=dict(p99_ms=4, joules=exact(3, "J"),
                       nothing=None), data="f00")
    line, = (json.loads(o) for o in (book.folder/"rows.jsonl").read_text().splitlines())
    assert list(line) == sorted(line) and line["id"] == row.id and line["peak_memory_bytes"] is None and line["quality"]["accuracy"]["low"] == 79
    assert read(book.folder) == book.ledger == Ledger((row,)) and book.ledger.rows[0].time_ms.samples == (1, 2, 3.5)
    assert row.chapter == "selection" and row.size_bytes == 24_000_000 and row.ttft_ms == exact(12, "ms")
    assert row.workload.threads == 1 and row.revision == "abc"
    assert row.metrics == dict(p99_ms=4., joules=exact(3, "J"), nothing=None)


def test_a_folder_of_this_machine_is_no_name(book, tmp_path):
    assert book.row("a", model=str(tmp_path/"store"/"early-1")).model == "early-1" and book.row("b", model="hub:a/b").model == "hub:a/b"


def test_a_row_written_twice_replaces_itself(book):
    book.row("fp32", workload=WORK, size_bytes=1); book.row("int8", workload=WORK, size_bytes=2)
    again = book.row("fp32", workload=Workload(**WORK), size_bytes=3)
    assert [r.size_bytes for r in read(book.folder).rows] == [2, 3] and [r.size_bytes for r in book.rows] == [3, 2]
    other = book.row("fp32", workload=dict(WORK, batch=8), size_bytes=4)
    assert again.id != other.id and len(book.rows) == 3


def test_the_same_experiment_has_the_same_id_whatever_ran_it(tmp_path, monkeypatch):
    a = start("selection/candidates", settings_for(tmp_path/"a")).row("fp32", workload=WORK)
    monkeypatch.setattr(ledger, "_hardware", lambda: dict(cpu="a cpu", cores=2, gpus=[], threads=1, torch="3", memory_bytes=5))
    monkeypatch.setattr(ledger, "revision", lambda: "def+changes")
    assert start("selection/candidates", settings_for(tmp_path/"b")).row("fp32", workload=WORK).id == a.id
    monkeypatch.setattr(ledger, "_hardware", lambda: dict(cpu="another", cores=2, gpus=[], threads=1))
    assert start("selection/candidates", settings_for(tmp_path/"c")).row("fp32", workload=WORK).id != a.id


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "fast"])
@pytest.mark.parametrize("name", ["size_bytes", "time_ms", "tokens_per_s", "predicted_ms", "floor_fraction"])
def test_a_figure_that_is_no_number_is_refused_by_name(book, name, bad):
    with pytest.raises(UsageError, match=name): book.row("int8", workload=WORK, **{name: bad})
    with pytest.raises(UsageError, match=r"metrics\['p99'\]"): book.row("int8", workload=WORK, metrics=dict(p99=bad))
    with pytest.raises(UsageError, match=r"quality\['accuracy'\]"): book.row("int8", workload=WORK, quality=dict(accuracy=bad))
    assert not book.rows and (book.folder/"rows.jsonl").read_text() == ""


@pytest.mark.parametrize("wrong, match", [(dict(weights="random", quality=AT_81), "random weights"), (dict(weights="good"), "good"),
    (dict(size_byte=3), "size_bytes"),
    (dict(workload=dict(bacth=1)), "batch"), (dict(status="skipped"), "reason"), (dict(status="done"), "skipped"), (dict(size_bytes=-1), "0 or more")])
def test_what_a_row_refuses(book, wrong, match):
    with pytest.raises(UsageError, match=match): book.row("int8", **{"workload": WORK, **wrong})
    assert not book.rows


def test_a_row_from_a_loaded_model_a_speed_and_a_forecast(book):
    import torch
    loaded = SimpleNamespace(name="random:tiny", weights="random", model=torch.nn.Linear(3, 5))
    forecast = SimpleNamespace(seconds=.02, floor_seconds=.01)
    speed = lambda s, **more: SimpleNamespace(time=estimate([s] * 3, "s", "median"), ratio=exact(.04 / s, "×"), baseline="fp32", **more)
    base = book.row("fp32", loaded, workload=WORK, speed=speed(.04), predicted=forecast)
    assert (base.model, base.weights, base.memory_bytes, base.baseline, base.ratio_of) == ("random:tiny", "random", 80, "fp32", "fp32")
    assert base.time_ms.value == 40 and base.time_ms.unit == "ms" and base.predicted_ms == 20 and base.floor_fraction == .25
    fast = book.row("int8", workload=WORK, speed=speed(.02), predicted=SimpleNamespace(seconds=.005, floor_seconds=.004))
    assert fast.ratio.value == 2 and fast.predicted_ratio == 4 and fast.floor_fraction == .2
    own = book.row("int4", workload=WORK, speed=speed(.01, forecast=forecast, predicted_ratio=7.), predicted=None)
    assert own.predicted_ms == 20 and own.predicted_ratio == 7 and book.row("x", workload=WORK, predicted=3.).predicted_ms == 3


def test_many_samples_are_not_written_but_their_interval_is(book):
    e = Estimate(1, 0, 2, 20_000, "ms", [1.] * 20_000)
    book.row("fp32", workload=WORK, time_ms=e)
    back = read(book.folder).rows[0].time_ms
    assert back.samples is None and (back.value, back.low, back.high, back.n) == (1, 0, 2, 20_000)


# --- files

def test_an_earlier_run_of_the_same_notebook_goes_and_another_notebook_stays(tmp_path):
    for notebook in ("selection/candidates", "selection/other"):
        book = start(notebook, settings_for(tmp_path))
        book.row("old", workload=WORK); book.claim("old", 1, at_most=2)
    again = start("selection/candidates", settings_for(tmp_path))
    assert [r.notebook for r in read(tmp_path).rows] == [c.notebook for c in read(tmp_path).claims] == ["selection/other"]
    again.row("new", workload=WORK)
    assert [r.variant for r in read(tmp_path).rows] == ["new", "old"] and [r.variant for r in again.rows] == ["new"] and not again.claims


def test_each_notebook_has_its_own_interactive_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "runs", lambda: tmp_path)
    assert start("selection/candidates", settings_for(tmp_path/"interactive")).folder == tmp_path/"interactive"/"selection__candidates"
    assert start("selection/candidates", settings_for(tmp_path/"mine")).folder == tmp_path/"mine"
    assert settings("tiny", resolve=False).out_dir == (runs()/"interactive").resolve()


@pytest.mark.parametrize("name", ["candidates", "a/b/c", "", "../x", "selection/"])
def test_a_book_needs_a_chapter_and_a_part(tmp_path, name):
    with pytest.raises(UsageError, match="selection/candidates"): start(name, settings_for(tmp_path))


def test_a_full_disk_loses_nothing(book, monkeypatch):
    book.row("fp32", workload=WORK, size_bytes=1)
    before = (book.folder/"rows.jsonl").read_bytes()
    def full(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(Unavailable, match="No space left.* free in .*out_dir"): book.row("int8", workload=WORK)
    assert (book.folder/"rows.jsonl").read_bytes() == before and sorted(os.listdir(book.folder)) == ["claims.jsonl", "rows.jsonl"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(Unavailable, match="out_dir"): start("selection/candidates", settings_for(tmp_path/"file"/"below"))


@pytest.mark.parametrize("line", ['{"id": "1", "writ', "[1, 2]", '{"id": "1"}', '"text"',
    '{"id":"1","written":0,"notebook":"a/b","chapter":"a","variant":"v","time_ms":{"value":null,"low":0,"high":1,"n":1}}'])
def test_a_damaged_line_is_named(book, line):
    book.row("fp32", workload=WORK)
    with (book.folder/"rows.jsonl").open("a") as f: f.write(line + "\n")
    with pytest.raises(Damaged, match="rows.jsonl, line 2"): read(book.folder)


def test_a_field_of_a_later_version_is_left_out(book):
    row = book.row("fp32", workload=WORK)
    d = json.loads((book.folder/"rows.jsonl").read_text())
    (book.folder/"rows.jsonl").write_text(json.dumps(d | {"from_the_future": 1, "workload": d["workload"] | {"planets": 3}}) + "\n\n")
    assert read(book.folder).rows == (row,)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UsageError, match="run a notebook first"): read(tmp_path)
    with pytest.raises(UsageError, match="run a notebook first"): read(tmp_path/"missing")


# --- merging

def some_row(i, written, size): return Row(f"id{i}", written, f"chapter/part{i % 2}", "chapter", f"v{i}", size_bytes=size)
def some_claim(i, written, value): return Claim(f"id{i}", written, f"chapter/part{i % 2}", "text", exact(value), at_most=1)

moments = st.tuples(st.integers(0, 4), st.floats(0, 3), st.integers(0, 3))
ledgers = st.builds(Ledger, st.lists(moments.map(lambda o: some_row(*o)), max_size=6).map(tuple),
    st.lists(moments.map(lambda o: some_claim(*o)), max_size=6).map(tuple))


@examples(deadline=None)
@given(st.lists(ledgers, max_size=3))
def test_merging_is_idempotent_and_does_not_care_for_the_order(found):
    once = merge(found)
    assert merge([once]) == merge([once, once]) == merge([*found, once, *found]) == once
    for other in permutations(found): assert merge(other) == once
    if len(found) == 3: assert merge([merge(found[:2]), found[2]]) == merge([found[0], merge(found[1:])]) == once
    assert len({r.id for r in once.rows}) == len(once.rows) and {r.id for r in once.rows} == {r.id for l in found for r in l.rows}
    for r in once.rows: assert r.written == max(o.written for l in found for o in l.rows if o.id == r.id)


def test_merging_folders_and_a_folder_of_folders(tmp_path):
    for part in ("one", "two"):
        book = start(f"selection/{part}", settings_for(tmp_path/part))
        book.row("v", workload=WORK); book.claim("c", 1, at_most=1)
    whole = read(tmp_path)
    assert whole == merge([tmp_path/"two", tmp_path/"one"]) == merge([read(tmp_path/"one"), tmp_path/"two", tmp_path/"two"])
    assert [r.notebook for r in whole.rows] == ["selection/one", "selection/two"] and len(whole.claims) == 2


# --- claims

@pytest.mark.parametrize("value", [None, math.nan, math.inf, float("-inf")])
@pytest.mark.parametrize("kind", [None, "size", "speed"])
@pytest.mark.parametrize("needs", [None, "evidence"])
def test_a_missing_value_fails(book, value, kind, needs):
    c = book.claim("it was measured", value, at_most=3, kind=kind, needs=needs)
    assert c.verdict == "failed" and c.value is None and ("no value" in c.reason or "nan" in c.reason or "inf" in c.reason)
    with pytest.raises(ClaimsFailed, match="it was measured"): book.close()


def test_a_missing_value_fails_without_evidence_too_but_not_without_the_hardware(tmp_path):
    book = start("selection/candidates", settings_for(tmp_path, "smoke"))
    assert book.claim("a", math.nan, at_most=3, needs="evidence").verdict == "failed"
    assert book.claim("b", None, at_most=3, needs="cuda").verdict == "skipped" and "cuda" in book.claim("b", None, at_most=3, needs="cuda").reason
    assert book.claim("c", None, at_most=3, skip="no hub answers").reason == "no hub answers"


@pytest.mark.parametrize("bound, value, verdict", [(dict(at_most=3), 3, "held"), (dict(at_most=3), 3.1, "failed"), (dict(at_least=3), 2.9, "failed"),
    (dict(at_least=1, at_most=3), 2, "held"),
    (dict(equal=0), 0, "held"), (dict(equal=0), 1e-9, "failed"), (dict(equal=1, tolerance=.1), 1.05, "held"), (dict(equal=1, tolerance=.1), .8,
        "failed"), (dict(equal=True), True, "held")])
def test_counted_values_are_judged_in_every_profile(tmp_path, bound, value, verdict):
    for profile in ("smoke", "tiny"):
        assert start("selection/candidates", settings_for(tmp_path, profile)).claim("text", value, **bound).verdict == verdict


finite = st.floats(-100, 100)


@given(finite, st.floats(0, 50), st.floats(0, 50), finite, st.booleans())
def test_a_speed_fails_only_when_the_whole_interval_lies_beyond_the_bound(value, below, above, bound, at_most):
    e = Estimate(value, value - below, value + above, 15)
    verdict, _ = judge(e, **({"high": bound} if at_most else {"low": bound}), kind="speed")
    assert verdict == ("failed" if (e.low > bound if at_most else e.high < bound) else "held")


@given(finite, st.floats(0, 50), st.floats(0, 50), finite, st.booleans(), st.booleans())
def test_other_values_must_keep_the_bound_and_strictly_so_with_their_whole_interval(value, below, above, bound, at_most, strict):
    e = Estimate(value, value - below, value + above, 15)
    verdict, reason = judge(e, **({"high": bound} if at_most else {"low": bound}), strict=strict)
    keeps = (lambda v: v <= bound) if at_most else (lambda v: v >= bound)
    inside = keeps(e.low) and keeps(e.high)
    assert verdict == ("failed" if not keeps(value) else "held" if inside or not strict else "skipped")
    assert verdict != "skipped" or reason.startswith("evidence")


def test_one_observation_decides_no_speed():
    assert judge(estimate([5.], "ms"), high=1, kind="speed")[0] == "skipped" and judge(exact(5), high=1, kind="speed")[0] == "failed"


def test_how_many_observations_would_decide():
    e = Estimate(1, 0, 2, 100)
    _, reason = judge(e, high=1.5, strict=True)
    assert "about 400 " in reason
    assert "would decide" not in judge(Estimate(1, 0, 2, 100), high=1, strict=True)[1]


def test_smoke_enforces_equality_size_and_error_but_neither_speed_nor_quality(tmp_path):
    book = start("selection/candidates", settings_for(tmp_path, "smoke"))
    slow = Estimate(.5, .4, .6, 15, "×")
    assert book.claim("speed", slow, at_least=1, kind="speed").verdict == "skipped"
    assert book.claim("quality", slow, at_least=1, needs="evidence").verdict == "skipped"
    assert book.claim("size", 2, at_most=1, kind="size").verdict == book.claim("equal", 2, equal=1).verdict == book.claim("error", slow, at_least=1,
        kind="error").verdict == "failed"
    tiny = start("selection/candidates", settings_for(tmp_path, "tiny"))
    assert tiny.claim("speed", slow, at_least=1, kind="speed").verdict == tiny.claim("quality", slow, at_least=1, needs="evidence").verdict == "failed"


def test_a_bound_known_to_be_out_of_reach_is_missed_and_stays_what_it_was(tmp_path):
    book = start("selection/candidates", settings_for(tmp_path, "tiny"))
    slow, fast = Estimate(.5, .4, .6, 15, "×"), Estimate(2, 1.9, 2.1, 15, "×")
    c = book.claim("fast", slow, at_least=1, kind="speed", missed="no matrix units")
    assert (c.verdict, c.at_least) == ("missed", 1) and "no matrix units" in c.reason
    assert book.claim("fast there", fast, at_least=1, kind="speed", missed="no matrix units").verdict == "held"
    assert book.claim("nothing", None, at_least=1, kind="speed", missed="no matrix units").verdict == "failed"
    with pytest.raises(UsageError, match="about equality"): book.claim("equal", 2, equal=1, missed="rounding")
    with pytest.raises(ClaimsFailed, match="1 of 3"): book.close()
    smoke = start("selection/candidates", settings_for(tmp_path, "smoke"))
    assert smoke.claim("fast", slow, at_least=1, kind="speed", missed="no matrix units").verdict == "skipped"


@pytest.mark.parametrize("wrong, match", [({}, "at_most, at_least"), (dict(equal=1, at_most=2), "or equal"),
    (dict(at_most=math.nan), "at_most is nan"), (dict(at_most=1, needs="gpus"), "gpu"),
    (dict(at_most=1, value="much"), "much")])
def test_what_a_claim_refuses(book, wrong, match):
    with pytest.raises(UsageError, match=match): book.claim("text", wrong.pop("value", 1), **wrong)
    assert not book.claims


def test_close_names_every_failed_claim_once_with_value_and_bound(book):
    book.claim("fine", 1, at_most=2)
    assert book.close().counts() == dict(held=1, failed=0, missed=0, skipped=0)
    book.claim("too big", exact(30e6, "B"), at_most=20e6); book.claim("too slow", Estimate(.5, .4, .6, 15, "×"), at_least=1, kind="speed")
    with pytest.raises(ClaimsFailed) as e: book.close()
    assert "2 of 3" in str(e.value) and "too big — 30 MB, ≤ 20 MB" in str(e.value) and "too slow" in str(e.value)
    assert "fine" not in str(e.value) and e.value.exit_status == 1
    book.claim("too big", exact(10e6, "B"), at_most=20e6)
    with pytest.raises(ClaimsFailed, match="1 of 3"): book.close()


def test_claims_read_back_and_show(book):
    for verdict, value in (("held", 1), ("failed", 3)): book.claim(f"a <b> {verdict}", Estimate(value, value - .1, value + .1, 9, "ms"), at_most=2, at_least=0)
    assert read(book.folder).claims == book.claims
    table = str(Claims(book.claims))
    assert table.splitlines()[0] == "1 held, 1 failed" and "≥ 0 ms and ≤ 2 ms" in table and table.index("✗") < table.index("✓")
    assert "&lt;b&gt;" in book.claims[0]._repr_html_() and "<b>" not in Claims(book.claims)._repr_html_()


# --- tables, pictures, decisions

@pytest.fixture
def full(book):
    for name, quality, ms, size in (("fp32", 81, 16, 91), ("int8", 80, 9, 24), ("pruned", 77, 16, 80)):
        book.row(name, workload=WORK, quality=dict(accuracy=Estimate(quality, quality - 2, quality + 2, 500, "%")),
            time_ms=Estimate(ms, ms - 1, ms + 1, 15, "ms"),
                 size_bytes=size * 1e6, predicted_ms=ms / 2, floor_ms=ms / 4)
    book.row("gpu kernel", workload=WORK, status="skipped", reason="no GPU")
    return book.ledger


def test_table(full):
    text = str(full.table())
    assert "no GPU" in text and "24 MB" in text and "25%" in text and "first token" not in text and "–" in text
    assert str(full.table(["variant", "time_ms"])).splitlines()[0].split() == ["variant", "time"]
    with pytest.raises(UsageError, match="time_ms"): full.table(["times_ms"])
    assert "opacity" in full._repr_html_() and str(Ledger()) == "no rows" and repr(full.rows[0]).startswith("fp32: ")


def test_where_and_frame(full):
    assert [r.variant for r in full.where(variant="int8", batch=1).rows] == ["int8"] and not full.where(batch=8).rows
    with pytest.raises(UsageError, match="variant"): full.where(varient="int8")
    frame = full.frame()
    assert frame["time_ms"].tolist()[:3] == [16, 9, 16] and frame["time_ms_low"][1] == 8
    assert frame["quality.accuracy"][1] == 80 and frame["batch"].tolist() == [1] * 4


def test_pictures(full):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    ax = full.pareto("size")
    assert ax.get_xlabel().startswith("on disk, MB")
    assert {t.get_text(): t.get_color() for t in ax.texts if t.get_text()} == dict(fp32="black", int8="black", pruned="#777")
    fig, own = plt.subplots()
    assert full.predicted_vs_measured(own) is own and [t.get_text() for t in own.texts if t.get_text()] == ["fp32", "int8", "pruned"]
    with pytest.raises(UsageError, match="peak_memory_bytes"): full.pareto("peak")
    with pytest.raises(UsageError, match="accuracy"): full.pareto(quality="accurracy")
    with pytest.raises(UsageError, match="no row"): Ledger().pareto()
    with pytest.raises(UsageError, match="no row"): Ledger().predicted_vs_measured()
    plt.close("all")


def test_quality_and_speed_may_stand_in_two_rows(book):
    book.row("int8", model="embedded:minilm", weights="trained", workload=dict(task="classify"), quality=AT_81, quality_metric="accuracy")
    book.row("int8", model="random:big", weights="random", workload=WORK, time_ms=9.)
    assert book.ledger.best().chosen.quality["accuracy"] == AT_81 and "9 ms" in str(book.ledger.best())


def test_decisions(full):
    assert full.best(tolerance=2.).chosen.variant == "int8" and full.best().chosen.variant == "fp32"
    assert full.best(prefer="size", tolerance=5).chosen.variant == "int8"
    none = full.best(tolerance=5., size=1e6)
    assert none.chosen is None and "none passes" in str(none) and str(none).count("above 1 MB") == 3
    assert "not measured" in str(full.best(peak=1)) and full.best(peak=1).chosen is None
    with pytest.raises(UsageError, match="size_bytes"): full.best(sizes_bytes=3)


def test_less_can_be_better(book):
    for name, bits in (("a", 1.2), ("b", 1.0)): book.row(name, workload=WORK, quality=dict(bits_per_byte=exact(bits)), time_ms=1.)
    assert book.ledger.best().chosen.variant == "b" and book.ledger.best(lower=False).chosen.variant == "a"


def test_reading_needs_nothing_heavy(book):
    import subprocess, sys
    book.row("fp32", workload=WORK, quality=AT_81, quality_metric="accuracy", time_ms=3.)
    code = f"import sys; from llmlab.kit import ledger; l = ledger.merge([{str(book.folder)!r}]); l._repr_html_(); l.best()\n" \
           "print([m for m in ('numpy', 'scipy', 'pandas', 'matplotlib', 'torch', 'statsmodels') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_surrounds_a_row(monkeypatch):
    monkeypatch.undo()
    assert ledger._versions()["python"] and (ledger.revision() or "x")[:1].isalnum()
    assert {"cpu", "cores"} <= set(ledger._machine(ledger._hardware()))


def test_best_keeps_bounds_first_and_may_ask_for_proof(tmp_path):
    s = settings("smoke", out_dir=tmp_path, device="cpu")
    book = start("some/thing", s)
    right = [1.0] * 80 + [0.0] * 20
    near, poor = right[1:] + [0.0], [0.0] * 50 + right[:50]
    for name, correct, ms, size in (("dear", right, 9, 100), ("near", near, 3, 100), ("poor", poor, 2, 100), ("small", [0.0] * 100, 1, 1)):
        book.row(name, model=name, quality={"accuracy": estimate(correct, "%")}, size_bytes=size, time_ms=exact(ms, "ms"))
    assert book.ledger.best().chosen.variant == "dear"
    assert book.ledger.best(tolerance=None).chosen.variant == "near"  # 80 against 79 of 100 shows nothing; 80 against 50 does
    assert book.ledger.best(size=10).chosen.variant == "small"  # the best among those that fit
