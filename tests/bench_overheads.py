"""What starting up costs, each figure beside its bound: `make bench`, or python tests/bench_overheads.py [--only NAME …] [--json FILE]

Exit status 1 if a median lies over its bound. Not a test: a busy machine makes every figure larger, so the spread is shown too.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
LLMLAB = [sys.executable, "-c", "import sys; sys.argv[0] = 'llmlab'; from llmlab.lab.cli import main; main()"]
ENCODER = """
import time
from llmlab.kit import models
def load():
    t = time.perf_counter(); models.load("embedded:minilm"); return time.perf_counter() - t
load(); print(load())
"""


@dataclass(frozen=True)
class Bench:
    "Something timed, with its bound in seconds and how often it is repeated."
    name: str
    what: str
    bound_s: float
    times: int
    measure: object
    needs: str


def wall(*command, env=None, ok=(0,)):
    "Seconds of a process from start to end."
    t = time.perf_counter()
    done = subprocess.run([str(o) for o in command], cwd=TOP, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(TOP), **(env or {})))
    seconds = time.perf_counter() - t
    if done.returncode not in ok: raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds


def import_cost():
    "Seconds of `import llmlab` over Python's own start: two processes, one after the other."
    bare = wall(sys.executable, "-c", "pass")
    return wall(sys.executable, "-c", "import llmlab") - bare


def encoder_load():
    "Seconds to load the embedded encoder in a process that has loaded it once."
    done = subprocess.run([sys.executable, "-c", ENCODER], cwd=TOP, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(TOP)))
    if done.returncode: raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.splitlines()[-1])


def run_profile(profile, *names):
    "Seconds of a run with an empty store."
    home = tempfile.mkdtemp(prefix="llmlab-bench-")
    try: return wall(*LLMLAB, "run", *names, "--profile", profile, "--fresh", env=dict(LLMLAB_HOME=home))
    finally: shutil.rmtree(home, ignore_errors=True)


def a_run(profile, bound_s, *names):
    "A run with its bound."
    said = " ".join(["llmlab run", *names, "--profile", profile])
    return Bench("-".join([*names, profile]), f"`{said}`, empty store", bound_s, 1, lambda: run_profile(profile, *names), "llmlab/lab/cli.py")


BENCHES = [
    Bench("import", "`import llmlab`, over Python's own start", .050, 9, import_cost, "llmlab/__init__.py"),
    Bench("help", "`llmlab --help`", .300, 9, lambda: wall(*LLMLAB, "--help"), "llmlab/lab/cli.py"),
    Bench("encoder", "loading the embedded encoder, warm", 1., 3, encoder_load, "llmlab/kit/models.py"),
    *(a_run(*o) for o in (("smoke", 60., "selection/candidates"), ("tiny", 240., "selection/candidates"), ("tiny", 90., "foundations"),
        ("tiny", 120., "selection"), ("tiny", 180., "quantization"), ("tiny", 150., "pruning"), ("smoke", 180.), ("tiny", 780.))),
]


def main():
    "Measure, show a table, and return whether every median is within its bound."
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--only", nargs="+", choices=[b.name for b in BENCHES], default=[b.name for b in BENCHES])
    a.add_argument("--json", type=Path, help="also write the figures to this file")
    args = a.parse_args()
    print(f"{'what':70} {'bound':>9} {'median':>9} {'fastest':>9} {'slowest':>9}  n")
    rows = []
    for b in BENCHES:
        if b.name not in args.only: continue
        if not (TOP/b.needs).exists():
            print(f"{b.what:70} {'':>9} {b.needs} is not here yet")
            continue
        samples = [b.measure() for _ in range(b.times)]
        median, unit, scale = statistics.median(samples), *(("ms", 1e3) if b.bound_s < 1 else ("s", 1))
        show = lambda x: f"{x*scale:,.{0 if unit == 'ms' else 1}f} {unit}"  # noqa: E731
        over = median > b.bound_s
        cells = [show(o) for o in (b.bound_s, median, min(samples), max(samples))]
        print(f"{b.what:70}", *(f"{o:>9}" for o in cells), f" {b.times}", "OVER" if over else "", flush=True)
        rows.append(dict(name=b.name, what=b.what, bound_s=b.bound_s, median_s=median, samples_s=samples, over=over))
    if args.json: args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return not any(r["over"] for r in rows)


if __name__ == "__main__": sys.exit(0 if main() else 1)
