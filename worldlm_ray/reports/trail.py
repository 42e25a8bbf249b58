"""Whether the audit trail of a run is complete: a damaged or missing trail proves nothing.

A line that a kill has cut short is no damage: the node writes its update again, or goes back to a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worldlm_ray.plan import rundir
from worldlm_ray.storage import filesystem
from worldlm_ray.tracking import audit

NOTHING = "no update has been judged yet: nothing is proved"
_BEGIN = '{"now_s": '
"""Every line of a trail begins like this."""


@dataclass
class Trail:
    """What the audit trail of a run proves, and whether it is complete."""

    proofs: list[audit.Proof]
    damage: list[str] = field(default_factory=list)
    """Places that are damaged or missing, such as `runs/a/audit/world.jsonl line 3`."""
    torn: int = 0
    """Lines that a kill has cut short. They are left out."""
    counted: int = 0
    """Accepted updates that the run itself has counted, in `source`."""
    source: str = rundir.SUMMARY

    @property
    def holds(self) -> bool | None:
        """Whether the trail is complete, no update is lost and none is applied twice; None if none has been judged."""
        if not self.proofs and not self.damage:
            return None
        return not self.damage and all(proof.holds for proof in self.proofs)

    def conclusion(self, run_dir: Path) -> str:
        """The result in a line."""
        if self.damage:
            shown, more = "; ".join(self.damage[:3]), len(self.damage) - 3
            places = shown + (f"; and {more:,} more" if more > 0 else "")
            counts = f"; {self.source} counts {self.counted:,} accepted updates" if self.counted else ""
            return f"the trail of {run_dir} is missing or damaged ({places}){counts}"
        lines = "one line" if self.torn == 1 else f"{self.torn:,} lines"
        torn = f"; passed over {lines} that a kill has torn apart" if self.torn else ""
        if self.holds is False:
            return "THE TRAIL IS BROKEN" + torn
        said = "nothing was lost and nothing applied twice" if self.proofs else NOTHING
        return said + torn


def look(run_dir: Path) -> Trail:
    """Check the trail of a run, and compare it with the counts in summary.json, or status.json.

    Args:
        run_dir: the run's folder.
    """
    source, nodes, damage = _counts(run_dir)  # read before the trail, since a live run goes on
    found = Trail(audit.proofs(run_dir), damage=damage, source=source)
    for path in audit.files(run_dir):
        wrong, torn = _wrong_lines(audit.lines_of(path))
        found.damage += [f"{path} line {number}" for number in wrong]
        found.torn += torn
    held = {f"{proof.node}/{proof.sender}": len({*proof.applied, *proof.lost}) for proof in found.proofs}
    # In an object store, and in a simulation without training, lines may be written later than the counts of a status.
    late = source == rundir.STATUS and (filesystem.is_remote(run_dir) or rundir.is_simulated(run_dir))
    for node, counted in nodes.items():
        found.counted += counted
        if counted > held.get(node, 0) and not (late and held):
            path = run_dir / audit.FOLDER / f"{node.rpartition('/')[0]}.jsonl"
            found.damage.append(f"{path} holds {held.get(node, 0):,} of {counted:,} accepted updates of {node}")
    return found


def _wrong_lines(lines: list[str]) -> tuple[list[int], int]:
    """Numbers of damaged lines, from 1, and how many lines a kill has cut short."""
    wrong, torn = list[int](), 0
    last = max((index for index, line in enumerate(lines) if line.strip()), default=-1)
    life = 1
    for index, line in enumerate(lines):
        values = audit.whole(line)
        if values is not None:
            life = values.get("incarnation", 1)
        elif line.strip():
            after = lines[index + 1] if index < last else None
            if line[: len(_BEGIN)] == _BEGIN[: len(line)] and _ends_here(line, after, life):
                torn += 1
            else:
                wrong.append(index + 1)
    return wrong, torn


def _ends_here(line: str, after: str | None, life: int) -> bool:
    """Whether the writer ended inside a line: no line, the whole line, or a later incarnation of the node follows."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        following = audit.whole(after) if after is not None else None
        return (
            after is None
            or after.startswith(line)
            or (following is not None and (audit.RESTORED in following or following.get("incarnation", 1) != life))
        )
    return False


def _counts(run_dir: Path) -> tuple[str, dict[str, int], list[str]]:
    """The file with a run's counts of accepted updates, the counts by path of the sender, and what is damaged in it."""
    source = next((name for name in (rundir.SUMMARY, rundir.STATUS) if (run_dir / name).is_file()), "")
    if not source:
        return source, {}, []
    path = run_dir / source
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        return source, _accepted(nodes), []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return source, {}, [f"{path} cannot be read, so that the trail cannot be compared with it"]


def _accepted(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    found = {path: node["accepted"] for path, node in nodes.items()}
    if not all(type(count) is int for count in found.values()):
        raise TypeError
    return found
