"""Commands that look at a configuration or a run: show, presets, audit, privacy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldlm_ray.cli.common import Conf, Json, Overrides, Run, console, load, print_json, warn
from worldlm_ray.config import loading

if TYPE_CHECKING:
    from worldlm_ray.reports.receipts import Border

PerGb = Annotated[
    float | None, typer.Option("--per-gb", min=0.0, help="price of a GB between places: adds up what moves")
]
ReceiptFiles = Annotated[
    list[Path] | None,
    typer.Option("--receipts", metavar="FILE", help="of the other side of the border; may be repeated"),
]


def show(conf: Conf, overrides: Overrides = None, as_json: Json = False, per_gb: PerGb = None) -> None:
    """Show the tree, sizes, memory and privacy of a configuration."""
    from worldlm_ray.plan.plan import make_plan
    from worldlm_ray.reports.describe import crossing_table, describe, left_out, misfits, tables

    plan = make_plan(load(conf, overrides or [], None))
    facts = describe(plan)
    if as_json:
        print_json(facts)
        return
    for table in tables(facts):
        console.print(table)
    if facts["crossings"]:
        console.print(crossing_table(facts, per_gb=per_gb))
    elif per_gb is not None:
        console.print("nothing moves between places: no node sets its own placement.labels")
    for line in [*misfits(facts), *left_out(plan)]:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    from worldlm_ray.reports.spending import planned, planned_table, private_clients, weak_deltas

    if private_clients(plan):
        with console.status("reading the private clients' texts"):
            rows = planned(plan)
        console.print(planned_table(rows))
        warn(weak_deltas(plan, rows))


def presets(as_json: Json = False) -> None:
    """List the configurations that ship with the package."""
    files = loading.presets()
    said = {name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, path in files.items()}
    if as_json:
        print_json([{"name": name, "what": said[name], "file": str(path)} for name, path in files.items()])
        return
    width = max(map(len, said))
    for name, what in said.items():
        console.print(f"{name:{width}} {what}", highlight=False, soft_wrap=not console.is_terminal)


def privacy(run: Run, as_json: Json = False) -> None:
    """Print the privacy spent by a run, and check it.

    Ledgers are compared with the audit trail: every accepted update must be paid for.
    """
    from worldlm_ray.plan import rundir
    from worldlm_ray.reports import trail
    from worldlm_ray.reports.spending import statement_table, statements, unpaid, weak_deltas

    plan = rundir.reopen(run, check_data=False)
    rows, missing = statements(plan), unpaid(plan)
    if rows and (found := trail.look(plan.run_dir)).damage:
        missing.append(f"not known, since {found.conclusion(plan.run_dir)}")
    if as_json:
        print_json({"ledgers": [vars(row) for row in rows], "unpaid": missing})
    elif not rows:
        console.print("nothing was spent: no client of this run trains with differential privacy, or none has begun")
    else:
        console.print(statement_table(rows))
        console.print(
            "every accepted update was paid for" if not missing else "NOT PAID FOR: " + "; ".join(missing),
            highlight=False,
        )
    warn(weak_deltas(plan, rows))
    if missing:
        raise typer.Exit(1)


def audit(run: Run, receipts: ReceiptFiles = None, as_json: Json = False) -> None:
    """Prove from the audit trail that no update was lost.

    Edge by edge: no accepted update was lost, and none was applied twice. With --receipts, the same of a border: by the
    files RUN/receipts/sent/... of members at their world, and by RUN/receipts/received/... of the world at a member.
    """
    from worldlm_ray.plan import rundir
    from worldlm_ray.reports import trail
    from worldlm_ray.reports.tables import audit_table

    folder = rundir.find(run)
    found = trail.look(folder)
    border = _border(folder, receipts or [])
    if as_json:
        edges = [vars(proof) for proof in found.proofs]
        values: dict[str, Any] = {
            "edges": edges,
            "holds": found.holds,
            "damage": found.damage,
            "torn_lines": found.torn,
        }
        if border is not None:
            proofs = [asdict(proof) | {"holds": proof.holds} for proof in border.proofs]
            findings = [asdict(each) for each in border.findings]
            values["receipts"] = {"members": proofs, "findings": findings, "holds": border.holds}
        print_json(values)
    else:
        console.print(audit_table(found.proofs))
        console.print(found.conclusion(folder), highlight=False, soft_wrap=True)
        if border is not None:
            from worldlm_ray.reports.receipts import table

            console.print(table(border))
            for line in border.lines():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found.holds is False or (border is not None and not border.holds):
        raise typer.Exit(1)


def _border(folder: Path, files: list[Path]) -> Border | None:
    """What receipts prove; None where none are given."""
    if not files:
        return None
    from worldlm_ray.cli.gateway import need

    need("cryptography")
    from worldlm_ray.reports import receipts

    return receipts.look(folder, files)
