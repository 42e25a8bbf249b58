"""Faults on purpose, one line each, the same in both shells: `faults: [20s kill world/europe, ...]`.

    20s kill world/europe                   its process dies and is started again
    20s cut world/europe for 10s            no message between it and its parent arrives
    20s drop world/europe for 10s           its messages arrive, the answers do not
    20s repeat world/europe for 10s         every one of its messages arrives twice
    20s corrupt world/europe for 10s        its updates arrive with a damaged header
    20s delay world/europe by 2s for 10s    its messages take that much longer
    20s disk world/europe for 30s           its storage refuses

Times count from the start of the run: virtual in simulation, wall on Ray. `kill ... for 5s` leaves the node dead for so
long in simulation; on Ray it takes as long as Ray takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from worldlm_ray.config import listed
from worldlm_ray.errors import ConfigError

KINDS = ("kill", "cut", "drop", "repeat", "corrupt", "delay", "disk")
_ON_EDGE = ("cut", "drop", "repeat", "corrupt", "delay")
_NUMBER = r"(\d+(?:\.\d+)?)s"
_LINE = re.compile(rf"{_NUMBER} ([a-z]+) (\S+)(?: by {_NUMBER})?(?: for {_NUMBER})?")
_CURE = "write it like `20s cut world/europe for 10s`"


@dataclass(frozen=True)
class Fault:
    """One fault."""

    at_s: float
    kind: str
    node: str
    """Whose process, storage, or link to its parent is concerned."""
    by_s: float = 0.0
    for_s: float = 0.0

    def holds(self, now_s: float) -> bool:
        """Whether it is under way."""
        return self.at_s <= now_s < self.at_s + self.for_s


@dataclass(frozen=True)
class Faults:
    """The faults of a run."""

    all: tuple[Fault, ...] = ()

    @staticmethod
    def parse(lines: Iterable[str], *, kinds: Mapping[str, str]) -> Faults:
        """Read a script.

        Args:
            lines: a fault each.
            kinds: `world`, `federation` or `client` by the path of every node.

        Raises:
            ConfigError: a line is not a fault, or its node is not there or has no such link.
        """
        return Faults(tuple(_parse(f"faults[{index}]", line, kinds) for index, line in enumerate(lines)))

    def __bool__(self) -> bool:
        return bool(self.all)

    def of(self, node: str, *, kind: str) -> list[Fault]:
        """One node's faults of one kind."""
        return [fault for fault in self.all if fault.node == node and fault.kind == kind]

    def now(self, node: str, kind: str, now_s: float) -> bool:
        """Whether a fault is under way."""
        return any(fault.holds(now_s) for fault in self.of(node, kind=kind))

    def delay_s(self, node: str, now_s: float) -> float:
        """By how much a message between the node and its parent is late."""
        return sum(fault.by_s for fault in self.of(node, kind="delay") if fault.holds(now_s))


def damaged(header: bytes) -> bytes:
    """A header as a broken wire might deliver it."""
    return bytes([header[0] ^ 0xFF]) + header[1 : len(header) // 2]


def _parse(key: str, line: str, kinds: Mapping[str, str]) -> Fault:
    match = _LINE.fullmatch(line.strip()) if isinstance(line, str) else None
    if match is None:
        raise ConfigError(key, f"{line!r} is not a fault", _CURE)
    at, kind, node, by, length = match.groups()
    if kind not in KINDS:
        raise ConfigError(key, f"there is no fault {kind!r}", "use one of " + ", ".join(KINDS))
    if node not in kinds:
        raise ConfigError(key, f"there is no node {node!r}", "use one of " + listed(list(kinds)))
    if kind in _ON_EDGE and kinds[node] == "world":
        raise ConfigError(key, f"the world has no parent, so no link to {kind}", "name the node at the lower end")
    if kind != "kill" and length is None:
        raise ConfigError(key, f"{line!r} does not say how long", _CURE)
    if (kind == "delay") != (by is not None):
        raise ConfigError(key, f"{line!r}: `by` belongs to delay, and delay needs it", _CURE)
    return Fault(float(at), kind, node, float(by or 0.0), float(length or 0.0))
