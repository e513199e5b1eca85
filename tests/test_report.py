"""The report, its pictures, the pages of notebooks, and the comparison of two runs."""
import json
import math
import random
import re
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings as fast, strategies as st

from llmlab.kit.settings import UsageError
from llmlab.kit.stats import Estimate, estimate, ratio
from llmlab.lab import compare, doctor, engine, figures, progress, report
from llmlab.lab.plan import write_json, write_whole
from llmlab.lab.results import Result, Run, read_run

v4 = nbformat.v4
REMOTE = re.compile(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?(?:https?:)?//""")


def est(v, half, unit="", n=30): return dict(value=v, low=v - half, high=v + half, n=n, unit=unit)


def rows(quality=(81., 80., 74.), speed=(1., 1.8, 1.9), data="d1"):
    names, times = ("fp32 <b>", "int8 & co", '3 "layers"'), [16 / s for s in speed]
    return [dict(id=str(i), notebook="demo/one", chapter="demo", written=i, variant=n, model="m", weights="trained", data=data, status="measured",
        workload=dict(task="classify", phase="encode", batch=1), quality=dict(accuracy=est(q, 2, "%")), time_ms=est(t, t / 20, "ms"), ratio=est(s, s / 30, "×"),
        ratio_of=names[0], predicted_ms=t * .9, predicted_ratio=s, floor_fraction=.4, size_bytes=(91, 24, 59)[i] * 10**6, metrics=dict(p99_ms=t * 2))
        for i, (n, q, t, s) in enumerate(zip(names, quality, times, speed))]


def write_run(folder, all_rows=(), claims=(), results=None, **info):
    results = results or [Result("demo/one", "a", 60, "ok", 12., 20, 20, title="One & only")]
    about = dict(profile="tiny", device="cpu", processor="cpu", settings=dict(evidence=True), **info)
    write_json(folder/"run.json", dict(about, notebooks=[r.to_dict() for r in results]))
    for r in results: write_json(folder/r.slug/"result.json", r.to_dict())
    lines = lambda found: "".join(json.dumps(o) + "\n" for o in found)
    write_whole(folder/"demo__one"/"rows.jsonl", lines(all_rows))
    write_whole(folder/"demo__one"/"claims.jsonl", lines(claims))
    write_whole(folder/"demo__one"/"notebook.html", "<p>")
    return read_run(folder)


def claim(text, verdict, **more): return dict(id=text, notebook="demo/one", text=text, verdict=verdict, value=est(1., .2, "%"), at_most=3, **more)


@pytest.fixture
def full(tmp_path):
    skipped = dict(id="s", notebook="demo/one", variant="challenger", status="skipped", reason="the hub is away", workload={})
    broken = Result("demo/two", "b", 60, "error", 1., 4, 2, dict(cell=2, name="KeyError", value="'x'", source="d['<x>']", traceback=""))
    claims = [claim("good", "held"), claim("bad <i>", "failed"), claim("later", "skipped", reason="hardware: needs cuda")]
    ceilings = dict(points=[[1e6, 50., 48.], [1e8, 20., None]], rates=dict(float32=90.), dispatch_s=7e-6, threads=2, measured="2026-11-23T06:20:12+00:00")
    results = [Result("demo/one", "a", 60, "claims", 12., 20, 20), broken]
    return write_run(tmp_path/"20260101-000000-tiny", [*rows(), skipped], claims, results, ceilings=ceilings)


def test_the_page_says_everything_and_asks_nobody(full):
    page = report.write_report(full).read_text()
    assert not REMOTE.search(page) and str(full.folder.parent) not in page
    wanted = ("1 notebook is broken", "KeyError", "fp32 &lt;b&gt;", "int8 &amp; co", "bad &lt;i&gt;", "needs cuda", "the hub is away",
        "demo__one/notebook.html", "GB/s", "llmlab run --profile tiny", "prefers-color-scheme: dark", "Content-Security-Policy")
    for said in wanted: assert said in page, said
    assert "<b>fp32" not in page and "demo__two/notebook.html" not in page, "no link to a page that is not there"
    places = [page.index(o) for o in ("notebook is broken", 'id="claims"', 'id="pareto"', 'id="ledger"')]
    assert places == sorted(places)
    assert page.count("<svg") >= 4 and 'value="size"' in page


@pytest.mark.parametrize("claims, headline, mood", [
    ([claim("a", "held")], "All claims held", "good"),
    ([claim("a", "held"), claim("b", "failed")], "1 of 2 claims failed", "bad"),
    ([claim("a", "held"), claim("b", "skipped")], "1 claims held, 1 could not be decided here", "good"),
    ([claim("b", "skipped")], "No claim could be decided here", "skip"),
    ([claim("a", "held"), claim("b", "missed")], "1 claims held, 1 bound missed, 0 could not be decided here", "skip"),
    ([], "none of them claims anything", "good"),
])
def test_verdict_first(tmp_path, claims, headline, mood):
    status = "claims" if any(c["verdict"] == "failed" for c in claims) else "ok"
    run = write_run(tmp_path/"r", [], claims, [Result("demo/one", "a", 60, status, 1., 2, 2)])
    assert headline in report._headline(run)[0] and report._headline(run)[1] == mood
    assert headline.split(",")[0] in report.page(run)


def test_a_run_with_nothing_in_it(tmp_path):
    run = write_run(tmp_path/"r", results=[Result("demo/one", "a", 60)])
    assert "Unfinished" in report.page(run)


def test_trade_offs_are_among_what_can_be_compared():
    found = report.trade_offs(rows() + [dict(r, notebook="demo/two") for r in rows()] + [dict(r, data="other", id="x" + r["id"]) for r in rows()])
    assert len(found) == 3 and all(set(o["pictures"]) == {"time", "size"} for o in found)
    assert report.trade_offs(rows()[:1]) == []
    assert "less is better" in report.trade_offs([dict(r, quality=dict(perplexity=est(9, 1))) for r in rows()])[0]["pictures"]["time"]


def test_predictions_leave_out_what_is_not_there():
    found = report.predictions([*rows(), dict(rows()[0], predicted_ms=None), dict(rows()[1], time_ms=None, ratio=None)])
    assert len(found) == 3 and "speedup" not in found[0] and math.isclose(found[1]["time"]["off"], 1 / .9)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.booleans())
@fast(max_examples=60, deadline=None)
def test_ticks(low, width, log):
    low = abs(low) + 1e-6 if log else low
    high = low + width + abs(low) * 1e-3
    found = figures.ticks(low, high, log)
    room = 1e-6 * (width + abs(low) + abs(high))
    assert found == sorted(found) and len(found) <= 14 and all(low - room <= o <= high + room for o in found)


@given(st.lists(st.tuples(st.floats(.001, 1e4), st.floats(0, 100)), min_size=1, max_size=12))
@fast(max_examples=30, deadline=None)
def test_pictures_never_have_a_number_that_is_none(points):
    found = [figures.Point(f"v{i}", x, y, y - 1 if i % 2 else None, y + 1 if i % 2 else None) for i, (x, y) in enumerate(points)]
    for svg in (figures.scatter(found, "x", "y"), figures.diagonal([figures.Point(p.name, p.x, p.y + .1) for p in found], "ms")):
        assert "nan" not in svg and "inf" not in svg.replace("inf\"", "") and svg.count("<circle") == len(found)


def test_names_do_not_cover_each_other():
    rng = random.Random(0)
    points = [(rng.uniform(50, 500), rng.uniform(20, 300), f"variant {i}") for i in range(25)]
    boxes = []
    for (_, _, text), at in zip(points, figures.place(points, (0, 0, 560, 320))):
        if at is None: continue
        w = .56 * 12.5 * len(text) + 2
        left = at[0] - dict(start=0, middle=w / 2, end=w)[at[2]]
        boxes.append((left, at[1] - 10.5, left + w, at[1] + 2))
    assert len(boxes) > 15
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(1200, "light"), (390, "dark")])
def test_in_a_browser(full, chromium, width, scheme):
    "Sorted and filtered by keyboard; nothing asked of a network; no sideways scrolling of the page on a phone."
    from conftest import launch
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = launch(p, chromium)
        page = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme)
        asked, wrong = [], []
        page.on("request", lambda r: asked.append(r.url))
        for event in ("console", "pageerror"): page.on(event, lambda e: wrong.append(str(e)))
        page.goto(report.write_report(full).resolve().as_uri())
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 30)"
        assert dark == (scheme == "dark")
        ledger = page.locator("#ledger-table")
        variants = lambda: [o.split("\n")[0].strip() for o in ledger.locator("tbody tr:visible th").all_inner_texts()]
        head = ledger.locator("th", has=page.locator("button", has_text="on disk"))
        head.locator("button").focus()
        for order in ("ascending", "descending"):
            page.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == order and variants()[-1] == "challenger", "an empty cell is last in both orders"
            assert variants()[0] == ("int8 & co" if order == "ascending" else "fp32 <b>")
        page.locator("[data-for=ledger-table] input").fill("int8")
        assert variants() == ["int8 & co"] and "1 of 4 rows" in page.locator("[data-for=ledger-table] [role=status]").inner_text()
        browser.close()
    assert len(asked) == 1 and not wrong


# pages of notebooks

def test_a_notebook_page(monkeypatch, tmp_path):
    text = "# T\nThe floor $t \\geq \\frac{a}{b}$ costs \\$5 or \\$6, and `$HOME`.\n\n$$x^2$$\n\n$\\unknowncommand{x}$ <a href='https://a.org/'>a link</a>"
    widget = v4.new_output("display_data", {"text/plain": "100%", "application/vnd.jupyter.widget-view+json": dict(model_id="1")})
    plot = v4.new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    said = v4.new_output("stream", text=f"{Path.home()}/x {engine.checkout()}/nbs/y.py {engine.sys.prefix}/lib/z.py /tmp/ipykernel_12/34.py:1: Warning")
    nb = v4.new_notebook(cells=[v4.new_markdown_cell(text), v4.new_code_cell("print('$x$')", outputs=[said, widget, plot])], metadata=dict(widgets=dict(a=1)))
    engine.clean_notebook(nb, "demo/one")
    page = engine.notebook_page(nb, "demo/one")
    assert page.count("<svg") == 2 and "<script" not in page and "widget" not in page and "100%" in page and "data:image/png" in page
    assert '<code class="tex">\\unknowncommand{x}</code>' in page and "<code>$HOME</code>" in page and "costs $5 or $6" in page
    assert not REMOTE.search(page.replace("https://a.org/", "")), "what a page loads; a link that one may follow is none"
    assert "cell&gt;:1: Warning" in page and "./nbs/y.py" in page
    assert str(Path.home()) + "/" not in page and str(engine.sys.prefix) not in page


def test_folders_are_replaced_at_their_ends_only():
    prefix = engine.sys.prefix
    assert engine.without_paths(f"{prefix}/lib {prefix}x") == f"<python>/lib {engine.without_paths(prefix + 'x')}"
    assert engine.without_paths("/usr/bin/env") == "/usr/bin/env"


# two runs

def test_the_same_run_has_no_regression(tmp_path):
    run = write_run(tmp_path/"a", rows(), [claim("good", "held")])
    got = compare.compare_runs(run, run)
    assert not got.regressions and not got.improvements and len(got.changes) > 6 and "no regressions" in str(got)


def test_regressions_are_found(tmp_path):
    a = write_run(tmp_path/"a", rows(), [claim("good", "held"), claim("then", "failed")])
    worse = [dict(r, size_bytes=r["size_bytes"] * 2) if i == 2 else r for i, r in enumerate(rows(quality=(81, 70, 74), speed=(1., 1.2, 1.9)))]
    b = write_run(tmp_path/"b", worse, [claim("good", "failed"), claim("then", "held")])
    got = compare.compare_runs(a, b)
    assert sorted((c.what, c.variant.split(",")[0]) for c in got.regressions) == [
        ("accuracy", "int8 & co"), ("claim", "good"), ("on disk", '3 "layers"'), ("speed-up", "int8 & co")]
    assert [(c.what, c.variant) for c in got.improvements] == [("claim", "then")]
    assert {c.what for c in compare.compare_runs(b, a).improvements} >= {"accuracy", "speed-up", "on disk"}
    assert json.loads(json.dumps(got.to_dict()))["compared"] == len(got.changes)


def test_quality_is_compared_over_the_same_data_only(tmp_path):
    a = write_run(tmp_path/"a", rows())
    b = write_run(tmp_path/"b", rows(quality=(1, 1, 1), data="d2"))
    got = compare.compare_runs(a, b)
    assert not got.regressions and any("other data" in o for o in got.notes)
    with pytest.raises(UsageError, match="nothing|no notebook"): compare.compare_runs(a, write_run(tmp_path/"c", results=[Result("other/x", "", 1)]))


def test_smoke_times_nothing(tmp_path):
    a, b = write_run(tmp_path/"a", rows()), write_run(tmp_path/"b", rows(speed=(1., 1.1, 1.1)))
    assert compare.compare_runs(a, b).regressions
    a.info["settings"]["evidence"] = False
    got = compare.compare_runs(a, b)
    assert not got.regressions and "speed was not compared" in str(got)


def test_chance_is_no_regression():
    "Two hundred runs of the same code in pairs: noise within and between runs, and not one regression."
    def run(seed):
        rng, made = random.Random(seed), []
        for i in range(6):
            mood, layout = [rng.lognormvariate(0, .2) for _ in range(15)], rng.lognormvariate(0, .03)
            base, quick = ([m * t * rng.lognormvariate(0, .05) for m in mood] for t in (16., 9. * layout))
            r = ratio(estimate(base, "ms", "median", resamples=100), estimate(quick, "ms", "median", resamples=100))
            made.append(dict(notebook="demo/one", variant=f"v{i}", ratio=r.to_dict(samples=False), ratio_of="fp32"))
        return Run(Path(f"r{seed}"), {}, [], made, [])
    runs = [run(i) for i in range(60)]
    assert sum(len(compare.compare_runs(a, b).regressions) for a, b in zip(runs, runs[1:])) == 0


def test_paired_quality_sees_what_intervals_cannot():
    rng = random.Random(0)
    right = [rng.random() < .7 for _ in range(800)]
    fewer = [ok and rng.random() > .04 for ok in right]
    a, b = estimate(right), estimate(fewer)
    assert b.high > a.low, "the intervals overlap"
    assert compare.quality_change(a, b, .999)[2] < 0
    loose = [Estimate(e.value, e.low, e.high, e.n) for e in (a, b)]
    assert compare.quality_change(*loose, .999)[2] > 0


# words

def test_durations_and_failures():
    assert [progress.duration(o) for o in (None, .04, 59.94, 61, 3600)] == ["", "0.0 s", "59.9 s", "1:01", "60:00"]
    raised = dict(cell=3, name="E", value="v", source="\n".join(map(str, range(40))))
    r = Result("demo/one", "a", 60, "error", 1., 9, 3, raised, source="nbs/01_demo/01_one.ipynb")
    said = progress.failure(r, "_runs/x")
    assert "cell 3 of 9" in said and "39" in said and "\n    20" not in said and "_runs/x/demo__one/notebook.html" in said


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert doctor.hub(1.).state == "optional"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub(1.).found


def test_a_bound_is_shown_with_its_tolerance(tmp_path):
    run = write_run(tmp_path/"20260101-000000-tiny", rows(), [dict(claim("a", "held"), at_most=None, equal=3, tolerance=.5)])
    assert "= 3 % ± 0.5 %" in report.write_report(run).read_text("utf-8")
