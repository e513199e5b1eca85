"""Who may import whom, and what must stay light."""
import ast
import json
import subprocess
import sys

import pytest

from conftest import TOP

KIT = {0: ["settings", "stats", "pictures", "store"],
       1: ["corpora", "data", "geometry", "models", "metrics", "footprint", "machine", "measure", "claims", "ledger"],
       2: ["training", "generation", "server", "serving", "yardsticks", "compression", "teaching", "additions"]}
CHAPTERS = ["foundations", "selection", "finetuning", "quantization", "pruning", "distillation", "batching", "parallelism"]
HEAVY = ["torch", "transformers", "datasets", "pandas", "matplotlib", "scipy", "sklearn", "statsmodels", "IPython", "jupyterlab"]


def rank(module):
    "Layer of `kit.models`, `selection.candidates` …, and its order among siblings."
    first, _, rest = module.partition(".")
    if first == "kit":
        name = rest.split(".")[0]
        for layer, names in KIT.items():
            if name in names: return layer, names.index(name)
    if first in CHAPTERS: return 3, 0
    if first == "deployment": return 4, 0
    if first == "lab": return 5, 0
    raise AssertionError(f"llmlab.{module} is not in the table of layers")


def modules():
    "Every module with its file, without `llmlab.`."
    for f in sorted((TOP/"llmlab").rglob("*.py")):
        if f.name in ("__init__.py", "_modidx.py"): continue
        yield ".".join(f.relative_to(TOP/"llmlab").with_suffix("").parts), f


def imported(module, tree):
    "The modules of llmlab that a syntax tree imports, anywhere in it, as `kit.models`."
    known = {m for m, _ in modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names if a.name.split(".")[0] == "llmlab"]
        elif isinstance(node, ast.ImportFrom):
            package = ["llmlab", *module.split(".")][:-node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            if base.split(".")[0] != "llmlab": continue
            names = [f"{base}.{a.name}" for a in node.names] + [base]
        else: continue
        for n in names:
            if (n := n.removeprefix("llmlab.")) in known: yield n


def violations(module, tree):
    "Sentences on imports that the table forbids."
    layer, order = rank(module)
    for other in sorted(set(imported(module, tree)) - {module}):
        other_layer, other_order = rank(other)
        if other_layer > layer: yield f"llmlab.{module} imports llmlab.{other} of a higher layer"
        elif layer == other_layer and layer < 3 and other_order > order: yield f"llmlab.{module} imports its later sibling llmlab.{other}"
        elif layer == other_layer == 3 and module.split(".")[0] != other.split(".")[0]: yield f"llmlab.{module} imports another chapter, llmlab.{other}"


@pytest.mark.parametrize("module,file", list(modules()), ids=[m for m, _ in modules()])
def test_imports_hold_the_table(module, file):
    assert not list(violations(module, ast.parse(file.read_text("utf-8"))))


@pytest.mark.parametrize("module,code,what", [
    ("kit.settings", "from .ledger import start", "higher layer"),
    ("kit.stats", "def f():\n    from llmlab.kit import store", "later sibling"),
    ("kit.models", "import llmlab.lab.runner", "higher layer"),
    ("pruning.masks", "from ..selection.candidates import f", "another chapter"),
])
def test_a_forbidden_import_is_seen(module, code, what, monkeypatch):
    names = ["kit.settings", "kit.stats", "kit.store", "kit.ledger", "kit.models", "lab.runner", "selection.candidates"]
    monkeypatch.setattr(sys.modules[__name__], "modules", lambda: [(n, None) for n in names])
    (found,) = violations(module, ast.parse(code))
    assert what in found


def loaded_by(code):
    "The heavy libraries that a fresh Python has loaded after the code."
    report = f"\nimport sys, json; print('\\n' + json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120, cwd=TOP)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HELP = "import sys\nsys.argv = ['llmlab', '--help']\nfrom llmlab.lab.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code"


@pytest.mark.parametrize("code,needs", [
    ("import llmlab", None), ("import llmlab.kit.settings", None), ("from llmlab.kit.settings import settings; settings('tiny', resolve=False)", None),
    ("import llmlab.kit.ledger", "kit/ledger.py"), (HELP, "lab/cli.py")], ids=["llmlab", "kit.settings", "settings()", "kit.ledger", "--help"])
def test_nothing_heavy_is_imported(code, needs):
    if needs and not (TOP/"llmlab"/needs).exists(): pytest.skip(f"no llmlab/{needs} yet")
    assert not loaded_by(code)


def test_importing_changes_nothing_global():
    loaded_by("""
import logging, os, random, warnings
before = dict(os.environ), list(logging.root.handlers), random.getstate(), list(warnings.filters)
import llmlab, llmlab.kit.settings
assert before == (dict(os.environ), list(logging.root.handlers), random.getstate(), list(warnings.filters))
""")
