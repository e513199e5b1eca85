"""Every notebook runs from top to bottom under the smoke profile, in a kernel and a folder of its own."""
import json
import re
from pathlib import Path

import pytest

from conftest import TOP, notebooks
from llmlab.kit.settings import budget_s
from llmlab.lab import engine

pytestmark = pytest.mark.notebooks
PATIENCE = 4  # times the budget, until a notebook counts as hung: how fast it is on a busy machine decides no test


def parameters(nb):
    "The names that a notebook's parameter cell sets."
    cells = ["".join(c["source"]) for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    return set(re.findall(r"(?m)^(\w+)\s*=", "\n".join(cells)))


@pytest.mark.parametrize("path", notebooks())
def test_notebook(path, tmp_path):
    nb = json.loads((TOP/path).read_text("utf-8"))
    name = "/".join(re.sub(r"^\d+_", "", o) for o in Path(path).with_suffix("").parts[1:])
    names = parameters(nb)
    injected = dict(profile="smoke") if "profile" in names else {}
    result = engine.execute(TOP/path, tmp_path/"run", name, injected, PATIENCE*budget_s(name, "smoke"), takes_out_dir="out_dir" in names, threads=1)
    assert result["status"] == "ok", "\n".join(str(v) for v in (result["error"] or result).values())
    done = json.loads((tmp_path/"run"/"notebook.ipynb").read_text("utf-8"))
    code = [c for c in done["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert all(o["output_type"] != "error" for c in code for o in c["outputs"])
    said = "".join("".join(o["text"]) for c in code for o in c["outputs"] if o.get("name") == "stderr")
    assert not re.findall(r"(?<!Future)(?<!Deprecation)Warning: .*", said), "a warning that a reader would see, other than of one library to another"
    for jsonl in (tmp_path/"run").rglob("*.jsonl"):
        lines = [json.loads(o, parse_constant=lambda x: pytest.fail(f"{jsonl.name} holds {x}")) for o in jsonl.read_text("utf-8").splitlines()]
        assert all(o.get("verdict") != "failed" for o in lines), [o for o in lines if o.get("verdict") == "failed"]


def test_running_notebooks_leaves_their_folders_alone():
    "Holds after the tests above, if they ran; they work in folders of their own."
    left = [f for f in (TOP/"nbs").rglob("*") if f.is_file() and f.suffix not in (".ipynb", ".png") and ".ipynb_checkpoints" not in f.parts]
    assert not left
