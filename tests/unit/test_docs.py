"""The documents say what the repository does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.documents import PAGE_MARK, ROOT, Block, blocks, documents, read
from support.worlds import run_example
from typer.main import get_group
from typer.testing import CliRunner

from worldlm_ray.cli.main import app


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 130


def test_the_folders_of_the_repository_are_the_real_ones() -> None:
    block = read("CONTRIBUTING.md").split("## Where things are")[1].split("## ")[0]
    listed = set(re.findall(r"^    (\w+)/ ", block, re.M))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    real = {path.split("/")[0] for path in tracked.splitlines() if "/" in path and not path.startswith(".")}
    assert listed == real


@pytest.mark.parametrize("document", documents())
def test_every_command_in_a_document_exists(document: str) -> None:
    commands = {command.name for command in get_group(app).commands.values()}
    code = "\n".join(re.findall(r"`([^`\n]+)`", read(document)) + [block.text for block in blocks(document)])
    assert set(re.findall(r"^ *worldlm ([a-z]+)\b", code, re.M)) <= commands


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for document in documents():
        for line in re.findall(r"(?:`|^ *)make ((?:[a-z0-9-]+ ?)+)", read(document), re.M):
            assert line.split()[0] in targets, f"{document}: make {line}"


@pytest.mark.parametrize("document", documents())
def test_links_to_files_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(document)):
        if not target.startswith("http"):
            assert (folder / target).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", documents())
def test_a_block_of_commands_is_run_or_says_why_not(document: str) -> None:
    if PAGE_MARK.search(read(document)):
        return
    unmarked = [block for block in blocks(document) if block.is_program and not block.mark]
    assert not unmarked, "\n".join(f"{block.document}:{block.line}: {block.text}" for block in unmarked)


RUN = [document for document in documents() if any(block.runs for block in blocks(document))]


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN)
def test_blocks_that_are_marked_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(document):
        if block.runs:
            RUNNERS[block.language](block)


def _commands(block: Block) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "worldlm", f"{block.document}:{block.line}: {line}"
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"


def _configuration(block: Block) -> None:
    """Check a configuration, with a file for every text that it names."""
    for pattern in re.findall(r"files: \[([^\]]+)\]", block.text):
        place = Path(pattern.replace("*", "one"))
        place.parent.mkdir(parents=True, exist_ok=True)
        _fill(place)
    Path("world.yaml").write_text(block.text, encoding="utf-8")
    assert yaml.safe_load(block.text)["world"]
    done = CliRunner().invoke(app, ["show", "world.yaml"])
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"


def _fill(place: Path) -> None:
    """A file of text in the form that its name says."""
    if place.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["The river."] * 9}), place)
    elif place.suffix == ".gz":
        import gzip

        place.write_bytes(gzip.compress(b'{"body": "The river."}\n' * 9))
    else:
        place.write_text("The river.\n" * 9, encoding="utf-8")


def _program(block: Block) -> None:
    done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RUNNERS = {"sh": _commands, "yaml": _configuration, "python": _program}


def test_one_federation_agrees_with_the_fast_code() -> None:
    assert "largest difference" in run_example("one_federation.py")


@pytest.mark.slow
def test_the_simulated_example_runs(tmp_path: Path) -> None:
    assert "world/code/cpp" in run_example("two_levels_simulated.py", str(tmp_path / "run"))
