"""The command line: its help, its refusals and their exit status, and what it prints about a run."""
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llmlab.kit.settings import UsageError
from llmlab.lab.cli import app
from test_report import claim, rows, write_run
from test_runner import write_notebook

CODE = "from llmlab.lab.cli import main; main()"


def llmlab(*args, **how):
    return subprocess.run([sys.executable, "-c", CODE, *map(str, args)], capture_output=True, text=True, timeout=120, **how)


def invoke(*args): return CliRunner().invoke(app, list(map(str, args)))


@pytest.mark.parametrize("command", [(), *[(o,) for o in ("run", "list", "show", "report", "compare", "doctor", "store")], ("store", "prune")])
def test_help_helps(command):
    got = invoke(*command, "--help")
    assert got.exit_code == 0 and "Usage" in got.output and len(got.output.splitlines()) > 5
    assert "serve" not in got.output and "ray" not in got.output.split()


def test_help_imports_nothing_heavy():
    code = f"import sys; sys.argv = ['llmlab', '--help']\ntry:\n    {CODE}\nexcept SystemExit: pass\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert got.stdout.splitlines()[-1] == "[]", got.stdout + got.stderr


HEAVY = ("torch", "transformers", "pandas", "matplotlib", "scipy", "numpy", "papermill", "nbformat", "rich", "jinja2", "psutil")


@pytest.mark.parametrize("args, status, said", [
    (("run", "nochapter"), 2, "unknown chapter"),
    (("run", "--profile", "tinny"), 2, "Did you mean tiny"),
    (("run", "-p", "sead=1"), 2, "Did you mean seed"),
    (("run", "-p", "seed"), 2, "name=value"),
    (("run", "-p", "seed=-1"), 2, "out of range"),
    (("run", "-p", "device=cuda:99"), 2, "use --device"),
    (("run", "--device", "gpu"), 2, "Known: auto, cpu, cuda"),
    (("run", "--device", "cuda:99"), 4, "cuda:99"),
    (("run", "--jobs", "many"), 2, "Usage: llmlab run"),
    (("nosuch",), 2, "No such command"),
    (("show", "nosuch"), 2, "no run yet"),
    (("store", "prune"), 2, "--all"),
])
def test_refusals_have_a_sentence_and_a_status(tmp_path, args, status, said):
    write_notebook(tmp_path/"nbs", "01_demo/01_one.ipynb", "1")
    more = ["--out", tmp_path/"runs"] if args[0] in ("run", "show") else []
    more += ["--notebooks", tmp_path/"nbs"] if args[0] == "run" else []
    got = llmlab(*args, *more)
    assert got.returncode == status and said in got.stderr and "Traceback" not in got.stderr
    assert not (tmp_path/"runs").exists()


def test_run_list_show_report(tmp_path):
    course, out = tmp_path/"nbs", tmp_path/"runs"
    write_notebook(course, "01_demo/01_good.ipynb", "6 * 7")
    write_notebook(course, "01_demo/02_bad.ipynb", "x = 1\nx / 0")
    where = ("--notebooks", course, "--out", out)
    plan = llmlab("run", "--profile", "smoke", "--dry-run", *where)
    assert plan.returncode == 0 and "demo/good" in plan.stdout and "minutes" in plan.stdout and not out.exists()
    got = llmlab("run", "--profile", "smoke", *where)
    assert got.returncode == 3, got.stdout + got.stderr
    assert "ZeroDivisionError: division by zero" in got.stdout and "    x / 0" in got.stdout and "nbs/01_demo/02_bad.ipynb" in got.stdout
    assert "[1/2] ✓ demo/good" in got.stdout and "\x1b" not in got.stdout, "plain lines where there is no terminal"
    run = next(out.glob("*/verdict.json")).parent
    assert (run/"report.html").is_file()
    assert "demo/good" in invoke("list", "--notebooks", course).output
    assert run.name in invoke("list", "--runs", "--out", out).output
    shown = invoke("show", "--out", out)
    assert shown.exit_code == 0 and "division by zero" in shown.output
    assert json.loads(invoke("show", "--json", "--out", out).output)["exit_status"] == 3
    (run/"report.html").unlink()
    assert str(run/"report.html") in invoke("report", "--out", out).output and (run/"report.html").is_file()
    assert "measured before" in llmlab("run", "demo/good", "--profile", "smoke", "--dry-run", *where).stdout


def test_damaged_runs_are_named_and_the_others_listed(tmp_path):
    whole, half = write_run(tmp_path/"20260101-000000-tiny", rows(), [claim("a", "held")]).folder, tmp_path/"20260102-000000-tiny"
    half.mkdir()
    for text in ("", "{", "[]", "\xff"):
        (half/"run.json").write_text(text, "latin-1")
        listed = invoke("list", "--runs", "--out", tmp_path).output
        assert "held" in listed and f"{half.name}  damaged" in listed
        shown = invoke("show", "--out", tmp_path)
        assert isinstance(shown.exception, UsageError) and "holds no run" in str(shown.exception) and "remove the folder" in str(shown.exception)
    for name in ("rows.jsonl", "claims.jsonl"):
        with open(whole/name, "ab") as f: f.write(b'{"id": "\xff')
    shown = invoke("show", whole.name, "--out", tmp_path)
    assert shown.exit_code == 0 and "rows.jsonl" in shown.output, shown.output


def test_a_damaged_settings_file_ends_the_command(tmp_path):
    "A copy of the package with a settings file that was cut."
    import shutil
    import llmlab as package
    shutil.copytree(os.path.dirname(package.__file__), tmp_path/"llmlab", ignore=shutil.ignore_patterns("__pycache__"))
    ini = tmp_path/"llmlab"/"assets"/"settings.ini"
    text = ini.read_text("utf-8")
    for damaged, said in ((text[:200], "git checkout settings.ini"), (text.replace("pairs  ", "pears  "), "Did you mean pairs"), (None, "is missing")):
        ini.unlink() if damaged is None else ini.write_text(damaged, "utf-8")
        got = llmlab("run", "--dry-run", env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
        assert got.returncode == 2 and said in got.stderr and "Traceback" not in got.stderr, got.stderr


def test_a_file_is_found_from_where_the_command_is_called(tmp_path):
    write_notebook(tmp_path/"nbs", "01_demo/01_one.ipynb", "from llmlab.kit import data", "data.origin(task)", parameters='profile = "tiny"\ntask = ""')
    again = lambda: llmlab("run", "--profile", "smoke", "-p", "task=mine.txt", "--notebooks", "nbs", "--out", "runs", cwd=tmp_path)
    got = again()
    assert got.returncode == 2 and "there is no file" in got.stdout and str(tmp_path) not in got.stdout
    (tmp_path/"mine.txt").write_text("a text")
    got = again()
    assert got.returncode == 0, got.stdout
    assert "1 kept" in again().stdout
    (tmp_path/"mine.txt").write_text("another text")
    assert "kept" not in again().stdout, "another file is another input"
    for f in (o for o in (tmp_path/"runs").rglob("*") if o.is_file()): assert str(tmp_path) not in f.read_text("utf-8", errors="replace"), f.name


def test_compare(tmp_path):
    write_run(tmp_path/"20260101-000000-tiny", rows(), [claim("a", "held")])
    write_run(tmp_path/"20260102-000000-tiny", rows(speed=(1., 1.1, 1.9)), [claim("a", "held")])
    same = invoke("compare", "20260101", "20260101", "--out", tmp_path)
    assert same.exit_code == 0 and "no regressions" in same.output
    worse = invoke("compare", "20260101", "latest", "--out", tmp_path)
    assert worse.exit_code == 1 and "speed-up" in worse.output
    assert len(json.loads(invoke("compare", "20260101", "20260102", "--json", "--out", tmp_path).output)["regressions"]) == 1
    assert isinstance(invoke("compare", "2026010", "latest", "--out", tmp_path).exception, UsageError), "which of the two?"


def test_publish(tmp_path):
    run = write_run(tmp_path/"runs"/"20260101-000000-tiny", rows(), [claim("a", "held")])
    to = tmp_path/"results"
    assert "report.html" in invoke("publish", "--to", to, "--out", tmp_path/"runs").output
    assert {f.name for f in to.iterdir()} == {"run.json", "rows.jsonl", "claims.jsonl", "verdict.json", "junit.xml", "report.html"}
    shown = invoke("show", str(to), "--out", tmp_path/"runs")
    assert shown.exit_code == 0 and "held" in shown.output
    assert "no regressions" in invoke("compare", str(to), "latest", "--out", tmp_path/"runs").output
    for f in to.iterdir(): assert str(tmp_path) not in f.read_text("utf-8"), f.name
    before = (to/"rows.jsonl").read_text("utf-8")
    for changes, said in ((dict(revision="abc+changes"), "not committed"), (dict(state="interrupted"), "not finished")):
        info = json.loads((run.folder/"run.json").read_text("utf-8")) | changes
        (run.folder/"run.json").write_text(json.dumps(info), "utf-8")
        refused = invoke("publish", "--to", to, "--out", tmp_path/"runs").exception
        assert isinstance(refused, UsageError) and said in str(refused)
    assert (to/"rows.jsonl").read_text("utf-8") == before
    (run.folder/"run.json").write_text(json.dumps(info | dict(state="done", revision="abc")), "utf-8")
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"letter.txt").write_text("do not replace me")
    assert isinstance(invoke("publish", "--to", tmp_path/"mine", "--out", tmp_path/"runs").exception, UsageError)


def test_doctor(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    got = invoke("doctor", "--json")
    found = json.loads(got.output)
    assert got.exit_code == (0 if found["well"] else 4) and {"python", "memory", "devices", "embedded encoder"} <= {f["what"] for f in found["findings"]}


def test_store(fresh_home):
    assert "empty" in invoke("store", "list").output
    from llmlab.kit import store
    @store.recipe(version=1)
    def something(folder, *, n): (folder/"x").write_bytes(b"0" * n)
    store.build(something, n=2_000_000, progress=False)
    assert "something" in invoke("store", "list").output and "2.0 MB in 1 artefacts" in invoke("store", "size").output
    assert "removed 0" in invoke("store", "prune", "--older-than", "1").output
    assert "removed 1" in invoke("store", "prune", "--all").output and "empty" in invoke("store", "list").output


def test_without_a_terminal_a_closed_pipe_is_no_error():
    got = subprocess.run(f"{sys.executable} -c {CODE!r} list | head -1", shell=True, capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in got.stderr


def test_show_fits_a_terminal_and_says_why_something_is_missing(tmp_path):
    for i, r in enumerate(found := rows()): r["workload"] = dict(task="classify", phase="encode", batch=1 + i // 2)
    skipped = dict(found[0], id="s", variant="challenger", status="skipped", reason="the hub is away " * 20, quality={}, time_ms=None, ratio=None)
    write_run(tmp_path/"20260101-000000-tiny", [*found, skipped], [dict(claim("a", "held"), written=1., kind="size")])
    shown = invoke("show", "--out", tmp_path).output
    tables = [line for line in shown.splitlines() if not line.startswith("skipped:")]
    assert max(map(len, tables)) <= 120 and "skipped: challenger — the hub is away" in shown
    assert shown.count("classify · encode") == 2 and "✓ held" in shown and "no rows" not in shown
