"""The solution edition passes every check (the notebooks' own run shows it); the untouched student edition fails every one."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("student", ROOT / "tools" / "student.py")
student = importlib.util.module_from_spec(spec)
spec.loader.exec_module(student)

EXERCISES = sorted((ROOT / "nbs").glob("*/*_exercises.ipynb"))


def run(nb) -> list[tuple[str, Exception | None]]:
    "Execute code cells one after another in one namespace; the checks, each with what it raised."
    space, checks = {}, []
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        try:
            exec(cell.source, space)
            error = None
        except Exception as e:
            error = e
        if cell.source.startswith("check_"):
            checks.append((cell.source, error))
    return checks


@pytest.mark.parametrize("path", EXERCISES, ids=lambda p: p.parent.name)
def test_solution_edition_passes_every_check(path):
    checks = run(nbformat.read(path, 4))
    assert len(checks) >= 3
    assert all(error is None for _, error in checks), checks


@pytest.mark.parametrize("path", EXERCISES, ids=lambda p: p.parent.name)
def test_untouched_student_edition_fails_every_check(path):
    nb, hidden = student.student(nbformat.read(path, 4))
    checks = run(nb)
    assert hidden == len(checks) >= 3
    assert all(isinstance(error, NotImplementedError) for _, error in checks), checks
    assert "BEGIN SOLUTION" not in nbformat.writes(nb)


@pytest.mark.skipif(not EXERCISES, reason="no exercises yet")
def test_work_is_not_overwritten(tmp_path, capsys):
    assert student.main([str(tmp_path)]) == 0
    written = next(tmp_path.glob("*/*_exercises.ipynb"))
    written.write_text("mine")
    assert student.main([str(tmp_path)]) == 0 and written.read_text() == "mine"
    assert "kept" in capsys.readouterr().out
    assert student.main([str(tmp_path), "--force"]) == 0 and written.read_text() != "mine"
