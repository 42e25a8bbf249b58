"""Wheel and sdist are built, and the wheel is installed into an empty environment, where the command works."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.wheels import built, installed, ran

from worldlm_ray.config.loading import presets

ROOT = Path(__file__).resolve().parents[2]


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as held:
        return set(held.namelist())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What git holds: a build leaves its files beside them."""
    copy = tmp_path / "source"
    for name in ran("git", "ls-files", "-z", folder=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.mark.long
def test_wheel_and_sdist_hold_the_same_and_the_wheel_works_alone(source: Path, tmp_path: Path) -> None:
    sdist = built("sdist", source, tmp_path / "dist")
    with tarfile.open(sdist) as held:
        held.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    wheel = built("wheel", unpacked, tmp_path / "dist")
    held_names = names(wheel)
    modules = {path.relative_to(source).as_posix() for path in (source / "worldlm_ray").rglob("*.py")}
    assert modules <= held_names, "every module is listed in pyproject.toml"
    assert {f"worldlm_ray/conf/{name}.yaml" for name in presets()} <= held_names
    assert {"worldlm_ray/py.typed", "worldlm_ray/cluster/Containerfile"} <= held_names
    assert not [name for name in held_names if name.startswith(("tests/", "benchmarks/", "examples/"))]

    site = installed(wheel, tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    place = ran(python, "-c", "import worldlm_ray; print(worldlm_ray.__file__)", folder=tmp_path)
    assert Path(place.strip()).is_relative_to(site)
    command = tmp_path / "empty" / "bin" / "worldlm"
    assert ran(command, "--version", folder=tmp_path).startswith("worldlm_ray ")
    found = json.loads(ran(command, "presets", "--json", folder=tmp_path))
    assert [row["name"] for row in found] == list(presets())
    assert all(Path(row["file"]).is_relative_to(site) for row in found)
    assert json.loads(ran(command, "show", "quickstart", "--json", folder=tmp_path))
