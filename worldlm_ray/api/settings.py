"""The configuration of a call from Python: a preset, a file or a mapping, with overrides as texts and as keywords."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from worldlm_ray.config import loading
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import ConfigError

Conf = str | PathLike[str] | Mapping[str, Any]
"""A preset's name, the path of a YAML file, or what such a file holds."""


def configured(
    conf: Conf,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    run_dir: str | PathLike[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RunConfig:
    """The configuration of a new run.

    Args:
        conf: a preset's name, the path of a YAML file, or a mapping with the same keys.
        overrides: such as `training.lr=1e-3`.
        settings: overrides by key; a value may be a mapping: `{"budget": {"tokens": 1e6}}`.
        run_dir: folder of the run.
        say: told what an override replaces without naming it.

    Raises:
        ConfigError: one problem, by its dotted key.
    """
    changes = [*overrides, *as_overrides(settings or {})]
    given = dict(conf) if isinstance(conf, Mapping) else fspath(conf)
    loaded = loading.load(given, changes, run_dir=None if run_dir is None else fspath(run_dir), say=say)
    # The configuration of another run may be the beginning of a new one, which keeps separate files.
    return replace(loaded, kept={})


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Keyword overrides as the texts that a command line has: `budget.tokens=1000000.0`.

    Raises:
        ConfigError: a value is none that YAML has.
    """
    return [f"{key}={_text(key, value)}" for key, value in _flat(settings, RunConfig)]


def _flat(settings: Mapping[str, Any], hint: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key. A mapping stays whole where its keys are the user's, such as labels."""
    for name, value in settings.items():
        below = loading.hint_of(hint, name)
        if isinstance(value, Mapping) and is_dataclass(below):
            yield from _flat(value, below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(key: str, value: Any) -> str:
    """A value as JSON, which YAML reads."""

    def plain(other: Any) -> Any:
        if isinstance(other, Path):
            return str(other)
        if hasattr(other, "item"):  # a number of numpy
            return other.item()
        raise TypeError(f"a {type(other).__name__}")

    try:
        return json.dumps(value, default=plain, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(key, f"got {error}", "give a number, a text, a list or a mapping of these") from error
