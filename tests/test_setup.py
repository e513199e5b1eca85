"""Setting up: the Python that is taken, what `make` would do, what CI runs."""
import os
import re
import shutil
import subprocess

import pytest

from conftest import TOP

PYTHON = """#!/bin/sh
case "$1$2" in
  -V) echo Python {version};;
  *version_info*) [ {version} = 3.11.9 ];;
  *ensurepip*) {venv};;
esac
"""


def fake(folder, name, version, venv="true"):
    "An executable that answers like a Python of that version."
    (folder/name).write_text(PYTHON.format(version=version, venv=venv))
    (folder/name).chmod(0o755)


def choose(folder, asked=""):
    "What tools/python.sh says when only this folder's Pythons are there."
    sh = shutil.which("sh")
    (folder/"sed").exists() or (folder/"sed").symlink_to(shutil.which("sed"))
    (folder/"cat").exists() or (folder/"cat").symlink_to(shutil.which("cat"))
    return subprocess.run([sh, str(TOP/"tools/python.sh"), asked], env=dict(PATH=str(folder)), capture_output=True, text=True)


def test_the_first_fitting_python_is_taken(tmp_path):
    fake(tmp_path, "python3", "3.13.1")
    fake(tmp_path, "python", "3.11.9")
    assert choose(tmp_path).stdout.strip() == "python"
    fake(tmp_path, "python3.11", "3.11.9")
    assert choose(tmp_path).stdout.strip() == "python3.11"


def test_another_python_is_refused_with_the_remedy(tmp_path):
    fake(tmp_path, "python3", "3.13.1")
    for asked in ("", "python3"):
        done = choose(tmp_path, asked)
        assert done.returncode == 1 and not done.stdout
        for text in ("Python 3.11", "found Python 3.13.1", "make PYTHON=", "apt install"): assert text in done.stderr


def test_a_python_without_venv_is_named(tmp_path):
    fake(tmp_path, "python3.11", "3.11.9", venv="false")
    done = choose(tmp_path)
    assert done.returncode == 1 and "python3.11-venv" in done.stderr


@pytest.fixture
def bare(tmp_path):
    "A folder with what `make` needs to plan, and nothing installed."
    shutil.copytree(TOP/"locks", tmp_path/"locks")
    shutil.copytree(TOP/"tools", tmp_path/"tools")
    for name in ("Makefile", "pyproject.toml"): shutil.copy(TOP/name, tmp_path)
    return tmp_path


def make(folder, *args):
    "The plan of a target."
    if not shutil.which("make"): pytest.skip("no make here")
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "TORCH")}
    done = subprocess.run(["make", "-n", *args], cwd=folder, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("args,file", [(["install"], "cpu"), (["install", "TORCH=cuda"], "cuda")])
def test_install_is_by_hash_and_takes_one_torch(args, file, bare):
    plan = make(bare, *args)
    assert set(re.findall(r"locks/torch-(\w+)\.txt", plan)) == {file}
    for line in plan.splitlines():
        if "pip install" in line: assert "--no-deps" in line and ("--require-hashes" in line or line.endswith("-e ."))


def test_what_is_installed_stays(bare):
    for f in (bare/".venv/bin/python", bare/".venv/.torch-cuda", bare/".venv/.installed-cuda"):
        f.parent.mkdir(parents=True, exist_ok=True)
        f.touch()
    assert "pip install" not in make(bare, "install"), "a CUDA build is not replaced by the default"
    assert "torch-cpu.txt" in make(bare, "install", "TORCH=cpu")


def test_help_names_every_target(bare):
    done = subprocess.run(["make", "help"], cwd=bare, capture_output=True, text=True)
    for target in ("install", "lab", "test", "check", "bench", "gpu", "jupyter", "locks", "clean"): assert f"make {target}" in done.stdout


def test_ci_runs_the_readmes_command():
    lines = (TOP/".ci/run").read_text("utf-8").splitlines()
    (extract,) = [o for o in lines if o.startswith("test=$(")]
    done = subprocess.run(["bash", "-c", f"{extract}\necho \"$test\""], cwd=TOP, capture_output=True, text=True)
    assert done.stdout.strip() == "make test"
    assert "make test" in re.search(r"<!-- test -->(.*?)<!-- /test -->", (TOP/"README.md").read_text("utf-8"), re.S)[1]
