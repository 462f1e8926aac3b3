"""The notebooks run from top to bottom, and what they print is what they were committed with.

Their cells are executed here, in this process: a kernel each would import torch once more for every notebook.
"""

import ast
import contextlib
import io
import json
import re
import sys

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_CELLS, MAX_BYTES = 15, 400_000
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def printed(cell):
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def words(text):
    """Without its numbers, which another processor rounds otherwise, and the spaces that line them up."""
    return re.sub(r"[-+\d.,e%\s]+", " ", text).split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """One for all of them: what one has trained, another finds."""
    return tmp_path_factory.mktemp("notebooks")


@every_notebook
def test_it_runs_and_prints_what_it_was_committed_with(path, workplace, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib: install the extra metrics")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(workplace)
    space = {"__name__": "__main__"}
    for cell in cells(path):
        out, source = io.StringIO(), "".join(cell["source"])
        with contextlib.redirect_stdout(out):
            exec(compile(source, f"{path.name}: {source.splitlines()[0]}", "exec"), space)
        assert words(out.getvalue()) == words(printed(cell))
        pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", ())]
        assert len(plt.get_fignums()) == len(pictures)
        plt.close("all")


@every_notebook
def test_it_reads_well_without_running(path):
    raw, code, text = path.read_text(), cells(path), cells(path, "markdown")
    assert len(code) + len(text) <= MAX_CELLS and len(raw.encode()) <= MAX_BYTES
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    kinds = {out.get("name", out["output_type"]) for cell in code for out in cell["outputs"]}
    assert kinds <= {"stdout", "display_data"}  # no warnings, no errors, no stray values
    assert not any(re.search(r"/(home|root|tmp|work|Users)/", printed(cell)) for cell in code)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", "".join("".join(cell["source"]) for cell in text))
    assert links and all((FOLDER / link).exists() for link in links), links


@every_notebook
def test_it_defines_nothing_that_the_package_has(path):
    """Cells call; what they may define is a few lines that draw."""
    for cell in cells(path):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            assert not isinstance(node, ast.ClassDef), node.name
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 12, node.name


def test_there_are_eight_and_their_helpers_are_imported_from_here():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 9)]
    used = "".join("".join(cell["source"]) for path in NOTEBOOKS for cell in cells(path))
    assert all(f"import {name}" in used or f"from {name}" in used for name in ("show", "small"))
    assert not {"show", "small"} & set(sys.stdlib_module_names)
