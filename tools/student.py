"""Write the exercise notebooks with stubs in place of the solutions: `python tools/student.py FOLDER`."""

import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat

SOLUTION = re.compile(r"^### BEGIN SOLUTION\n(.*?)^### END SOLUTION[^\n]*\n?", re.M | re.S)


def stub(solution: str) -> str:
    "What the learner starts from: the signatures of the solution's functions, each raising until it is written."
    heads = []
    for node in ast.parse(solution).body:
        if isinstance(node, ast.FunctionDef):
            heads.append(f"def {node.name}({ast.unparse(node.args)}):\n    raise NotImplementedError('{node.name} is yours to write')\n")
    return "### YOUR CODE HERE\n" + "\n".join(heads)


def student(nb):
    "The student edition of one notebook, and how many solutions it hid."
    nb, hidden = nbformat.from_dict(nb), 0
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        cell.source, n = SOLUTION.subn(lambda m: stub(m[1]), cell.source)
        hidden += n
        cell.outputs, cell.execution_count = [], None
    return nb, hidden


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write them; existing files are kept unless --force")
    parser.add_argument("--force", action="store_true", help="overwrite, also what a learner has written")
    args = parser.parse_args(argv)
    nbs = Path(__file__).resolve().parent.parent / "nbs"
    for source in sorted(nbs.glob("*/*_exercises.ipynb")):
        target = args.folder / source.parent.name / source.name
        if target.exists() and not args.force:
            print(f"{target} exists and may hold work; kept. Pass --force to overwrite it")
            continue
        nb, hidden = student(nbformat.read(source, 4))
        if not hidden:
            print(f"{source} holds no solution to hide: nothing between '### BEGIN SOLUTION' and '### END SOLUTION'", file=sys.stderr)
            return 1
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
        print(f"{target}: {hidden} exercises")
    return 0


if __name__ == "__main__":
    sys.exit(main())
