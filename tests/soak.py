"""Runs of the whole course one after another, looking for what happens once in fifty: python tests/soak.py --runs 50 --jobs 2.

Each run is also compared with the one before: the same code must show no regression.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmlab.lab.engine import MARK


def left_over(runs):
    "Processes that these runs (names of folders) started and did not end."
    import psutil
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get(MARK, "-").startswith(tuple(runs)): found.append(f"{p.pid} {' '.join(p.cmdline())[:100]}")
        except (psutil.Error, OSError): continue
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2, help="notebooks side by side")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run counts as hung")
    parser.add_argument("names", nargs="*", help="chapters or parts; all chapters if none is named")
    a = parser.parse_args()
    bad, times, before, worse = 0, [], None, 0
    with tempfile.TemporaryDirectory() as out:
        llmlab = [sys.executable, "-c", "from llmlab.lab.cli import main; main()"]
        command = [*llmlab, "run", *a.names, "--profile", a.profile, "--jobs", str(a.jobs), "--fresh", "--out"]
        for i in range(1, a.runs + 1):
            start = time.perf_counter()
            folder = Path(out)/str(i)
            try: done = subprocess.run([*command, str(folder)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=a.limit)
            except subprocess.TimeoutExpired: done = None
            times.append(time.perf_counter() - start)
            left, verdict = left_over([f.name for f in folder.glob("*")]), list(folder.glob("*/verdict.json"))
            if done is None or done.returncode or left or not verdict:
                bad += 1
                print(f"run {i}: {'hung' if done is None else f'exit status {done.returncode}'}; left over: {left or 'nothing'}")
                if done: print(done.stdout[-2000:], done.stderr[-1000:], flush=True)
                continue
            now = verdict[0].parent
            if before:
                same = subprocess.run([*llmlab, "compare", str(before), str(now)], capture_output=True, text=True)
                if same.returncode:
                    worse += 1
                    print(f"run {i} against the one before:\n{same.stdout[-2000:]}{same.stderr[-1000:]}", flush=True)
                shutil.rmtree(before.parent)
            before = now
            if i % 10 == 0 or i == a.runs: print(f"{i} runs, {bad} bad, {worse} with a regression, median {sorted(times)[len(times) // 2]:.1f} s", flush=True)
    print(f"{a.runs - bad} passed, {bad} failed; {worse} regressions between runs of the same code")
    return bool(bad or worse)


if __name__ == "__main__":
    sys.exit(main())
