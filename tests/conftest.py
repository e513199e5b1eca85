"""What the tests share."""
import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_configure(config):
    "Quiet, single-threaded libraries; files of other tools stay in the store, as under `make`."
    from llmlab.kit.settings import contained, home
    for k, v in {**contained(), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}.items(): os.environ.setdefault(k, v)
    (home()/"config").mkdir(parents=True, exist_ok=True)


@pytest.fixture
def fresh_home(tmp_path, monkeypatch):
    "An empty store for this test; returns its folder."
    home = tmp_path/"llmlab-home"
    monkeypatch.setenv("LLMLAB_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def top():
    "The checkout's folder."
    return TOP


@pytest.fixture(scope="session")
def chromium():
    "The path of a chromium or chrome; skips the test where there is none."
    found = next((p for o in CHROMIUMS if (p := shutil.which(o))), None)
    return found or pytest.skip(f"no browser here: none of {', '.join(CHROMIUMS)} on PATH (on Debian: apt install chromium)")


def notebooks():
    "Every notebook, as paths relative to the checkout."
    return sorted(str(f.relative_to(TOP)) for f in (TOP/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)


def launch(playwright, executable):
    "A headless browser that asks for nothing outside this machine and writes nothing into the home folder."
    home = tempfile.mkdtemp(prefix="llmlab-browser-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")} | dict(HOME=home)
    quiet = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
    return playwright.chromium.launch(executable_path=executable, env=env, args=[f"--{o}" for o in quiet])
