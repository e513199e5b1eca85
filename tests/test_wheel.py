"""The built package: complete, self-contained, usable without a checkout."""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from conftest import TOP

SETTINGS = (TOP/"settings.ini").read_bytes()


def call(*command, **kwargs):
    "A command's standard output; fails with its errors."
    done = subprocess.run([str(o) for o in command], capture_output=True, text=True, timeout=300, **kwargs)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "A folder with the wheel and the sdist, built by the environment's setuptools from a copy of the checkout."
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")/"llmlab"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "settings.ini"): shutil.copy(TOP/name, source)
    shutil.copytree(TOP/"llmlab", source/"llmlab", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r}); b.build_wheel({str(folder)!r})"
    call(sys.executable, "-c", code, cwd=source)
    return folder


@pytest.fixture(scope="module")
def names(dist):
    "The files of the wheel."
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as z: return set(z.namelist())


def test_every_module_is_in_the_wheel(names):
    want = {str(f.relative_to(TOP)) for f in (TOP/"llmlab").rglob("*") if f.is_file() and "__pycache__" not in f.parts and f.name != "_modidx.py"}
    assert want <= names
    assert not [n for n in names if n.split("/")[0] in ("nbs", "tests", "tools", "locks", "_py")]


def test_the_settings_link_is_a_file_in_wheel_and_sdist(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as z:
        assert z.read("llmlab/assets/settings.ini") == SETTINGS
        assert z.getinfo("llmlab/assets/settings.ini").external_attr >> 28 != 0o12, "a symbolic link"
    with tarfile.open(next(dist.glob("*.tar.gz"))) as t:
        (member,) = [m for m in t.getmembers() if m.name.endswith("/assets/settings.ini")]
        assert member.isfile() and t.extractfile(member).read() == SETTINGS


def test_the_wheel_says_what_it_is(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as z: meta = z.read(next(n for n in z.namelist() if n.endswith("/METADATA"))).decode()
    assert "Name: llmlab\n" in meta and "License-Expression: Apache-2.0" in meta and "# llmlab" in meta and "Requires-Dist: torch<2.14,>=2.13" in meta


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    "The wheel in a folder of its own, and an environment that sees it before anything else."
    target, empty = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("home")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", target]
    call(sys.executable, "-m", "pip", "install", *options, next(dist.glob("*.whl")))
    env = {k: v for k, v in os.environ.items() if k not in ("LLMLAB_HOME", "PYTHONPATH", "XDG_DATA_HOME")}
    return target, dict(env, PYTHONPATH=str(target), HOME=str(empty))


def test_it_works_without_a_checkout(installed, tmp_path):
    target, env = installed
    code = """
import json, llmlab
from llmlab.kit.settings import checkout, home, settings
print(json.dumps([llmlab.__file__, str(checkout()), str(home()), settings("tiny", resolve=False).profile]))"""
    out = call(sys.executable, "-c", code, env=env, cwd=tmp_path)
    assert str(target) in out and '"None"' in out and '"tiny"' in out and str(TOP) not in out


@pytest.mark.skipif(not (TOP/"llmlab/lab/cli.py").exists(), reason="no command line yet")
def test_the_command_works_without_a_checkout(installed, tmp_path):
    target, env = installed
    assert "run" in call(sys.executable, target/"bin"/"llmlab", "--help", env=env, cwd=tmp_path)
    assert not list(tmp_path.iterdir()) and not list((tmp_path.parent).glob(".llmlab"))
