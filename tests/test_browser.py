"""A learner's first minutes, in a real browser: JupyterLab opens a notebook, Run All succeeds without an edit, and it is saved clean."""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from conftest import TOP, launch, notebooks

sys.path.insert(0, str(TOP/"tools"))

pytestmark = pytest.mark.browser
NOTEBOOKS = ["nbs/index.ipynb", "nbs/kit/00_settings.ipynb", "nbs/01_selection/09_exercises.ipynb"]
if os.environ.get("LLMLAB_BROWSER") == "all": NOTEBOOKS = notebooks()  # takes as long as the tiny profile

RUN_ALL = """async path => {
    const app = window.jupyterapp;
    await app.restored;
    const widget = await app.commands.execute('docmanager:open', {path: path, factory: 'Notebook'});
    await widget.context.ready;
    await widget.sessionContext.ready;
    const kernel = widget.sessionContext.session.kernel;
    await kernel.info;
    app.shell.activateById(widget.id);
    await app.commands.execute('notebook:run-all-cells');
    const cells = widget.content.model.cells, outputs = [];
    for (let i = 0; i < cells.length; i++) {
        const c = cells.get(i);
        if (c.type === 'code') outputs.push({id: c.id, count: c.executionCount, source: c.sharedModel.getSource(), outputs: c.outputs.toJSON()});
    }
    await widget.context.save();
    const after = {outputs: outputs, dirty: widget.context.model.dirty};
    await widget.sessionContext.shutdown();
    return after;
}"""


def free_port():
    "A port that nothing listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, chromium):
    "JupyterLab on a copy of the checkout, started with the environment's hook; its folder and address."
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    for name in ("nbs", "llmlab"): shutil.copytree(TOP/name, folder/name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(TOP/name, folder)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))}
    (folder/"config").mkdir()
    (folder/"home").mkdir()
    shutil.copy(TOP/"tools/jupyter_server_config.py", folder/"config")
    env |= dict(PYTHONPATH=str(folder), LLMLAB_HOME=str(TOP/".llmlab"), JUPYTER_CONFIG_DIR=str(folder/"config"), HOME=str(folder/"home"),
        **{k: str(folder/"config"/k.lower()) for k in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")})
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               "--allow-root", "--ServerApp.ip=127.0.0.1", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = (folder/"jupyter.log").open("w")
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).read(); break
            except OSError:
                assert server.poll() is None, (folder/"jupyter.log").read_text()
                time.sleep(.1)
        else: pytest.fail("JupyterLab did not start:\n" + (folder/"jupyter.log").read_text())
        yield folder, f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
        log.close()


@pytest.fixture(scope="module")
def page(lab, chromium):
    "A page with JupyterLab open on it."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = launch(p, chromium)
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(300_000)
        page.goto(f"{lab[1]}/lab?reset")
        page.wait_for_function("window.jupyterapp !== undefined")
        yield page
        browser.close()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_run_all_without_an_edit_and_saved_clean(notebook, lab, page):
    folder, _ = lab
    if not (folder/notebook).exists(): pytest.skip(f"no {notebook} yet")
    before = (folder/notebook).read_bytes()
    done = page.evaluate(RUN_ALL, notebook)
    errors = [o for c in done["outputs"] for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, errors
    assert all(c["count"] for c in done["outputs"] if c["source"].strip() and not re.fullmatch(r"(\s*#.*\n?)*", c["source"])), "a cell was not run"
    assert any(c["outputs"] for c in done["outputs"]), "something was shown"
    assert not done["dirty"]
    assert (folder/notebook).read_bytes() == before, "saved clean, that is as it was"


def test_the_hook_leaves_other_notebooks_alone(tmp_path):
    import jupyter_server_config as hook
    cell = dict(cell_type="code", id="a", execution_count=1, metadata={"x": 1}, outputs=[1], source=[])
    model = dict(type="notebook", content=dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell]))
    hook.save_clean(model=model, path=str(tmp_path/"mine.ipynb"))
    assert cell["outputs"] == [1]
    hook.save_clean(model=model, path=str(TOP/"nbs"/"new.ipynb"))
    assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
