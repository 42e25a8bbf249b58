"""The documents say what the repository does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.worlds import run_example

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> list[str]:
    """Paths of the file tree in the README."""
    block = README.split("## Where things are")[1].split("## ")[0]
    found, folder = [], ""
    for line in block.splitlines():
        if match := re.match(r"    (\S+)/ ", line):
            folder = match.group(1)
            found.append(folder)
        elif match := re.match(r"      (\S+?)/? ", line):
            found.append(f"{folder}/{match.group(1)}")
    return found


def test_the_file_tree_is_the_real_one() -> None:
    listed = tree()
    for path in listed:
        assert (ROOT / path).exists(), path
    package = ROOT / "worldlm_ray"
    real = {p.name for p in package.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")}
    assert {Path(p).name for p in listed if p.startswith("worldlm_ray/")} == real - {"__init__.py"}


def test_every_command_in_the_readme_exists_and_every_command_is_in_it() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "worldlm_ray", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = set(re.findall(r"^  ([a-z]+)  ", help_text.split("Commands:")[1], re.M))
    assert set(re.findall(r"worldlm ([a-z]+)", README)) - {"command", "show"} <= commands
    assert commands <= set(re.findall(r"worldlm ([a-z]+)", README))


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for line in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", text):
            wanted = line.split()
            assert wanted[0] in targets, f"{document}: make {line}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md"])
def test_links_to_files_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{document}: {target}"


def test_one_federation_agrees_with_the_fast_code() -> None:
    assert "largest difference" in run_example("one_federation.py")


@pytest.mark.slow
def test_the_simulated_example_runs(tmp_path: Path) -> None:
    assert "world/code/cpp" in run_example("two_levels_simulated.py", str(tmp_path / "run"))
