"""Tables for the terminal: a running world as a tree, and the result of a finished one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from worldlm_ray.records import perplexity
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.tracking.audit import Proof
from worldlm_ray.tracking.node_state import KINDS

NOTHING = "–"  # noqa: RUF001 - an en dash is what tables show for "none"
PRIVATE = "private"
"""Shown for losses that clients know and do not report."""
BAR = 10
"""Characters of the bar that shows how far a run is."""
FORESEEN = 0.02
"""Fraction of the budget from which on the remaining time is estimated."""
SAMPLE_CHARACTERS = 240
"""Characters of a sample. A longer one is cut."""
MANY = 32
"""More siblings of a kind are summed up in one line."""
_STYLES = {"world": "bold", "federation": "bold cyan", "client": ""}
_STATES = {"finished": "green", "waiting": "yellow", "paused": "yellow", "left": "dim"}
_STATES |= dict.fromkeys(("warning", "diverged"), "bold red")


def live_table(snapshot: Mapping[str, Any]) -> FittingTable:
    """One line per node of a run, indented as the tree.

    Args:
        snapshot: `Tracker.snapshot()`, or status.json as read.
    """
    columns = [
        Column("node", is_number=False),
        Column("ver-\nsion", rank=5),
        Column("tokens", rank=1),
        Column("tok/s", rank=4),
        Column("stale", rank=3),
        Column("loss\n(nats/byte)\nown model", rank=6),
        Column("loss\nof clients\n(mean)", rank=7),
        Column("perplexity\nper byte\nown model"),
        Column("\nof clients\n(mean)"),
        Column("busy", rank=2),
        Column("acc/\nref", rank=4),
        Column("state", is_number=False),
    ]
    table = FittingTable(printable(_head(snapshot)), columns)
    for path, node in folded(snapshot["nodes"]):
        state = str(node.get("state") or NOTHING)
        table.add_row(
            _name(path, node["kind"]),
            str(node["version"]),
            amount(node["tokens"]),
            amount(node["tokens_per_s"]),
            _or(node["tau"], "d"),
            _loss(node),
            _or(node.get("clients_loss"), ".3f"),
            _own(node),
            _perplexity(node.get("clients_perplexity")),
            _or(node["busy_fraction"], ".0%"),
            _verdicts(node),
            Text(printable(_said(state, node)), style=_STATES.get(state, "")),
        )
    return table


def _head(snapshot: Mapping[str, Any]) -> str:
    """The progress of a run: a bar, the time so far, the estimated remaining time, the tokens and the budget."""
    progress, now_s = float(snapshot.get("progress", 0.0)), float(snapshot.get("now_s", 0.0))
    filled = round(BAR * min(progress, 1.0))
    left = f", {left_of(snapshot)}" if left_of(snapshot) else ""
    budget = snapshot.get("budget") or {}
    target = f" of {amount(budget['tokens'])}" if budget.get("tokens") else ""
    target += f", {budget['rounds']} rounds each" if budget.get("rounds") else ""
    return (
        f"{snapshot.get('run', 'run')}  [{'#' * filled}{'.' * (BAR - filled)}] {progress:.0%}  "
        f"{duration(now_s)}{left}  {amount(snapshot.get('tokens', 0))}{target} tokens"
    )


def left_of(snapshot: Mapping[str, Any]) -> str:
    """The estimated remaining time at the present rate; empty if unknown."""
    progress, now_s = float(snapshot.get("progress", 0.0)), float(snapshot.get("now_s", 0.0))
    if not FORESEEN <= progress < 1.0:
        return ""
    return f"{duration(now_s * (1.0 - progress) / progress)} left"


def _said(state: str, node: Mapping[str, Any]) -> str:
    """A node's state, with its reason if an operator may want to act."""
    detail = str(node.get("state_detail") or "")
    if node.get("diverged") and state != "diverged":
        return f"{state}, diverged"
    return f"{state}: {detail}" if state == "paused" and detail else state


def final_table(summary: Mapping[str, Any], samples: Mapping[str, str]) -> Group:
    """Losses and counts of every node, and below them a line of each client's text.

    Args:
        summary: what `write_summary` returned, or summary.json as read.
        samples: generated text by path of the node; a node may have none.
    """
    head = (
        f"{summary['run']}   {summary['method']}   seed {summary['seed']}   "
        f"{duration(float(summary['wall_s'] or 0.0))}   {amount(summary['tokens'])} tokens"
    )
    columns = [
        Column("node", is_number=False),
        Column("tokens", rank=2),
        Column("staleness", rank=1),
        Column("perplexity\nper byte\nat the start"),
        Column("perplexity\nper byte\nown model"),
        Column("\nof clients\n(mean)"),
    ]
    table = FittingTable(printable(head), columns)
    for path, node in folded(summary["nodes"]):
        table.add_row(
            _name(path, node["kind"]),
            amount(node["tokens"]),
            _or(node.get("tau_mean"), ".2f"),
            _perplexity(node["perplexity_start"]),
            Text(_own(node), style="bold"),
            _perplexity(node.get("clients_perplexity")),
        )
    return Group(table, *_samples(samples, failed=summary.get("samples_failed") or {}))


def _samples(samples: Mapping[str, str], *, failed: Mapping[str, str]) -> Iterator[Text]:
    """One line per client. A Text is never parsed as markup, so a model may write brackets."""
    lines = {path: Text(printable(text)[:SAMPLE_CHARACTERS]) for path, text in samples.items() if text}
    lines |= {path: Text(printable(f"no sample: {why}"), style="red") for path, why in failed.items()}
    if lines:
        yield Text("samples", style="dim")
    names = {path: printable(path.rpartition("/")[2]) for path in lines}
    wide = max(map(len, names.values()), default=0)
    for path, line in lines.items():
        shown = Text.assemble((names[path].ljust(wide), "bold"), "  ", line)
        shown.no_wrap, shown.overflow = True, "ellipsis"
        yield shown


def cost_table(summary: Mapping[str, Any]) -> FittingTable:
    """The result of a simulation without training, by node: work, waiting, bytes sent.

    Args:
        summary: what `write_summary` returned, or summary.json as read.
    """
    wall_s = float(summary["wall_s"] or 0.0)
    head = f"{summary['run']}   {duration(wall_s)} of virtual time   {amount(summary['tokens'])} tokens"
    ranks = {"updates": 0, "refused": 2, "staleness": 1, "tokens/s": 0, "busy": 0, "waits": 3, "up": 0, "down": 0}
    columns = [Column(name, rank=rank) for name, rank in ranks.items()]
    table = FittingTable(printable(head), [Column("node", is_number=False), *columns])
    for path, node in folded(summary["nodes"]):
        is_client = node["kind"] == "client"
        table.add_row(
            _name(path, node["kind"]),
            NOTHING if node["kind"] == "world" else amount(node["accepted"]),
            NOTHING if node["kind"] == "world" else amount(sum(node["refused"].values())),
            _or(node.get("tau_mean"), ".2f"),
            amount(node["tokens"] / wall_s if wall_s else None),
            _or(node["busy_fraction"] if is_client else None, ".1%"),
            _or(1.0 - node["busy_fraction"] if is_client else None, ".1%"),
            f"{amount(node['bytes_up'])}B",
            f"{amount(node['bytes_down'])}B",
        )
    return table


def audit_table(proofs: Sequence[Proof]) -> FittingTable:
    """What an audit trail proves, a line per edge of the tree."""
    table = FittingTable(
        "updates by edge",
        [
            Column("from", is_number=False),
            Column("to", is_number=False),
            Column("applied"),
            Column("again after\na restart", rank=1),
            *map(Column, ("refused", "lost", "twice")),
        ],
    )
    for proof in proofs:
        counts = (len(proof.applied), proof.again, proof.refused, len(proof.lost), len(proof.twice))
        style = "" if proof.holds else "bold red"
        table.add_row(proof.sender, proof.node, *map(str, counts), style=style)
    return table


def folded(nodes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Nodes with every child below its parent, and many siblings of a kind and all nodes below them as one line.

    The line of many nodes is called `PARENT/1,000 clients`. It has the sums of their counts, the means of their other
    values, and the number of nodes in each state.
    """
    children: dict[str, list[str]] = {}
    for path in nodes:
        children.setdefault(path.rpartition("/")[0], []).append(path)

    def below(parent: str) -> Iterator[tuple[str, Any]]:
        paths = children.get(parent, [])
        for kind in KINDS:
            alike = [path for path in paths if nodes[path]["kind"] == kind]
            if len(alike) > MANY:
                yield f"{parent}/{len(alike):,} {kind}s", _together([nodes[path] for path in alike])
                inside = [path for top in alike for path in _under(top, children) if nodes[path]["kind"] == "client"]
                if inside:
                    name = f"{parent}/{len(alike):,} {kind}s/{len(inside):,} clients"
                    yield name, _together([nodes[path] for path in inside])
        crowded = {kind for kind in KINDS if sum(nodes[path]["kind"] == kind for path in paths) > MANY}
        for path in paths:
            if nodes[path]["kind"] not in crowded:
                yield path, nodes[path]
                yield from below(path)

    return list(below(""))


def _under(path: str, children: Mapping[str, list[str]]) -> Iterator[str]:
    waiting = list(children.get(path, []))
    while waiting:
        path = waiting.pop()
        yield path
        waiting.extend(children.get(path, []))


def _together(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line for many nodes. A value is None if no node has it."""
    line: dict[str, Any] = {"kind": nodes[0]["kind"], "refused": {}}
    for name in ("tokens", "accepted", "tokens_per_s", "bytes_up", "bytes_down"):
        line[name] = sum(node.get(name) or 0 for node in nodes)
    for name in ("tau", "tau_mean", "loss", "loss_start", "clients_loss", "busy_fraction"):
        known = [node[name] for node in nodes if node.get(name) is not None]
        line[name] = math.fsum(known) / len(known) if known else None
    for name in ("loss", "loss_start", "clients_loss"):
        line[name.replace("loss", "perplexity")] = None if line[name] is None else perplexity(line[name])
    line["private"] = all(node.get("private") for node in nodes)
    line["tau"] = None if line["tau"] is None else round(line["tau"])
    line["version"] = max(node["version"] for node in nodes)
    line["refused"] = Counter[str]()
    for node in nodes:
        line["refused"].update(node["refused"])
    states = Counter(node.get("state", "") for node in nodes)
    line["state"] = ", ".join(f"{number:,} {state}" for state, number in states.most_common() if state)
    return line


def printable(text: str) -> str:
    r"""The text on one line, with every character that would act on a terminal written as an escape.

    Line ends become spaces, since a model writes many; a bell is `\x07`.
    """
    line = " ".join(text.split("\n"))
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def amount(number: float | None) -> str:
    """A count in five characters or fewer: 950, 12.3k, 4.00M."""
    if number is None:
        return NOTHING
    value, unit, units = float(number), "", iter("kMGTPE")
    if not math.isfinite(value):  # of a diverged model
        return NOTHING
    if value < 999.5:
        return f"{value:.0f}"
    while value >= 999.5:  # From here on three digits would round to 1000.
        value, unit = value / 1000, next(units, "?")
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """A length of time: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _name(path: str, kind: str) -> Text:
    return Text("  " * path.count("/") + printable(path.rpartition("/")[2]), style=_STYLES.get(kind, ""))


def _or(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _perplexity(value: float | None) -> str:
    if value is None:
        return NOTHING
    return amount(value) if value >= 999.5 or math.isnan(value) else f"{value:.{1 if value >= 99.95 else 2}f}"


def _own(node: Mapping[str, Any]) -> str:
    """Perplexity of a node's own model, if it is known and reported. With the version, if that is an older one."""
    return _of_version(node, _perplexity(node["perplexity"]), node["perplexity"])


def _loss(node: Mapping[str, Any]) -> str:
    return _of_version(node, _or(node["loss"], ".3f"), node["loss"])


def _of_version(node: Mapping[str, Any], shown: str, value: float | None) -> str:
    if value is None:
        return PRIVATE if node.get("private") else shown
    version = node.get("loss_version")
    return shown if version is None or version == node["version"] else f"{shown} v{version}"


def budget_line(summary: Mapping[str, Any]) -> str:
    """Tokens that were trained beyond the budget, and why; empty if there are none."""
    budget = summary.get("budget") or {}
    if not budget.get("beyond"):
        return ""
    trained = f"budget {amount(budget['tokens'])} tokens, trained {amount(budget['trained'])}"
    return f"{trained} (rounds under way were finished)"


def _verdicts(node: Mapping[str, Any]) -> str:
    if node["kind"] == "world":
        return NOTHING
    return f"{node['accepted']}/{sum(node['refused'].values())}"
