"""The audit trail: what every inner node accepted and refused, written by the node itself as it happens.

    audit/world.jsonl           one line per update that the world accepted or refused
    audit/world/europe.jsonl    the same of a federation

A restart of a node adds a line with the last seq of every child that its checkpoint knows. The restart undoes what the
node had accepted since, so it must be accepted again. `proofs` checks this for every edge of the tree: no update is
lost, and no update is applied twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.records import VerdictRecord
from worldlm_ray.storage import filesystem

FOLDER = "audit"
OBJECTS_EVERY_S = 2.0
"""Between two writes to an object store."""
RESTORED = "restored"


class AuditLog:
    """The trail of one node. While the storage refuses, lines wait in memory, and none is lost.

    Args:
        run_dir: the run folder.
        node: path of the node.
        warn: told when the storage refuses.
        every_s: between two writes; 0 writes every line at once.
    """

    def __init__(
        self, run_dir: Path, node: str, *, warn: Callable[[str], None] = lambda _: None, every_s: float = 0.0
    ) -> None:
        self._path = run_dir / FOLDER / f"{node}.jsonl"
        self._file = filesystem.Growing(self._path, closing=b"\n")
        self._every_s = OBJECTS_EVERY_S if filesystem.is_remote(run_dir) else every_s
        self._flushed_s = -math.inf
        self._node, self._warn = node, warn
        self._waiting: list[bytes] = []
        self._told = False
        """Whether the storage's refusal has been reported."""

    def verdict(self, record: VerdictRecord) -> None:
        """Write a verdict about an update.

        It is in the file when this returns, unless the storage refuses. Lines for an object store are gathered for up
        to `OBJECTS_EVERY_S`, or until the next `flush`.
        """
        values = asdict(record)
        self._write({"now_s": values.pop("now_s"), **values})

    def restored(self, *, now_s: float, incarnation: int, last_seq: Mapping[str, int]) -> None:
        """Write that the node went back to a checkpoint."""
        line = {"now_s": now_s, "node": self._node, "incarnation": incarnation, RESTORED: dict(last_seq)}
        self._write(line)

    def flush(self) -> None:
        """Write lines that are still waiting."""
        if not self._waiting:
            return
        self._flushed_s = time.monotonic()
        try:
            self._file.add(b"".join(self._waiting))
            self._waiting.clear()
            self._told = False
        except OSError as error:
            if not self._told:
                self._warn(f"cannot write {self._path}: {error}; its lines wait in memory")
            self._told = True

    def _write(self, values: Mapping[str, Any]) -> None:
        self._waiting.append((json.dumps(values) + "\n").encode())
        if time.monotonic() - self._flushed_s >= self._every_s:
            self.flush()


@dataclass
class Proof:
    """What the trail says about one edge of the tree."""

    node: str
    """The receiver."""
    sender: str
    applied: list[int] = field(default_factory=list)
    """Accepted seqs that are in the node's model, in order."""
    again: int = 0
    """Updates that a restart of the node had undone, and that were accepted again."""
    lost: list[int] = field(default_factory=list)
    """Updates that a restart had undone and that never came again."""
    twice: list[int] = field(default_factory=list)
    """Updates that were applied more than once."""
    refused: int = 0

    @property
    def holds(self) -> bool:
        """Whether no update is lost and none is applied twice."""
        return not self.lost and not self.twice


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a run's trail, node by node, in the order of incarnations.

    Damaged lines are left out: `worldlm_ray.reports.trail` says which of them a kill explains.
    """
    for path in files(run_dir):
        found = [values for line in lines_of(path) if (values := whole(line)) is not None]
        # A process of an older incarnation may have written while the newer one ran.
        yield from sorted(found, key=lambda values: int(values.get("incarnation", 1)))


def files(run_dir: Path) -> list[Path]:
    """The files of a trail, one for each inner node that has written."""
    return sorted((run_dir / FOLDER).rglob("*.jsonl"))


def lines_of(path: Path) -> list[str]:
    """The lines of one file of a trail, whole or not."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def whole(line: str) -> dict[str, Any] | None:
    """A parsed line of a trail; None if it is neither a verdict nor a restart of a node."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("node"), str):
        return None
    seqs: list[Any] = [values.get("incarnation", 1)]
    if RESTORED in values:
        if not isinstance(values[RESTORED], dict):
            return None
        seqs += values[RESTORED].values()
    else:
        seqs.append(values.get("seq"))
        if not all(isinstance(values.get(name), str) for name in ("sender", "verdict")):
            return None
    return values if all(type(seq) is int for seq in seqs) else None


def proofs(run_dir: Path) -> list[Proof]:
    """What the trail of a run proves, edge by edge."""
    found: dict[tuple[str, str], Proof] = {}
    undone: dict[tuple[str, str], set[int]] = {}
    for line in read(run_dir):
        if RESTORED in line:
            for (node, sender), proof in found.items():
                if node == line["node"]:
                    _go_back(proof, int(line[RESTORED].get(sender, 0)), undone.setdefault((node, sender), set()))
            continue
        edge = line["node"], line["sender"]
        proof = found.setdefault(edge, Proof(*edge))
        if line["verdict"] != ACCEPTED:
            proof.refused += 1
        elif line["seq"] in proof.applied:
            proof.twice.append(line["seq"])
        else:
            proof.applied.append(line["seq"])
            if line["seq"] in undone.get(edge, ()):
                undone[edge].discard(line["seq"])
                proof.again += 1
    for edge, seqs in undone.items():
        found[edge].lost = sorted(seqs)
    return list(found.values())


def _go_back(proof: Proof, last_seq: int, undone: set[int]) -> None:
    undone.update(seq for seq in proof.applied if seq > last_seq)
    proof.applied = [seq for seq in proof.applied if seq <= last_seq]
