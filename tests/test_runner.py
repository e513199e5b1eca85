"""The runner: what is refused, what is kept, and what happens when things go wrong. All notebooks here are tiny fakes."""
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
import xml.etree.ElementTree as xml
from pathlib import Path

import nbformat
import psutil
import pytest

from llmlab.kit.settings import Unavailable, UsageError, budget_s
from llmlab.lab import engine, kernels, plan as plans, runner
from llmlab.lab.results import exit_status, find_run, merged, read_run

v4 = nbformat.v4
SMOKE_BUDGET = budget_s("demo/one", "smoke")


def write_notebook(folder, path, *cells, parameters='profile = "tiny"\nseed = 0\nout_dir = ""'):
    "A notebook with a parameter cell and these code cells."
    file = folder/path
    file.parent.mkdir(parents=True, exist_ok=True)
    first = [v4.new_code_cell(parameters, metadata=dict(tags=["parameters"]))] if parameters else []
    nb = v4.new_notebook(cells=[v4.new_markdown_cell(f"# {file.stem}\n> Small."), *first, *map(v4.new_code_cell, cells)],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nbformat.write(nb, file)
    return file


@pytest.fixture
def course(tmp_path): return tmp_path/"nbs"


@pytest.fixture
def go(course, tmp_path):
    "Run the fake course under smoke, one notebook after another."
    return lambda *names, **how: runner.run(names, "smoke", folder=course, out=tmp_path/"runs", **{"jobs": 1, **how})


def command(course, out, *more):
    return [sys.executable, "-c", "from llmlab.lab.cli import main; main()", "run", "--profile", "smoke", "--jobs", "1",
        "--notebooks", str(course), "--out", str(out), *more]


def family(mark):
    "Living processes that carry a variable of the environment."
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get("LLMLAB_TEST") == mark and p.status() != psutil.STATUS_ZOMBIE: found.append(p)
        except (psutil.Error, OSError): continue
    return found


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what(): return found
        time.sleep(.05)
    raise AssertionError("waited in vain")


# refused before a kernel starts

@pytest.mark.parametrize("how, said", [
    (dict(names=["nochapter"]), "unknown chapter or part 'nochapter'"),
    (dict(names=["demo/nopart"]), "Did you mean demo/one"),
    (dict(profile="tinny"), "Did you mean tiny"),
    (dict(parameters=dict(sead="1")), "Did you mean seed"),
    (dict(parameters=dict(seed="one")), "whole number"),
    (dict(parameters=dict(seed="-1")), "out of range"),
    (dict(device="gpu9"), "unknown device"),
    (dict(jobs=0), "--jobs"),
    (dict(budget=0), "--budget"),
])
def test_refused(course, tmp_path, how, said):
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    with pytest.raises(UsageError, match=said): runner.run(**{**dict(profile="smoke"), **how}, folder=course, out=tmp_path/"runs")
    assert not (tmp_path/"runs").exists()


def test_a_device_that_is_not_here(course, tmp_path):
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    with pytest.raises(Unavailable, match="cuda:77"): runner.run((), "smoke", "cuda:77", folder=course, out=tmp_path/"runs")


def test_names_and_the_default_set(course):
    names = ("index", "kit/00_a", "lab/00_b", "01_demo/01_one", "01_demo/.ipynb_checkpoints/01_one", "02_more/09_exercises")
    for path in names: write_notebook(course, f"{path}.ipynb", "1")
    found = plans.notebooks(course)
    assert [n.name for n in found] == ["kit/a", "demo/one", "more/exercises", "lab/b"]
    assert [n.name for n in plans.select(found)] == ["demo/one", "more/exercises"]
    for name in ("demo", "01_demo", "demo/one", "01_demo/01_one", "nbs/01_demo/01_one.ipynb", "./nbs/01_demo/"):
        assert [n.name for n in plans.select(found, [name])] == ["demo/one"]
    assert [n.name for n in plans.select(found, ["more", "kit", "more/exercises"])] == ["kit/a", "more/exercises"]


def test_parameters_reach_those_that_have_them(course):
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    write_notebook(course, "01_demo/02_two.ipynb", "1", parameters='profile = "tiny"\nrate: float = .1\nfast = True\nname = ""')
    write_notebook(course, "01_demo/03_three.ipynb", "1", parameters="")
    given = plans.parse_parameters(["seed=3", "rate=2", "fast=no", "name=a=b"])
    mine = plans.parameters_for(plans.notebooks(course), given, "smoke")
    assert mine == {"demo/one": dict(profile="smoke", seed=3), "demo/two": dict(profile="smoke", rate=2., fast=False, name="a=b"), "demo/three": {}}
    for wrong in ("seed", "=1", "a b=1", "profile=tiny", "out_dir=x"):
        with pytest.raises(UsageError): plans.parse_parameters([wrong])


def test_a_file_that_is_no_notebook(course):
    write_notebook(course, "01_demo/01_one.ipynb", "1").write_text('{"cells": ')
    with pytest.raises(UsageError, match="01_one.ipynb is not a notebook"): plans.notebooks(course)


def test_inputs_change_with_everything_that_enters(course):
    file = write_notebook(course, "01_demo/01_one.ipynb", "1")
    key = lambda **how: plans.plan((), **{**dict(profile="smoke"), **how}, folder=course).items[0].inputs
    first = key()
    assert first == key() == key(device="cpu") or "device" not in plans.notebooks(course)[0].parameters
    assert len({first, key(profile="tiny"), key(parameters=dict(seed="1"))}) == 3
    nb = nbformat.read(file, 4)
    nb.metadata["x"] = 1
    nb.cells[-1].outputs = [v4.new_output("stream", text="an output")]
    nbformat.write(nb, file)
    assert key() == first
    write_notebook(course, "01_demo/01_one.ipynb", "2")
    assert key() != first


# runs

def test_run_and_resume(course, go, tmp_path):
    row = dict(id="a", notebook="demo/one", written=1, variant="v")
    write = f"import os, json\nopen('rows.jsonl', 'w').write(json.dumps({row!r}))"
    write_notebook(course, "01_demo/01_one.ipynb", write, "os.getcwd(), profile, out_dir, seed")
    counter = tmp_path/"counter"
    count = f"open({str(counter)!r}, 'a').write('x')\nassert len(open({str(counter)!r}).read()) > 1, 'the first time'"
    write_notebook(course, "01_demo/02_two.ipynb", count)
    first = go(parameters=dict(seed="5"))
    assert [r.status for r in first.results] == ["ok", "error"] and first.exit_status == 3
    error = first.results[1].error
    assert error["name"] == "AssertionError" and error["value"] == "the first time" and "assert len" in error["source"] and error["cell"] == 3
    second = go(parameters=dict(seed="5"))
    assert second.folder == first.folder and [(r.status, r.kept) for r in second.results] == [("ok", True), ("ok", False)] and second.exit_status == 0
    third = go(parameters=dict(seed="5"))
    assert [r.kept for r in third.results] == [True, True] and counter.read_text() == "xx"
    p = plans.plan((), "smoke", parameters=dict(seed="5"), folder=course)
    other = plans.plan((), "smoke", parameters=dict(seed="6"), folder=course)
    for plan, fresh, same in ((p, False, True), (p, True, False), (other, False, False)):
        folder, lock, again = runner.open_run(plan, first.folder.parent, fresh)
        lock.release()
        (folder/".lock").unlink(missing_ok=True)
        assert (folder == first.folder) == again == same
    one = first.folder/"demo__one"
    text = "".join(f.read_text() for f in (one/"notebook.html", one/"notebook.ipynb", first.folder/"run.json"))
    assert str(tmp_path) not in text and "5)" in text and "<script src" not in text and "https://" not in text
    assert json.loads((first.folder/"rows.jsonl").read_text())["variant"] == "v"
    verdict = json.loads((first.folder/"verdict.json").read_text())
    assert verdict["verdict"] == "held" and verdict["exit_status"] == 0 and [n["status"] for n in verdict["notebooks"]] == ["ok", "ok"]
    assert not list(first.folder.rglob(".*")), "nothing half-written is left"


def test_editing_one_notebook_keeps_the_others(course, go, tmp_path):
    "A new run with the new inputs; what has not changed is copied from the newest whole result, wherever it is."
    counter, rows = tmp_path/"counter", json.dumps(dict(id="a", notebook="demo/one", written=1, variant="v"))
    count = f"open({str(counter)!r}, 'a').write('1')\nopen('rows.jsonl', 'w').write({rows!r} + chr(10))"
    write_notebook(course, "01_demo/01_one.ipynb", count)
    write_notebook(course, "01_demo/02_two.ipynb", "2")
    first = go()
    write_notebook(course, "01_demo/02_two.ipynb", "2 + 2")
    second = go()
    assert second.folder != first.folder and [(r.status, r.kept, r.run) for r in second.results] == [("ok", True, first.name), ("ok", False, "")]
    assert counter.read_text() == "1" and second.rows == first.rows and second.rows
    assert (second.folder/"demo__one"/"notebook.html").read_bytes() == (first.folder/"demo__one"/"notebook.html").read_bytes()
    assert [r.run for r in read_run(second.folder).results] == [first.name, ""], "the report says later, too, where it comes from"
    write_notebook(course, "01_demo/03_three.ipynb", "3")
    third = go()
    assert [(r.kept, r.run) for r in third.results] == [(True, first.name), (True, second.name), (False, "")]
    alone = go("demo/one")
    assert [r.kept for r in alone.results] == [True] and counter.read_text() == "1"
    assert [r.kept for r in go("demo/one", fresh=True).results] == [False] and counter.read_text() == "11"


def test_a_kept_notebook_whose_rows_were_cut_runs_again(course, go):
    rows = [dict(id=i, notebook="demo/one", written=1, variant=i) for i in "ab"]
    write = f"import json\nopen('rows.jsonl', 'w').write(''.join(json.dumps(r) + chr(10) for r in {rows!r}))"
    write_notebook(course, "01_demo/01_one.ipynb", write)
    first = go()
    file = first.folder/"demo__one"/"rows.jsonl"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-30]), lambda: file.write_bytes(b""), file.unlink, (file.parent/"notebook.html").unlink):
        damage()
        again = go()
        assert again.folder == first.folder and [r.kept for r in again.results] == [False] and len(again.rows) == 2
        assert [r.kept for r in go().results] == [True]
    file.unlink()
    write_notebook(course, "01_demo/02_two.ipynb", "2")
    assert [r.kept for r in go().results] == [False, False], "nor is it taken from there"


def test_what_a_notebook_reaches():
    found = plans.reached("from llmlab.kit import ledger\nimport json, llmlab.nothing")
    assert {"llmlab", "llmlab.kit", "llmlab.kit.ledger", "llmlab.kit.stats", "llmlab.kit.settings"} <= set(found)
    assert not any(o.startswith(("llmlab.lab", "llmlab.selection")) for o in found)
    assert "llmlab.kit.data" in plans.reached("1", "selection.candidates"), "what its own module imports, in functions also"
    assert not plans.reached("1") and plans.reached("%magic").keys() > found.keys()


def claim(verdict):
    return dict(id=verdict, notebook="demo/one", text=f"a claim that is {verdict}, <&\"\x00", verdict=verdict, value=dict(value=1.5), at_most=1, reason="so")


def test_claims_decide(course, go):
    three = [claim(v) for v in ("held", "failed", "skipped")]
    cells = f"import json\nopen('claims.jsonl', 'w').write(''.join(json.dumps(c) + chr(10) for c in {three!r}))"
    write_notebook(course, "01_demo/01_one.ipynb", cells, "class ClaimsFailed(ValueError): pass\nraise ClaimsFailed('1 of 3')")
    done = go()
    assert done.exit_status == 1 and done.verdict == "failed" and done.counts() == dict(held=1, failed=1, missed=0, skipped=1)
    assert done.results[0].status == "claims"
    suites = xml.parse(done.folder/"junit.xml").getroot()
    cases = list(suites.iter("testcase"))
    assert sorted([e.tag for e in c] for c in cases) == [[], [], ["failure"], ["skipped"]]
    assert suites.get("tests") == "4" and suites.get("failures") == "1" and suites.get("skipped") == "1" and len(cases) == 4
    assert go().results[0].kept, "a failed claim is a result, too"


def test_errors_of_the_project_keep_their_exit_status(course, go):
    for i, name in enumerate(("Unavailable", "UsageError", "Damaged")):
        write_notebook(course, f"01_demo/0{i}_{name.lower()}.ipynb", f"from llmlab.kit.settings import {name}\nraise {name}('so')")
    assert [r.status for r in go().results] == ["unavailable", "usage", "unavailable"]
    assert [exit_status([r]) for r in ("unavailable", "usage")] == [4, 2]


def test_a_killed_kernel_is_noticed_and_resumed(course, go, tmp_path):
    flag = tmp_path/"flag"
    die = f"import os, signal, pathlib\nif not pathlib.Path({str(flag)!r}).exists(): os.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(course, "01_demo/01_one.ipynb", "'before'", die)
    write_notebook(course, "01_demo/02_two.ipynb", "1")
    started = time.monotonic()
    done = go()
    assert time.monotonic() - started < 40
    assert [r.status for r in done.results] == ["killed", "ok"] and done.exit_status == 3
    assert "signal 9" in done.results[0].error["value"] and "SIGKILL" in done.results[0].error["source"]
    nb = nbformat.read(done.folder/"demo__one"/"notebook.ipynb", 4)
    assert "before" in json.dumps(nb.cells) and any(o.output_type == "error" for c in nb.cells for o in c.get("outputs", []))
    flag.touch()
    assert [(r.status, r.kept) for r in go().results] == [("ok", False), ("ok", True)]


def test_over_budget(course, go, tmp_path):
    flag = tmp_path/"flag"
    stubborn = f"""print('so far', flush=True)
import pathlib, time
while not pathlib.Path({str(flag)!r}).exists():
    try: time.sleep(100)
    except KeyboardInterrupt: pass"""
    write_notebook(course, "01_demo/01_one.ipynb", stubborn)
    write_notebook(course, "01_demo/02_two.ipynb", "1")
    started = time.monotonic()
    done = go(budget=2 / SMOKE_BUDGET)
    r = done.results[0]
    assert r.status == "timeout" and done.exit_status == 3 and time.monotonic() - started < 30
    assert "budget of 2 s" in r.error["value"] and "--budget" in r.error["value"] and "time.sleep" in r.error["source"]
    assert "so far" in (done.folder/"demo__one"/"notebook.html").read_text()
    flag.touch()
    again = go()
    assert again.folder == done.folder and [(r.status, r.kept) for r in again.results] == [("ok", False), ("ok", True)]


def test_a_kernel_that_does_not_start_is_tried_again(course, tmp_path, monkeypatch):
    file = write_notebook(course, "01_demo/01_one.ipynb", "6 * 7")
    real, addresses = kernels._address, []
    def sometimes():
        addresses.append(real() if addresses else ("ipc", "/nowhere/at/all", None))
        return addresses[-1]
    monkeypatch.setattr(kernels, "_address", sometimes)
    done = engine.execute(file, tmp_path/"run", "demo/one", {}, 30)
    assert done["status"] == "ok" and len(addresses) == 2


def test_recipes_are_made_first_and_once(course, go, tmp_path, monkeypatch, fresh_home):
    package = tmp_path/"lib"/f"course_{uuid.uuid4().hex[:8]}"/"demo"
    package.mkdir(parents=True)
    for o in (package, package.parent): (o/"__init__.py").touch()
    made = tmp_path/"made"
    (package/"one.py").write_text(f'''
from llmlab.kit.store import recipe
@recipe(version=1)
def weights(folder, *, n):
    if n == 13: raise RuntimeError("no luck")
    (folder/"w.txt").write_text("w" * n)
    open({str(made)!r}, "a").write(f"{{n}} ")
def recipes(s): return [(weights, dict(n=1)), (weights, dict(n=s.seed))]
''')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path/"lib"))
    monkeypatch.syspath_prepend(str(tmp_path/"lib"))
    cell = "#| default_exp demo.one\n1"
    write_notebook(course, "01_demo/01_one.ipynb", cell)
    write_notebook(course, "01_demo/02_two.ipynb", cell, "# the same module")
    how = dict(package=package.parent.name)
    assert go(parameters=dict(seed="2"), **how).exit_status == 0
    assert sorted(made.read_text().split()) == ["1", "2"]
    done = go(parameters=dict(seed="13"), **how)
    assert {r.status for r in done.results} == {"error"} and "weights n=13 could not be made: no luck" in done.results[0].error["value"]


# interrupted

def heard():
    "In a child: signals do what they do in a terminal, even if these tests run in the background of a script, where SIGINT is ignored."
    for o in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(o, signal.SIG_DFL)


# In each of many forks the command runs with its signals coming at every call of the lab's functions from the n-th on, and while the interpreter closes.
STORM = """
import atexit, json, os, signal, sys
from llmlab.lab import cli, compare, engine, plan, progress, report, results, runner
forks, number = int(sys.argv[1]), signal.SIGINT
sys.argv = ["llmlab", *sys.argv[2:]]
hit = lambda: os.kill(os.getpid(), number)

class Last:
    def __del__(self, hit=hit): hit()

def counted(first):
    calls, before = [0], signal.getsignal(signal.SIGINT)
    def hook(frame, event, arg):
        if event in ("call", "return") and "/llmlab/lab/" in frame.f_code.co_filename:
            calls[0] += bool(calls[0]) or signal.getsignal(signal.SIGINT) is not before  # from when the handlers are there
            if first is not None and calls[0] >= first: hit()
    sys.setprofile(hook)
    return calls

def child(first):
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if first is None:
        calls = counted(None)
        try: cli.main()
        except SystemExit as e: ended = e.code
        sys.setprofile(None)
        with open("calls", "w") as f: f.write(f"{calls[0]} {ended}")
        os._exit(0)
    atexit.register(hit)
    sys.modules["last"] = Last()
    counted(first)
    cli.main()

child(None)
total, ended = map(int, open("calls").read().split())
found = []
for i in range(forks):
    first, number = 1 + i * (total - 1) // (forks - 1), (signal.SIGINT, signal.SIGTERM)[i % 2]
    found.append((first, child(first)))
statuses = [os.WEXITSTATUS(o) if os.WIFEXITED(o) else -os.WTERMSIG(o) for _, o in found]
print(json.dumps(dict(total=total, ended=ended, statuses=statuses, late=child(10 * total))))
"""


def test_a_signal_at_any_moment_ends_in_130(course, tmp_path):
    "Every stage of a run whose notebooks are kept, from the first lines of `main` to the closing of the interpreter."
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    assert subprocess.run(command(course, tmp_path/"runs"), capture_output=True).returncode == 0
    arguments = command(course, tmp_path/"runs")[3:]
    done = subprocess.run([sys.executable, "-c", STORM, "16", *arguments], capture_output=True, text=True, cwd=tmp_path, preexec_fn=heard)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] > 500 and found["ended"] == found["late"] == 0
    # 0 where it came after the last step, or where Python itself swallowed the exception (in a generator that is being closed) and the run was done
    assert set(found["statuses"]) <= {0, 130} and found["statuses"].count(0) <= 4 and 0 not in found["statuses"][:8], found
    assert not list((tmp_path/"runs").rglob(".aside*"))
    again = subprocess.run(command(course, tmp_path/"runs"), capture_output=True, text=True)
    assert again.returncode == 0 and "1 kept" in again.stdout and len(list((tmp_path/"runs").iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_kernel_and_the_run_goes_on_later(course, tmp_path, number):
    flag, begun, mark = tmp_path/"flag", tmp_path/"begun", uuid.uuid4().hex
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    write_notebook(course, "01_demo/02_two.ipynb", f"""import pathlib, subprocess, time
if not pathlib.Path({str(flag)!r}).exists():
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    pathlib.Path({str(begun)!r}).touch(); time.sleep(600)""")
    process = subprocess.Popen(command(course, tmp_path/"runs"), env={**os.environ, "LLMLAB_TEST": mark}, stdout=subprocess.PIPE, text=True,
        preexec_fn=heard)
    wait_for(begun.exists)
    assert len(family(mark)) >= 4
    while process.poll() is None:  # an impatient reader: every millisecond, to the very end
        process.send_signal(number)
        time.sleep(.001)
    said = process.communicate(timeout=40)[0]
    assert process.returncode == 130 and "no kernel is left" in said
    assert not family(mark)
    done = read_run(find_run("latest", tmp_path/"runs"))
    assert not list(done.folder.rglob(".*")), "nothing half-written is left"
    assert done.verdict == "interrupted" and json.loads((done.folder/"verdict.json").read_text())["exit_status"] == 130
    flag.touch()
    again = subprocess.run(command(course, tmp_path/"runs"), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "1 kept" in again.stdout


def test_a_signal_while_artefacts_are_made(course, tmp_path, monkeypatch, fresh_home):
    "Nothing is left running, the half-made artefact is not taken for a whole one, and the same command makes it."
    package, mark = tmp_path/"lib"/f"course_{uuid.uuid4().hex[:8]}"/"demo", uuid.uuid4().hex
    package.mkdir(parents=True)
    for o in (package, package.parent): (o/"__init__.py").touch()
    flag, begun, made = tmp_path/"flag", tmp_path/"begun", tmp_path/"made"
    (package/"one.py").write_text(f'''
import pathlib, subprocess, time
from llmlab.kit.store import recipe
@recipe(version=1)
def weights(folder, *, n):
    (folder/"half.txt").write_text("half")
    if not pathlib.Path({str(flag)!r}).exists():
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        pathlib.Path({str(begun)!r}).touch(); time.sleep(600)
    (folder/"w.txt").write_text("w")
    open({str(made)!r}, "a").write(f"{{n}} ")
def recipes(s): return [(weights, dict(n=1))]
''')
    write_notebook(course, "01_demo/01_one.ipynb", "#| default_exp demo.one\n1")
    code = ("import sys; from pathlib import Path; from llmlab.lab import runner\n"
        f"done = runner.run((), 'smoke', folder=Path({str(course)!r}), out=Path({str(tmp_path/'runs')!r}), package={package.parent.name!r})\n"
        "sys.exit(done.exit_status)")
    how = dict(env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path/"lib"), *sys.path]), "LLMLAB_TEST": mark}, text=True)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, preexec_fn=heard, **how)
    wait_for(begun.exists)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(.01)
    process.communicate(timeout=40)
    assert process.returncode == 130 and not family(mark) and not made.exists()
    from llmlab.kit.store import artefacts
    assert not artefacts() and read_run(find_run("latest", tmp_path/"runs")).verdict == "interrupted"
    flag.touch()
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, **how)
    assert again.returncode == 0 and made.read_text() == "1 " and len(artefacts()) == 1, again.stdout + again.stderr
    assert not list((fresh_home/"store"/".aside").glob("*")) and len(list((tmp_path/"runs").iterdir())) == 1


def test_a_killed_command_takes_its_kernels_along(course, tmp_path):
    flag, begun, mark = tmp_path/"flag", tmp_path/"begun", uuid.uuid4().hex
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    write_notebook(course, "01_demo/02_two.ipynb", f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\n"
        f"if not pathlib.Path({str(flag)!r}).exists(): time.sleep(600)")
    process = subprocess.Popen(command(course, tmp_path/"runs"), env={**os.environ, "LLMLAB_TEST": mark}, stdout=subprocess.DEVNULL)
    wait_for(begun.exists)
    process.kill(); process.wait()
    wait_for(lambda: not family(mark), 20)
    flag.touch()
    again = subprocess.run(command(course, tmp_path/"runs"), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "1 kept" in again.stdout and len(list((tmp_path/"runs").iterdir())) == 1


def test_a_worker_that_is_killed_costs_one_notebook(course, go, tmp_path):
    flag = tmp_path/"flag"
    write_notebook(course, "01_demo/01_one.ipynb", "import os, pathlib, signal, time\n"
        f"if not pathlib.Path({str(flag)!r}).exists(): os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)")
    write_notebook(course, "01_demo/02_two.ipynb", "1")
    done = go()
    assert [r.status for r in done.results] == ["killed", "ok"] and "process that executes it ended" in done.results[0].error["value"]
    flag.touch()
    assert [(r.status, r.kept) for r in go().results] == [("ok", False), ("ok", True)]


# several at once

def test_two_runs_at_once(course, tmp_path):
    write_notebook(course, "01_demo/01_one.ipynb", "import time; time.sleep(1)")
    both = [subprocess.Popen(command(course, tmp_path/"runs"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=90)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert len(list((tmp_path/"runs").glob("*/verdict.json"))) == 2


def test_how_many_side_by_side(course):
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    jobs = lambda profile, jobs=None: plans.plan((), profile, folder=course, jobs=jobs).jobs
    assert jobs("smoke") == min(2, os.cpu_count()) and jobs("tiny") == jobs("thorough") == 1 and jobs("tiny", 3) == 3 and jobs("smoke", 1) == 1


def test_side_by_side(course, go):
    for i in range(4): write_notebook(course, f"01_demo/0{i}_part{i}.ipynb", f"import os\nos.environ['OMP_NUM_THREADS'], {i}")
    done = go(jobs=2)
    assert done.exit_status == 0
    for i in range(4): assert f", {i})" in (done.folder/f"demo__part{i}"/"notebook.html").read_text().replace("&#39;", "'")


# a file system that refuses

def test_nothing_half_written_on_a_full_disk(tmp_path, monkeypatch):
    plans.write_whole(tmp_path/"x.json", "old")
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(plans.os, "replace", full)
    with pytest.raises(Unavailable, match="disk is full.*MB are free"): plans.write_whole(tmp_path/"x.json", "new")
    assert os.listdir(tmp_path) == ["x.json"] and (tmp_path/"x.json").read_text() == "old"


def test_a_disk_that_is_full_in_the_middle(course, tmp_path):
    "A limit on the size of files stands for the full disk: everything larger than 40 kB is refused by the system."
    write_notebook(course, "01_demo/01_one.ipynb", "'x' * 100_000")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    done = subprocess.run(command(course, tmp_path/"runs"), capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.returncode == 4, done.stdout + done.stderr
    folder = find_run("latest", tmp_path/"runs")
    assert read_run(folder).results[0].status == "unavailable" and not list(folder.rglob(".aside*"))
    again = subprocess.run(command(course, tmp_path/"runs"), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0


@pytest.mark.parametrize("code, said", [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")])
def test_a_folder_that_cannot_be_written(course, tmp_path, monkeypatch, code, said):
    write_notebook(course, "01_demo/01_one.ipynb", "1")
    real = Path.mkdir
    def refuse(self, *args, **kw):
        if "runs" in self.parts: raise OSError(code, os.strerror(code))
        return real(self, *args, **kw)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(Unavailable, match=f"{said}.*--out FOLDER"): runner.run((), "smoke", folder=course, out=tmp_path/"runs")


def test_a_checkout_on_a_read_only_file_system(top, course, tmp_path):
    "For real, where this user may mount: refused with the remedy, and with the remedy it works."
    import shutil
    here = tmp_path/"checkout"
    for o in ("llmlab", "nbs"): shutil.copytree(top/o, here/o, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for o in ("pyproject.toml", "settings.ini"): shutil.copy(top/o, here/o)
    write_notebook(course, "01_demo/01_one.ipynb", "from llmlab.kit import ledger, settings",
        "book = ledger.start('demo/one', settings.settings(profile, out_dir=out_dir))")
    if not shutil.which("unshare"): pytest.skip("needs `unshare` for a file system of its own")
    run = " ".join(["run", "--profile", "smoke", "--notebooks", str(course)])
    code = f"{sys.executable} -P -c 'from llmlab.lab.cli import main; main()' {run}"
    inside = f"""mount --bind {here} {here} && mount -o remount,ro,bind {here} || exit 77
{code}; echo status $?; {code} --out {tmp_path}/runs; echo status $?; LLMLAB_HOME={tmp_path}/home {code} --out {tmp_path}/runs; echo status $?"""
    env = {k: v for k, v in os.environ.items() if k != "LLMLAB_HOME" and not k.startswith(("HF_", "JUPYTER", "IPYTHON", "MPLC"))}
    done = subprocess.run(["unshare", "-m", "sh", "-c", inside], env=env | {"PYTHONPATH": str(here)}, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 77 or "not permitted" in done.stderr: pytest.skip("needs the right to mount")
    first, second, third, _ = (done.stdout + "\n").split("status ", 3)
    assert "_runs cannot be written (Read-only file system). Choose another folder: `--out FOLDER`" in done.stderr, done.stderr
    assert second.startswith("4") and ".llmlab cannot be written (Read-only file system)" in second and "LLMLAB_HOME" in second, second
    assert third.startswith("4") and done.stdout.endswith("status 0\n"), done.stdout


def test_signals_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with runner.interruptible():
        assert (ours := signal.getsignal(signal.SIGTERM)) is not before
        with runner.interruptible(): pass
        assert signal.getsignal(signal.SIGTERM) is ours, "a block in another adds nothing"
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), runner.interruptible():
        try: signal.raise_signal(signal.SIGTERM)
        finally:
            with runner.interruptible(): signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before and not runner.asked()
    inside = []
    thread = threading.Thread(target=lambda: [inside.append(1) for _ in [0] if runner.interruptible().__enter__() is None])
    thread.start(); thread.join()
    assert inside


def test_what_is_ignored_stays_ignored():
    "As under nohup, or in the background of a script."
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runner.interruptible():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)


def test_an_exception_that_a_library_swallows_is_raised_again():
    with runner.interruptible():
        try: signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt: pass
        with pytest.raises(KeyboardInterrupt): runner.work([dict(id=1, mark="nobody")], lambda events, i: FakeWorker(), 1, lambda job, event: None)


class FakeWorker:
    "A worker that never answers."
    job = None
    def give(self, job): self.job, self.started = job, time.monotonic()
    def close(self): pass


def test_merging_does_not_depend_on_the_order():
    rows = [dict(id=i % 3, notebook="n", written=w, x=x) for i, (w, x) in enumerate([(1, "a"), (2, "b"), (3, "c"), (4, "d"), (2, "e"), (3, "c")])]
    assert merged(rows) == merged(rows[::-1]) == merged(rows + rows) and len(merged(rows)) == 3


def test_a_run_with_damaged_files(tmp_path):
    with pytest.raises(UsageError, match="holds no run"): read_run(tmp_path)
    with pytest.raises(UsageError, match="no run yet"): find_run("latest", tmp_path)
    run = tmp_path/"20260101-000000-tiny"
    plans.write_json(run/"run.json", dict(profile="tiny", notebooks=[dict(notebook="a/b", inputs="1", budget_s=1)]))
    (run/"a__b").mkdir()
    (run/"a__b"/"result.json").write_text("{")
    (run/"a__b"/"rows.jsonl").write_text('{"id": "x", "notebook": "a/b"}\n{"id": ')
    got = read_run(run)
    assert got.results[0].status == "waiting" and len(got.rows) == 1 and got.exit_status == 130
    with pytest.raises(UsageError, match="unknown run"): find_run("nosuch", tmp_path)
    assert find_run("tiny", tmp_path) == find_run("20260101", tmp_path) == run
