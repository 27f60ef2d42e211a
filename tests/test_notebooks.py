"""The circle tier: the notebooks of examples/ run from top to bottom in a kernel, on the tiny base."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.circle

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples/notebooks").glob("*.ipynb"))


CHECKED = "dataframe_to_adapter"
# the values that the notebook shows are those of its artefacts
CHECKS = """
import math
assert math.isclose(curve["loss"].iloc[-1], tuned.adapter.manifest["run"]["loss"]["last"])
assert len(report.to_pandas()) == len(made.dataset.to_pandas("eval")) == 24
assert type(model).__name__.startswith("PeftModel")
"""


@contextmanager
def kernel(folder: Path, commands: dict[str, str]) -> Iterator[None]:
    """A kernel `warm`, which has imported its libraries before (warm.py), with a SARTOR_HOME of its own."""
    python = str(Path(commands["PATH"].split(os.pathsep)[0]) / "python")
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "warm", "language": "python"}
    (folder / "jupyter/kernels/warm").mkdir(parents=True)
    (folder / "jupyter/kernels/warm/kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        yield


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda file: file.stem)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    commands: dict[str, str],
) -> tuple[Path, Any, list[Any]]:
    """(file, notebook as it is kept, code cells with their outputs); behind the last cell of one come CHECKS."""
    kept, notebook, folder = opened(request.param), opened(request.param), tmp_path_factory.mktemp("notebook")
    for cell in notebook.cells:
        cell.source = cell.source.replace('"starter"', repr(str(tiny_base)))
    if request.param.stem == CHECKED:
        notebook.cells.append(code_cell(CHECKS, "raises-exception"))
    with kernel(folder, commands):
        return request.param, kept, run(notebook, folder)


def opened(file: Path) -> Any:
    """Return a notebook as it is kept."""
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cell(source: str, *tags: str) -> Any:
    import nbformat

    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


def run(notebook: Any, folder: Path) -> list[Any]:
    """Execute a notebook in its folder; return the code cells with their outputs."""
    import nbclient  # of the extra dev; the default tier collects this file without it

    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="warm", resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> str:
    """Return what a cell shows, as text."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(texts)


def cell_with(cells: list[Any], text: str) -> Any:
    return next(cell for cell in cells if text in cell.source)


def test_notebook_runs_from_top_to_bottom(finished: tuple[Path, Any, list[Any]]) -> None:
    _, kept, cells = finished
    assert all(not cell.get("outputs") for cell in kept.cells), "it is kept without outputs"
    tuning = cell_with(cells, "sartor.tune(")
    bars = [output for output in tuning.outputs if "<progress" in output.get("data", {}).get("text/html", "")]
    assert len(bars) == 1, "one bar, drawn in its place"
    for cell in cells:
        assert not [output for output in cell.outputs if output.output_type == "stream" and output.name == "stderr"]
        assert len(cell.outputs) <= 8 and len(shown(cell)) < 6000
    assert "exact_match" in shown(cell_with(cells, 'to_pandas("metrics")'))


def test_values_and_faults_of_a_notebook_are_those_of_its_artefacts(finished: tuple[Path, Any, list[Any]]) -> None:
    file, _, cells = finished
    if file.stem == CHECKED:
        assert cells[-1].source == CHECKS and not cells[-1].outputs
        return
    dropped = shown(cell_with(cells, '"dropped"'))
    locators = re.findall(r"^\d+ +(rows:\d+)", dropped, re.MULTILINE)
    assert sorted(locators) == ["rows:181", "rows:182", "rows:183", "rows:184"]
    assert "'message', 'topic'" in shown(cells[-1])


def test_error_is_short_and_tb_shows_the_whole(tmp_path: Path, commands: dict[str, str]) -> None:
    notebook = opened(NOTEBOOKS[1])
    notebook.cells = [
        code_cell('import sartor\nsartor.open("none")', "raises-exception"),
        code_cell("%tb", "raises-exception"),
    ]
    with kernel(tmp_path, commands):
        cells = run(notebook, tmp_path)
    (short,) = cells[0].outputs
    assert short.ename == "ArtifactError" and len(short.traceback) == 3
    assert "there is nothing at" in short.traceback[0] and "try: " in short.traceback[1]
    whole = "\n".join("\n".join(output.get("traceback", [])) + output.get("text", "") for output in cells[1].outputs)
    assert "open_artifact" in whole and "Traceback" in whole
