"""Configurations that are written to a file and planned, and what a user is told about a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from worldlm_ray.config.loading import load
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan import plan
from worldlm_ray.plan.plan import Plan


def planned(folder: Path, raw: dict[str, Any] | str, overrides: Sequence[str] = ()) -> Plan:
    file = folder / "mine.yaml"
    file.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return plan.make_plan(load(str(file), overrides))


def problem(folder: Path, raw: dict[str, Any] | str, overrides: Sequence[str] = ()) -> str:
    """The one line that the user sees."""
    with pytest.raises(ConfigError) as caught:
        planned(folder, raw, overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.cure, f"no cure: {line}"
    return line


def starts(line: str, key: str) -> bool:
    return line.startswith(f"{key}: ")


def italy(raw: dict[str, Any]) -> dict[str, Any]:
    child: dict[str, Any] = raw["world"]["children"][0]["children"][0]
    return child


ITALY = "world.children[0].children[0]"
