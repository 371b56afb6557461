"""The notebooks run from top to bottom, offline, and print what they were saved with, times apart.

`python tests/test_notebooks.py --save` runs them and saves their outputs.
"""

import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

import nbformat
from nbclient import NotebookClient

import memws

ROOT = Path(memws.__file__).parent
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# What differs from run to run: times, durations, what the display of a widget is called.
VARYING = {
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+\d\d:\d\d)?": "TIME",
    r"\d{4}-\d\d-\d\d": "DAY",
    r"\b\d\d:\d\d(:\d\d)?\b": "TIME",
    r"\b\d+(\.\d+)? (ms|s)\b": "SECONDS",
    r'"duration_ms": \d+': '"duration_ms": N',
    r"(memws-static-|\"tool_call_id\": \")[0-9a-f]+": r"\1ID",
    r"\b[0-9a-f]{32}\b": "ID",
    r"(delta +\{.*\n)+": "delta\n",
}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The notebooks name ports: other runs of these tests on this machine wait."""
    with (Path(tempfile.gettempdir()) / "memws-notebooks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(path: Path, clone: Path) -> Any:
    """The notebook after all its cells ran in notebooks/ of a clone, without what the notebooks leave there."""
    shutil.copy(ROOT / "memws.py", clone)
    (clone / "notebooks").mkdir()
    notebook = nbformat.read(path, as_version=4)
    foreign = ("OPENAI_", "MEMWS_", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    settings = {"IPYTHONDIR": str(clone / ".ipython"), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", store_widget_state=False,
                            resources={"metadata": {"path": str(clone / "notebooks")}})  # fmt: skip
    client.execute(env=clean | settings)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def printed(notebook: Any) -> list[str]:
    """What each cell put out, in whatever pieces, without what differs from run to run."""
    return [fixed("".join(map(text_of, cell.get("outputs", ())))) for cell in notebook.cells]


def text_of(output: Any) -> str:
    """An output as text; of pictures only that they are there."""
    if output.output_type in ("stream", "error"):
        return str(output.get("text") or f"{output.ename}: {output.evalue}")
    data = {mime: "" if mime.startswith("image/") else data for mime, data in output.data.items()}
    return json.dumps(data, sort_keys=True, indent=1)


def fixed(text: str) -> str:
    for pattern, word in VARYING.items():
        text = re.sub(pattern, word, text)
    return text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs(path: Path, tmp_path: Path) -> None:
    assert printed(run(path, tmp_path)) == printed(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved(path: Path) -> None:
    """A notebook is saved with outputs, runs in order, names no machine's path, and says how to use a real model."""
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= 3
    assert not re.search(r"/(home|root|tmp|Users|work|usr)/|[A-Z]:\\\\", text)
    assert not re.search(r"sk-[A-Za-z0-9]{8}", text)
    assert "OPENAI_API_KEY" in notebook.cells[0].source
    assert "widgets" not in notebook.metadata
    assert "Traceback" not in text


if __name__ == "__main__" and sys.argv[1:] == ["--save"]:
    for each in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as clone:
            nbformat.write(run(each, Path(clone)), each)
            print(f"saved {each.name}")
