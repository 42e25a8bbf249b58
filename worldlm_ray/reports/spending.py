"""`worldlm privacy`, and the privacy part of `worldlm show`: what ledgers say, and what a plan will spend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worldlm_ray.data import prepare
from worldlm_ray.plan import build
from worldlm_ray.plan.accounts import open_account
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import ledger_folder, weak_delta
from worldlm_ray.privacy.accounting import Spend, epsilon, rounds_left
from worldlm_ray.privacy.gaussian import composed_epsilon, most_contributions
from worldlm_ray.privacy.ledger import Ledger
from worldlm_ray.reports.tables import NOTHING
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.tracking import audit


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The ledger of one text."""

    ledger: str
    unit: str
    nodes: tuple[str, ...]
    """Clients that were charged."""
    noises: tuple[float, ...]
    rate: float
    charges: int
    steps: int
    delta: float
    epsilon: float
    target_epsilon: float | None
    rounds_left: int | None
    """Further rounds that the budget allows, if they are like the last one."""
    then: str = "stop"
    """What its clients do when that is 0: stop, or pause."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a private client will spend if the run goes as planned."""

    node: str
    records: int | None
    """Sequences of its text; None if whole updates are protected."""
    rate: float
    noise: float
    rounds: int | None
    epsilon: float | None
    """Epsilon at the end, with the part that is spent already. None if the run's budget does not fix the rounds."""
    target_epsilon: float | None


def private_clients(plan: Plan) -> list[NodeSpec]:
    """The private clients, of either unit."""
    return [spec for spec in plan.root.clients if spec.settings.privacy.unit != "none"]


def planned(plan: Plan) -> list[Planned]:
    """The planned epsilon of every private client. Reads their texts.

    Raises:
        DataError: a text is not on this machine, or damaged.
        PrivacyError: a budget holds no round.
    """
    found = []
    for node in plan.root.inner:
        contributions = build.contributions(plan, node)
        for name, path in contributions.paths.items() if contributions is not None else ():
            assert contributions is not None
            rounds, privacy = plan.planned_rounds(plan.node(path)), node.settings.privacy
            before, most = contributions.noises()[name], contributions.limits().get(name)
            limits = [n for n in (rounds, None if most is None else most - len(before)) if n is not None]
            noises = [*before, *[contributions.noise] * min(limits)] if limits else None
            found.append(
                Planned(
                    node=path,
                    records=None,
                    rate=1.0,
                    noise=contributions.noise,
                    rounds=min(limits, default=None),
                    epsilon=None if noises is None else composed_epsilon(noises, delta=privacy.delta),
                    target_epsilon=privacy.target_epsilon,
                )
            )
    for spec in private_clients(plan):
        if spec.settings.privacy.unit != "record":
            continue
        dataset = prepare(spec.settings.data, context=plan.shape.context, key=f"{spec.key}.data", order=spec.path)
        account = open_account(plan, spec, dataset)
        assert account is not None
        rounds = plan.planned_rounds(spec)
        found.append(
            Planned(
                node=spec.path,
                records=dataset.records(context=plan.shape.context),
                rate=account.rate,
                noise=account.noise,
                rounds=rounds,
                epsilon=None if rounds is None else account.epsilon(rounds=rounds),
                target_epsilon=spec.settings.privacy.target_epsilon,
            )
        )
    return found


def weak_deltas(plan: Plan, rows: Sequence[Planned | Statement]) -> list[str]:
    """A line for every client whose delta is at least 1 / records, or 1 / clients: such a delta promises nothing."""
    found = {}
    for row in rows:
        for path in [row.node] if isinstance(row, Planned) else row.nodes:
            spec = plan.specs.get(path)
            if spec is None or spec.settings.privacy.unit != "record":
                continue
            records = row.records if isinstance(row, Planned) else round(spec.settings.training.batch_size / row.rate)
            found[path] = weak_delta(spec.settings.privacy, records)
    return [*plan.warnings, *(f"{path}: {text}" for path, text in found.items() if text)]


def statements(plan: Plan) -> list[Statement]:
    """Every ledger of a run, read from disk.

    Raises:
        PrivacyError: one was changed after it was written.
    """
    folders = {ledger_folder(spec.settings.privacy, plan.run_dir) for spec in private_clients(plan)}
    files = sorted(path for folder in folders for path in folder.glob("*.jsonl"))
    found = [_statement(path, Ledger.at(path).entries()) for path in files]
    pausing = {c.path for c in private_clients(plan) if c.settings.privacy.on_exhausted == "pause"}
    return [replace(row, then="pause") if pausing & set(row.nodes) else row for row in found]


def _statement(path: Path, entries: Sequence[dict[str, Any]]) -> Statement:
    last = entries[-1]
    history = [Spend(entry["noise"], entry["rate"], entry["steps"]) for entry in entries]
    delta, accountant, target = last["delta"], last["accountant"], last["target_epsilon"]
    if last["unit"] == "client":
        return _client_level(path, entries)
    return Statement(
        ledger=path.name,
        unit=last["unit"],
        nodes=tuple(dict.fromkeys(entry["node"] for entry in entries)),
        noises=tuple(dict.fromkeys(entry["noise"] for entry in entries)),
        rate=last["rate"],
        charges=len(entries),
        steps=sum(entry["steps"] for entry in entries),
        delta=delta,
        epsilon=epsilon(history, delta=delta, accountant=accountant),
        target_epsilon=target,
        rounds_left=None
        if target is None
        else rounds_left(
            history,
            noise=last["noise"],
            rate=last["rate"],
            per_round=last["steps"],
            target_epsilon=target,
            delta=delta,
            accountant=accountant,
        ),
    )


def _client_level(path: Path, entries: Sequence[dict[str, Any]]) -> Statement:
    last = entries[-1]
    noise, delta, target, count = last["noise"], last["delta"], last["target_epsilon"], len(entries)
    noises = [float(entry["noise"]) for entry in entries]
    left = None if target is None else most_contributions(noise, target_epsilon=target, delta=delta, before=noises)
    return Statement(
        ledger=path.name,
        unit=last["unit"],
        nodes=tuple(dict.fromkeys(entry["node"] for entry in entries)),
        noises=tuple(dict.fromkeys(entry["noise"] for entry in entries)),
        rate=last["rate"],
        charges=count,
        steps=count,
        delta=delta,
        epsilon=composed_epsilon(noises, delta=delta),
        target_epsilon=target,
        rounds_left=left,
    )


def unpaid(plan: Plan) -> list[str]:
    """Private clients with more accepted updates in the audit trail than charges in their ledgers."""
    clients = {spec.path for spec in private_clients(plan)}
    accepted: Counter[str] = Counter()
    for proof in audit.proofs(plan.run_dir):
        client = f"{proof.node}/{proof.sender}"
        accepted[client] = len(proof.applied) + len(proof.lost)
        if client in clients and plan.node(client).settings.privacy.unit == "client":
            accepted[client] += (
                proof.again
            )  # an aggregator that accepts an update again draws new noise, and charges for it
    charges: Counter[str] = Counter()
    for folder in {ledger_folder(spec.settings.privacy, plan.run_dir) for spec in private_clients(plan)}:
        for path in folder.glob("*.jsonl"):
            charges.update(e["node"] for e in Ledger.at(path).entries() if e["run"] == plan.config.name)
    return [
        f"{path}: {accepted[path]} updates were accepted, {charges[path]} rounds were paid for"
        for path in sorted(clients)
        if accepted[path] > charges[path]
    ]


def planned_table(rows: Sequence[Planned]) -> FittingTable:
    """What will be spent, for the terminal."""
    table = FittingTable(
        "privacy: what the plan will spend",
        [Column("client", is_number=False), *map(Column, ("records", "rate", "noise", "rounds", "epsilon", "budget"))],
        caption="a record is one sequence; rate: chance of a record to be in a step; noise in clipping norms",
    )
    for row in rows:
        table.add_row(
            row.node.removeprefix("world/"),
            NOTHING if row.records is None else f"{row.records:,}",
            f"{row.rate:.2g}",
            f"{row.noise:.3f}",
            NOTHING if row.rounds is None else str(row.rounds),
            NOTHING if row.epsilon is None else f"{row.epsilon:.3f}",
            NOTHING if row.target_epsilon is None else f"{row.target_epsilon:g}",
        )
    return table


def statement_table(rows: Sequence[Statement]) -> FittingTable:
    """What was spent, for the terminal."""
    deltas = ", ".join(f"{delta:g}" for delta in dict.fromkeys(row.delta for row in rows))
    caption = (
        f"epsilon at delta {deltas}; paid and more: rounds, or updates of a client; then: at the end of the budget"
    )
    table = FittingTable(
        "privacy: what was spent",
        [
            Column("paid by", is_number=False),
            Column("unit", rank=3),
            Column("noise", rank=4),
            Column("paid", rank=2),
            Column("epsilon"),
            Column("budget"),
            Column("left"),
            Column("more"),
            Column("then", rank=1),
        ],
        caption=caption if rows else "",
    )
    for row in rows:
        target = row.target_epsilon
        table.add_row(
            "\n".join(node.removeprefix("world/") for node in row.nodes),
            row.unit,
            ", ".join(f"{noise:.3f}" for noise in row.noises),
            str(row.charges),
            f"{row.epsilon:.4f}",
            NOTHING if target is None else f"{target:g}",
            NOTHING if target is None else f"{target - row.epsilon:.4f}",
            NOTHING if row.rounds_left is None else str(row.rounds_left),
            NOTHING if row.rounds_left is None else row.then + (" (now)" if row.rounds_left == 0 else ""),
        )
    return table
