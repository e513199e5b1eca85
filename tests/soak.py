"""Runs of the whole course one after another, looking for what happens once in fifty: python tests/soak.py --runs 50 --jobs 2."""
import argparse
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
    bad, times = 0, []
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", "from llmlab.lab.cli import main; main()", "run", *a.names,
                   "--profile", a.profile, "--jobs", str(a.jobs), "--fresh", "--out"]
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
                if done: print(done.stdout[-2000:], done.stderr[-1000:])
            elif i % 10 == 0: print(f"{i} runs, {bad} of them bad, median {sorted(times)[len(times) // 2]:.1f} s", flush=True)
    print(f"{a.runs - bad} passed, {bad} failed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
