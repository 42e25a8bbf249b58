"""Members of a world at its border, and invitations that no member has used yet: rows and a table."""

from __future__ import annotations

from typing import Any

from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.keys import spoken
from worldlm_ray.reports.tables import duration
from worldlm_ray.reports.terminal import Column, FittingTable

_DAY_S = 86_400.0
_COLUMNS = (
    Column("member", is_number=False),
    Column("state", is_number=False),
    Column("days"),
    Column("seen"),
    Column("key", is_number=False, rank=1),
    Column("invited by", is_number=False, rank=2),
)


def member_rows(authority: Authority) -> list[dict[str, Any]]:
    """A row for each member, and for each open invitation of a path that is no member.

    Args:
        authority: the world's.

    Returns:
        member: path; state: active, paused, revoked, invited, `to be approved` or expired; days: of its certificate or
        its invitation; seen_s: seconds since it was there; key: fingerprint; invited_by. Null where there is none.
    """
    now_s, seen = authority.clock(), authority.registry.seen()
    waiting = {kept.path: use for kept, use in authority.invitations.waiting()}
    rows: dict[str, dict[str, Any]] = {}
    for path, member in authority.registry.members().items():
        newest = member.keys[-1] if member.keys else None
        over = newest is not None and newest.expires_s <= now_s
        rows[path] = {
            "member": path,
            "state": "expired" if over and member.state == "active" else str(member.state),
            "days": None if newest is None else (newest.expires_s - now_s) / _DAY_S,
            "seen_s": now_s - seen[path] if path in seen else None,
            "key": None if newest is None else newest.fingerprint,
            "invited_by": member.invited_by or None,
        }
    for kept in authority.invitations.all():
        use = waiting.get(kept.path)
        is_open = authority.invitations.use_of(kept.id) is None and now_s < kept.expires_s
        known = rows.get(kept.path)
        if (use is None and not is_open) or (known is not None and known["key"] is not None and use is None):
            continue
        rows[kept.path] = {
            "member": kept.path,
            "state": "invited" if use is None else "to be approved",
            "days": (kept.expires_s - now_s) / _DAY_S,
            "seen_s": None if known is None else known["seen_s"],
            "key": None if use is None else use.fingerprint,
            "invited_by": kept.by or None,
        }
    return [rows[path] for path in sorted(rows)]


def members_table(authority: Authority, rows: list[dict[str, Any]]) -> FittingTable:
    """What `member_rows` gives, as a table."""
    identity = authority.identity
    caption = f"{identity.url}   issuing key good for {max(identity.issuing_days(), 0):.0f} days"
    table = FittingTable(f"members of {identity.name}, world {identity.world[:16]}", _COLUMNS, caption=caption)
    for row in rows:
        table.add_row(
            row["member"],
            row["state"],
            "-" if row["days"] is None else f"{row['days']:.1f}",
            "-" if row["seen_s"] is None else f"{duration(row['seen_s'])} ago",
            "-" if row["key"] is None else spoken(row["key"]),
            row["invited_by"] or "-",
        )
    if not rows:
        table.add_row("none yet", *["-"] * (len(_COLUMNS) - 1))
    return table
