"""Faults on purpose, one line each, the same in both backends: `faults: [20s kill world/europe, ...]`.

    20s kill world/europe                   its process dies and is started again
    20s cut world/europe for 10s            no message between it and its parent arrives
    20s drop world/europe for 10s           its messages arrive, the answers do not
    20s repeat world/europe for 10s         every one of its messages arrives twice
    20s corrupt world/europe for 10s        its updates arrive with a damaged header
    20s delay world/europe by 2s for 10s    its messages take that much longer
    20s disk world/europe for 30s           its storage refuses
    20s leave world/europe/italy            a client goes, after the round that is under way
    40s join world/europe/italy             it comes back; one that has not left before is not there until then

Times count from the start of the run: virtual in simulation, run time on Ray. `kill ... for 5s` leaves the node dead
for so long in simulation; on Ray it takes as long as Ray takes. Clients that leave or come late are not waited for, not
even at the end of the run; `leave` and `join` of a federation are those of every client below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from worldlm_ray.config.values import listed
from worldlm_ray.errors import ConfigError

KINDS = ("kill", "cut", "drop", "repeat", "corrupt", "delay", "disk", "leave", "join")
_MEMBERSHIP = ("leave", "join")
_AT_ONCE = ("kill", *_MEMBERSHIP)
"""Kinds that need not say how long."""
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
            ConfigError: a line is not a fault, its node is not there or has no such link, or a client leaves or joins
                twice in a row.
        """
        keys = {f"faults[{index}]": line for index, line in enumerate(lines)}
        each = [(key, line, one) for key, line in keys.items() for one in _clients_of(_parse(key, line, kinds), kinds)]
        _check_turns(each)
        return Faults(tuple(fault for _, _, fault in each))

    def __bool__(self) -> bool:
        return bool(self.all)

    def of(self, node: str, *, kind: str) -> list[Fault]:
        """One node's faults of one kind."""
        return [fault for fault in self.all if fault.node == node and fault.kind == kind]

    def now(self, node: str, kind: str, now_s: float) -> bool:
        """Whether a fault is under way."""
        return any(fault.holds(now_s) for fault in self.of(node, kind=kind))

    def turns(self, client: str) -> list[Fault]:
        """When a client joins and leaves, in the order of time."""
        return sorted((f for f in self.all if f.node == client and f.kind in _MEMBERSHIP), key=lambda f: f.at_s)

    def comes_late(self, client: str) -> bool:
        """Whether a client is not there when the run begins."""
        return any(fault.kind == "join" for fault in self.turns(client)[:1])

    def is_member(self, client: str, now_s: float) -> bool:
        """Whether a client means to take part."""
        member = not self.comes_late(client)
        for fault in self.turns(client):
            if fault.at_s <= now_s:
                member = fault.kind == "join"
        return member

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
    if kinds[node] == "remote":
        raise ConfigError(key, f"{node} is in another cluster", "give the fault in the configuration of that cluster")
    if kind in _ON_EDGE and kinds[node] == "world":
        raise ConfigError(key, f"the world has no parent, so no link to {kind}", "name the node at the lower end")
    if kind in _MEMBERSHIP and kinds[node] == "world":
        raise ConfigError(key, f"the world cannot {kind} itself", "name a client, or a federation")
    if kind in _MEMBERSHIP and length is not None:
        raise ConfigError(key, f"{line!r}: {kind} takes no `for`", "write two lines, one to leave and one to join")
    if kind not in _AT_ONCE and length is None:
        raise ConfigError(key, f"{line!r} does not say how long", _CURE)
    if (kind == "delay") != (by is not None):
        raise ConfigError(key, f"{line!r}: `by` belongs to delay, and delay needs it", _CURE)
    return Fault(float(at), kind, node, float(by or 0.0), float(length or 0.0))


def _clients_of(fault: Fault, kinds: Mapping[str, str]) -> list[Fault]:
    """The fault, or, where a federation leaves or joins, those of all clients below it."""
    if fault.kind not in _MEMBERSHIP or kinds[fault.node] == "client":
        return [fault]
    below = [path for path, kind in kinds.items() if kind == "client" and path.startswith(f"{fault.node}/")]
    return [replace(fault, node=path) for path in below]


def _check_turns(lines: list[tuple[str, Any, Fault]]) -> None:
    """A client joins and leaves in turn."""
    last: dict[str, Fault] = {}
    for key, line, fault in sorted(lines, key=lambda each: each[2].at_s):
        if fault.kind not in _MEMBERSHIP:
            continue
        before = last.get(fault.node)
        if before is not None and before.kind == fault.kind:
            got = f"{line!r}: {fault.node} would {fault.kind} twice in a row"
            raise ConfigError(key, got, "let it " + ("leave" if fault.kind == "join" else "join") + " in between")
        last[fault.node] = fault
