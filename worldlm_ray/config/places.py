"""Where in a configuration an error lies: the node by its name, the file and the line.

world.children[0].children[1].training.lr: got -1      ->
world/europe/italy: training.lr (conf.yaml line 14): got -1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from worldlm_ray.config.loading import find, read
from worldlm_ray.errors import ConfigError, ConfigErrors, WorldLMError

_NODE = re.compile(r"\bworld((?:\.children\[\d+\])*)(?:\.(?=[a-z_]))?")
_LINK = re.compile(r"\bworld(?:\.children\[\d+\])+(?:\.[a-z_]+)*")


def told(error: WorldLMError, conf: str | None = None, overrides: Sequence[str] = ()) -> list[str]:
    """An error as lines for a person.

    Args:
        error: what happened.
        conf: the configuration that it may speak of, as the user named it; None if there is none.
        overrides: what the command line changes in it.
    """
    try:
        places = None if conf is None else _Places(conf, overrides)
    except (WorldLMError, OSError):
        places = None
    if places is None:
        return str(error).splitlines() or [type(error).__name__]
    if not isinstance(error, ConfigError):
        return [places.named(line) for line in str(error).splitlines()]
    lines = [places.line(each) for each in error.each]
    more = len(lines) - ConfigErrors.SHOWN
    return lines if more <= 0 else [*lines[: ConfigErrors.SHOWN], f"and {more:,} more"]


class _Places:
    def __init__(self, conf: str, overrides: Sequence[str]) -> None:
        document = read(conf)
        self._value, self._lines, self._file = document.value, document.lines, find(conf).name
        self._given = [text.partition("=")[0].strip() for text in overrides]

    def line(self, error: ConfigError) -> str:
        """One problem, with its place in front."""
        node = _NODE.match(error.key)
        place = error.key
        if node is not None:
            path, rest = self._path(node.group(1)), error.key[node.end() :]
            place = f"{path}: {rest}" if rest else path
        where = self._where(error.key)
        text = f"{error.problem}; {error.cure}" if error.cure else error.problem
        return f"{place}{f' ({where})' if where else ''}: {self.named(text)}"

    def named(self, text: str) -> str:
        """A text in which nodes have their names, not their indices."""

        def name(match: re.Match[str]) -> str:
            found = _NODE.match(match.group())
            assert found is not None
            rest = match.group()[found.end() :]
            return self._path(found.group(1)) + (f": {rest}" if rest else "")

        return _LINK.sub(name, text)

    def _path(self, indices: str) -> str:
        at, path = _of(self._value, "world"), "world"
        for index in re.findall(r"\d+", indices):
            at = _of(_of(at, "children"), int(index))
            called = [str(at[kind]) for kind in ("federation", "client") if isinstance(at, dict) and kind in at]
            path += f"/{called[0]}" if called and called[0] else f"/child {int(index) + 1}"
        return path

    def _where(self, key: str) -> str:
        """Where a key is given; empty if it is not, such as one with its default."""
        if any(f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.") for given in self._given):
            return "command line"
        parts = tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))
        while parts and parts not in self._lines:
            parts = parts[:-1]
        return f"{self._file} line {self._lines[parts]}" if parts else ""


def _of(container: Any, key: str | int) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError, TypeError):
        return None
