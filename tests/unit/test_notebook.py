"""The notebook of the examples runs, and what a notebook shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.text import Text

from worldlm_ray.reports import notebook

ROOT = Path(__file__).resolve().parents[2]
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
read = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(read, timeout=100, kernel_name="python3").execute()
nbformat.write(read, sys.argv[2])
"""
NEEDED = [name for name in ("nbclient", "ipykernel") if find_spec(name) is None]


@pytest.mark.long
@pytest.mark.skipif(bool(NEEDED), reason=f"not installed: {', '.join(NEEDED)}")
def test_the_notebook_of_the_examples_runs(tmp_path: Path) -> None:
    done_file = tmp_path / "done.ipynb"
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(ROOT / "examples" / "notebook.ipynb"), str(done_file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    outputs = {cell["id"]: cell["outputs"] for cell in json.loads(done_file.read_text())["cells"] if "outputs" in cell}
    html = [each["data"].get("text/html", "") for each in outputs["c1"] if each["output_type"] == "execute_result"]
    assert "python" in "".join("".join(part) for part in html), "the table of the nodes"
    assert any(each["output_type"] == "display_data" for each in outputs["c1"]), "the progress was shown"
    [shape] = outputs["c6"]
    assert "".join(shape["data"]["text/plain"]).startswith("(1, 7, ")
    [same] = outputs["c9"]
    assert "".join(same["data"]["text/plain"]) == "True"


def test_a_rich_object_becomes_html_and_text() -> None:
    shown = Text("a <b> [c]", style="bold")
    assert "a &lt;b&gt; [c]" in notebook.as_html(shown)
    assert notebook.as_text(shown) == "a <b> [c]\n"


def test_this_process_is_no_notebook_and_shows_nothing_unless_asked() -> None:
    assert not notebook.in_notebook()
    assert notebook.console_for(False).quiet
    assert not notebook.console_for(True).quiet
