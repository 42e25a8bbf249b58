"""What programs and terminals may expect of the command: plain pipes, JSON, versions, completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from worldlm_ray.cli.main import app
from worldlm_ray.config.loading import presets

READING = ("status", "show", "audit", "privacy", "evaluate", "compare", "presets", "gateway members")


def piped(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worldlm_ray", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.mark.parametrize("command", READING)
def test_every_reading_command_prints_json(command: str) -> None:
    said = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert "--json" in said.output


def test_json_on_a_pipe_is_json_alone_whatever_the_environment_says() -> None:
    done = piped("presets", "--json", FORCE_COLOR="1", COLUMNS="20")
    found = json.loads(done.stdout)
    assert [row["name"] for row in found] == list(presets())
    assert all(Path(row["file"]).is_file() for row in found)


def test_lines_on_a_pipe_are_neither_wrapped_nor_padded() -> None:
    lines = piped("presets", COLUMNS="20").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(presets())
    assert max(map(len, lines)) > 20
    assert [line for line in lines if line != line.rstrip()] == []


def test_no_color_means_no_escape_codes() -> None:
    assert "\x1b" in piped("show", "quickstart", FORCE_COLOR="1").stdout
    assert "\x1b" not in piped("show", "quickstart", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_the_version_names_what_a_bug_report_needs() -> None:
    done = piped("--version")
    assert done.stdout.startswith(f"worldlm_ray {version('worldlm_ray')}, ray ")
    assert re.search(r"torch \d.*Python 3\.\d+", done.stdout)


@pytest.mark.parametrize(("words", "found"), [("worldlm sim", ["simulate"]), ("worldlm show quick", ["quickstart"])])
def test_a_shell_completes_commands_and_presets(words: str, found: list[str]) -> None:
    place = str(len(words.split()) - 1)
    done = piped(_WORLDLM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place)
    assert done.stdout.split() == found
