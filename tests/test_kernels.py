"""Kernels that begin as copies of the fork server: they are what a kernel of its own is, and end as one does."""
import json
import os
import signal
import subprocess
import uuid
from multiprocessing import forkserver

import nbformat
import psutil
import pytest
from test_runner import command, family, heard, wait_for, write_notebook

from llmlab.lab import engine, kernels
from llmlab.lab.results import find_run, read_run

pytestmark = pytest.mark.skipif(not kernels.can_fork(), reason="kernels are forked on Linux alone")


@pytest.fixture(scope="module", autouse=True)
def no_server_yet():
    "Another test of this process may have begun a fork server, which has nothing imported."
    forkserver._forkserver._stop()


@pytest.fixture
def execute(tmp_path, monkeypatch):
    "Execute cells in a forked kernel; gives the result and the outputs of the code cells as text."
    def go(*cells, budget_s=30, name="one"):
        monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)  # with it ipykernel does not look at what is written below Python
        file = write_notebook(tmp_path/"nbs", f"01_demo/01_{name}.ipynb", *cells, parameters=None)
        done = engine.execute(file, tmp_path/"run"/name, f"demo/{name}", {}, budget_s, fork=True, mark=f"test-{uuid.uuid4().hex}")
        nb = nbformat.read(tmp_path/"run"/name/"notebook.ipynb", 4)
        return done, [json.dumps(c.outputs) for c in nb.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    return go


def test_a_copy_has_the_libraries_its_folder_and_its_environment(execute, tmp_path):
    done, out = execute("import sys; print('torch' in sys.modules, 'transformers' in sys.modules)", "import os; print(os.getcwd())",
        "print(os.environ['LLMLAB_JOB'], 'fork' in open(f'/proc/{os.getppid()}/cmdline').read())", "os.write(1, b'written below Python'); 0",
        "import subprocess; subprocess.run(['sh', '-c', 'echo $LLMLAB_JOB']); 0", "import numpy; (numpy.ones((300, 300)) @ numpy.ones((300, 300))).sum()",
        "import torch; (torch.ones(300, 300) @ torch.ones(300, 300)).sum().item()", "print(sys.argv, __name__, '' in sys.path)")
    assert done["status"] == "ok"
    assert "True True" in out[0] and "run/one" in out[1].replace(".", "run/one") and "test-" in out[2] and "True" in out[2]
    assert "written below Python" in out[3] and "test-" in out[4] and "27000000.0" in out[5] and "27000000.0" in out[6]
    assert "ipykernel_launcher" in out[7] and "__main__ True" in out[7]


def test_copies_share_no_state(execute):
    draw = "import numpy, random, uuid; print(numpy.random.rand(), random.random(), uuid.uuid4())"
    (_, (first, _)), (_, (second, _)) = (execute(draw, "import sys; sys.modules['left'] = 1", name=o) for o in ("one", "two"))
    assert first != second
    assert "False" in execute("import sys; print('left' in sys.modules)", name="three")[1][0]


def test_pictures_are_shown_and_what_is_due_at_the_end_is_done(execute, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    last = tmp_path/"last"
    done, out = execute("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()",
        f"import atexit, pathlib; atexit.register(pathlib.Path({str(last)!r}).touch)")
    assert done["status"] == "ok" and "image/png" in out[0] and last.exists()


@pytest.mark.parametrize("how, says", [("os.kill(os.getpid(), 9)", "signal 9"), ("os._exit(3)", "status 3"),
    ("import ctypes; ctypes.string_at(0)", "segmentation fault")])
def test_how_it_died_is_said(execute, how, says):
    done, _ = execute("'before'", f"import os\n{how}")
    assert done["status"] == "killed" and says in done["error"]["value"] and done["error"]["cell"] == 3  # after the injected parameters


def test_one_that_ignores_interrupts_ends_at_its_budget(execute):
    done, _ = execute("import time\nwhile True:\n    try: time.sleep(9)\n    except KeyboardInterrupt: pass", budget_s=2)
    assert done["status"] == "timeout" and done["seconds"] < 20
    assert not [p for p in psutil.Process().children(recursive=True) if p.pid == os.getpgid(p.pid) and p.ppid() != os.getpid()], "no kernel is left"


def test_a_fork_server_that_died_is_begun_again(execute):
    assert execute("1")[0]["status"] == "ok"
    servers = [p for p in psutil.Process().children() if "multiprocessing.forkserver" in " ".join(p.cmdline())]
    assert len(servers) == 1
    servers[0].kill()
    assert execute("6 * 7", name="two")[0]["status"] == "ok", "begun again, or done without"
    wait_for(kernels.preload)
    assert "True" in execute("import sys; print('torch' in sys.modules)", name="three")[1][0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_of_several_that_is_ended_leaves_no_process(tmp_path, number):
    flag, begun, mark, course = tmp_path/"flag", tmp_path/"begun", uuid.uuid4().hex, tmp_path/"nbs"
    for i in range(3):
        write_notebook(course, f"01_demo/0{i}_{'abc'[i]}.ipynb", "#| default_exp demo.one\nimport os, pathlib, subprocess, time",
            *([f"if not pathlib.Path({str(flag)!r}).exists():\n    subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
            f"    pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"] if i else []), "'fork' in open(f'/proc/{os.getppid()}/cmdline').read()")
    process = subprocess.Popen(command(course, tmp_path/"runs"), env={**os.environ, "LLMLAB_TEST": mark}, stdout=subprocess.DEVNULL, preexec_fn=heard)
    wait_for(begun.exists)
    process.send_signal(number)
    process.wait(40)
    wait_for(lambda: not family(mark) if number == signal.SIGINT else len(family(mark)) <= 1, 20)  # a killed command cannot look for what left the family
    for p in family(mark): p.kill()
    flag.touch()
    assert subprocess.run(command(course, tmp_path/"runs"), capture_output=True, timeout=90).returncode == 0
    done = read_run(find_run("latest", tmp_path/"runs"))
    assert [r.status for r in done.results] == ["ok"] * 3
    assert "True" in json.dumps(nbformat.read(done.folder/"demo__a"/"notebook.ipynb", 4).cells[-1].outputs)


def test_a_worker_that_is_killed_takes_its_fork_server_along(tmp_path):
    course, mark, flag = tmp_path/"nbs", uuid.uuid4().hex, tmp_path/"flag"
    for i in range(3):
        write_notebook(course, f"01_demo/0{i}_{'abc'[i]}.ipynb", "#| default_exp demo.one\n1", *([] if i else [f"""import os, pathlib, psutil, time
if not pathlib.Path({str(flag)!r}).exists(): psutil.Process(os.getppid()).parent().kill(); time.sleep(60)"""]))
    done = subprocess.run(command(course, tmp_path/"runs"), env={**os.environ, "LLMLAB_TEST": mark}, capture_output=True, timeout=120)
    assert done.returncode == 3 and not family(mark)
    assert [r.status for r in read_run(find_run("latest", tmp_path/"runs")).results] == ["killed", "ok", "ok"]
