"""Whether the receipts of two organisations agree: each update that crossed their border has counted once.

Neither side needs the other's run folder. The world holds a member's file against its audit trail and its own receipts,
the member holds the world's file against its own. Two rules follow from the order in which receipts are written:

    what the world has received, the member has sent                 a member writes a push before it sends it
    what the member has heard, the world has said                    a gateway writes a verdict before it answers

A third is what both want to know: of one life of the parent, an update is accepted once, with one content. A checkpoint
that a verdict has promised is there after every restart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worldlm_ray.errors import RunError
from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.gateway import ledger
from worldlm_ray.gateway.ledger import Finding, Ledger, Pushed
from worldlm_ray.gateway.receipts import FOLDER, RECEIVED, SENT
from worldlm_ray.plan import rundir
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.tracking import audit
from worldlm_ray.tracking.audit import RESTORED

SHOWN = 20
"""Findings that a terminal shows."""


@dataclass
class BorderProof:
    """What receipts prove about one member."""

    member: str
    """Path of the member."""
    side: str
    """Which side the run is on: received or sent."""
    sent: int = 0
    """Updates that the member has signed."""
    accepted: int = 0
    """Updates that a verdict of the world has accepted."""
    again: int = 0
    """Of them, those that a restart of the parent had undone, and that were accepted again."""
    newer: int = 0
    """Lines that this side has and that are newer than the other side's file."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether both sides agree, and each update has counted once."""
        return not self.findings


@dataclass
class Border:
    """What the files of other organisations prove about a run."""

    proofs: list[BorderProof]
    findings: list[Finding]
    """About lines, rather than about a member."""
    torn: int = 0

    @property
    def all_findings(self) -> list[Finding]:
        """All that cannot be."""
        return [*self.findings, *(each for proof in self.proofs for each in proof.findings)]

    @property
    def holds(self) -> bool:
        """Whether nothing has been found."""
        return not self.all_findings

    def lines(self) -> list[str]:
        """The result: each finding, and the conclusion."""
        found = self.all_findings
        shown = [str(each) for each in found[:SHOWN]]
        more = [f"and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else []
        torn = f"; passed over {self.torn:,} lines that a kill has torn apart" if self.torn else ""
        said = "THE RECEIPTS DO NOT AGREE" if found else "the receipts of both sides agree: each update counted once"
        return [*shown, *more, said + torn]


def look(run_dir: Path, files: Iterable[Path]) -> Border:
    """Hold files of receipts against a run.

    Args:
        run_dir: of either side.
        files: that other organisations have handed over.

    Raises:
        RunError: the run has no receipts.
        GatewayError: a file cannot be read.
    """
    folder, has_ended = run_dir / FOLDER, (run_dir / rundir.SUMMARY).exists()
    roots = ledger.roots_of(folder)
    if not roots:
        raise RunError(f"{run_dir} has no receipts: nothing has crossed its border, or it has none; give another run")
    theirs = ledger.read(files, roots)  # before this side's, which goes on
    run, own = ledger.run_of(folder), {}
    found = Border([], theirs.findings, theirs.torn)
    for side in (SENT, RECEIVED):
        own[side] = ledger.read(sorted((folder / side).rglob("*.jsonl")), roots)
        found.findings += own[side].findings
        found.torn += own[side].torn
    for path, ledger_ in sorted(theirs.members.items()):
        if path in own[SENT].members:
            mine = own[SENT].members[path].of(ledger_.runs)
            found.proofs.append(_at_the_member(path, mine, ledger_, has_ended=has_ended))
        elif path in own[RECEIVED].members:
            mine, other = own[RECEIVED].members[path].of([run]), ledger_.of([run])
            found.proofs.append(_at_the_world(path, mine, other, has_ended=has_ended))
            found.proofs[-1].findings += _against_the_trail(run_dir, path, mine, other)
        else:
            found.findings.append(Finding("unknown", f"{path}: this run has no receipt of this member"))
    if not found.proofs and not found.findings:
        found.findings.append(Finding("missing", "the files hold no receipt"))
    return found


def table(border: Border) -> FittingTable:
    """A row for each member."""
    columns = [Column("member", is_number=False), Column("this run has", is_number=False)]
    columns += map(Column, ("sent", "accepted", "again after\na restart", "newer than\nthe file", "findings"))
    found = FittingTable("receipts by member", columns)
    for proof in border.proofs:
        counts = (proof.sent, proof.accepted, proof.again, proof.newer, len(proof.findings))
        style = "" if proof.holds else "bold red"
        found.add_row(proof.member, proof.side, *map(str, counts), style=style)
    return found


# ---- the two sides -----------------------------------------------------------------------------------------------


def _at_the_member(path: str, own: Ledger, theirs: Ledger, *, has_ended: bool) -> BorderProof:
    """This run is the member's."""
    found = _counted(path, SENT, own, theirs)
    for manifest, pushed in theirs.pushes.items():
        if manifest not in own.pushes:
            text = f"{pushed.name} is signed by this member's key, and this run has not sent it: is the key stolen?"
            found.findings.append(Finding("unknown", text))
    wanted = {key: own.pushes[key[0]] for key in own.verdicts}
    _find_missing(found, wanted, theirs.verdicts, "the verdict on {}", has_ended=has_ended)
    return found


def _at_the_world(path: str, own: Ledger, theirs: Ledger, *, has_ended: bool) -> BorderProof:
    """This run is the world's."""
    found = _counted(path, RECEIVED, theirs, own)
    for key in theirs.verdicts:
        if key not in own.verdicts:
            name = theirs.pushes[key[0]].name
            text = f"the verdict on {name} is signed by this world's server, which has not kept it: is the key stolen?"
            found.findings.append(Finding("unknown", text))
    _find_missing(found, own.pushes, theirs.pushes, "{}", has_ended=has_ended)
    return found


def _find_missing(
    found: BorderProof, own: dict[Any, Pushed], theirs: dict[Any, Any], what: str, *, has_ended: bool
) -> None:
    """What this side has must be in the other one's file, which may be older: a run that has ended has no newer one."""
    keys = list(own)
    last = max((index for index, key in enumerate(keys) if key in theirs), default=-1)
    for index, key in enumerate(keys):
        if key in theirs:
            continue
        if index > last and last >= 0 and not has_ended:
            found.newer += 1
        else:
            text = f"{what.format(own[key].name)} is not in the other side's file"
            found.findings.append(Finding("missing", text))


def _counted(path: str, side: str, sender: Ledger, receiver: Ledger) -> BorderProof:
    """The third rule, by the receipts of both sides."""
    found = BorderProof(path, side, sent=len({(pushed.run, pushed.seq) for pushed in sender.pushes.values()}))
    accepted: dict[tuple[str, int, int], set[tuple[bytes, bytes]]] = defaultdict(set)
    contents: dict[tuple[str, int, int], set[bytes]] = defaultdict(set)
    promised: dict[tuple[str, int], int] = defaultdict(int)
    for each in (sender, receiver):
        for key, verdict in each.verdicts.items():
            pushed = each.pushes[key[0]]
            life = pushed.run, pushed.to
            promised[life] = max(promised[life], verdict.durable_seq)
            if verdict.accepted:
                accepted[(*life, pushed.seq)].add(key)
                contents[_update(pushed)].add(pushed.digest)
    lives: dict[tuple[str, int], list[int]] = defaultdict(list)
    for (run, to, seq), keys in accepted.items():
        lives[run, seq].append(to)
        if len(keys) > 1:
            text = f"update {seq} of {path} is accepted {len(keys)} times by incarnation {to} of its parent"
            found.findings.append(Finding("doubled", text))
    for (_, incarnation, seq), digests in contents.items():
        if len(digests) > 1:
            text = f"update {seq} of {path} (incarnation {incarnation}) has {len(digests)} contents"
            found.findings.append(Finding("altered", text))
    found.accepted, found.again = len(lives), sum(len(each) > 1 for each in lives.values())
    for (run, seq), tos in lives.items():
        before = max((durable for (of, to), durable in promised.items() if of == run and to < max(tos)), default=0)
        if len(tos) > 1 and before >= seq:
            text = f"update {seq} of {path} is accepted again, though a checkpoint before had it"
            found.findings.append(Finding("doubled", text))
    return found


def _update(pushed: Pushed) -> tuple[str, int, int]:
    return pushed.run, pushed.incarnation, pushed.seq


# ---- the trail ---------------------------------------------------------------------------------------------------


def _against_the_trail(run_dir: Path, path: str, own: Ledger, theirs: Ledger) -> Iterator[Finding]:
    """What the world's audit trail says otherwise than the receipts of both sides."""
    node, _, sender = path.rpartition("/")
    lines = [line for line in audit.read(run_dir) if line["node"] == node]
    taken: dict[tuple[int, int], int] = defaultdict(int)
    """Times that an incarnation of the node has accepted an update."""
    restored = {line.get("incarnation", 1): int(line[RESTORED].get(sender, 0)) for line in lines if RESTORED in line}
    for line in lines:
        if line.get("sender") == sender and line["verdict"] == ACCEPTED:
            taken[line.get("incarnation", 1), line["seq"]] += 1
    promised: dict[int, int] = defaultdict(int)
    told: set[tuple[int, int]] = set()
    for each in (own, theirs):
        for (manifest, _), verdict in each.verdicts.items():
            pushed = each.pushes[manifest]
            promised[pushed.to] = max(promised[pushed.to], verdict.durable_seq)
            if verdict.accepted:
                told.add((pushed.to, pushed.seq))
    for to, seq in sorted(told):
        came = any(known >= to and other == seq for known, other in taken)
        if not came and not any(later > to and last >= seq for later, last in restored.items()):
            text = f"update {seq} of {path} was accepted by incarnation {to}, and the trail of {node} has it not"
            yield Finding("lost", text)
    known = {(pushed.to, pushed.seq) for pushed in own.pushes.values()}
    for to, seq in sorted(set(taken) - known):
        text = f"the trail of {node} has update {seq} of {path}, accepted by incarnation {to}, without a signed push"
        yield Finding("missing", text)
    for (to, seq), times in sorted(taken.items()):
        if times > 1:
            yield Finding("doubled", f"incarnation {to} of {node} has accepted update {seq} of {path} {times} times")
    for incarnation, last in restored.items():
        before = max((seq for to, seq in promised.items() if to < incarnation), default=0)
        if last < before:
            text = f"incarnation {incarnation} of {node} begins with update {last} of {path}"
            yield Finding("lost", f"{text}, and update {before} was said to be durable")
    for proof in audit.proofs(run_dir):
        if (proof.node, proof.sender) == (node, sender):
            for seq in proof.lost:
                yield Finding("lost", f"a restart of {node} has undone update {seq} of {path}, which never came again")
