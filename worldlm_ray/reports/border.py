"""What `worldlm status` says of the borders of a run: a line for each node in another cluster, and advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from worldlm_ray.gateway.advice import LinkFacts, advice
from worldlm_ray.reports.tables import amount, duration


def border_lines(snapshot: Mapping[str, Any]) -> Iterator[str]:
    """What has crossed each border, and what would keep clients behind it busy.

    Args:
        snapshot: status.json as read.
    """
    for path, node in snapshot["nodes"].items():
        if border := node.get("border"):
            yield f"{path}: {_crossed(border)}"
            if facts := link_facts(border):
                yield f"{path}: {advice(facts)}"


def link_facts(
    border: Mapping[str, Any], *, mbit_up: float | None = None, mbit_down: float | None = None
) -> LinkFacts | None:
    """What is known of a line; None before two updates and a model have crossed it.

    A member that does not train during an exchange trains between two updates for as long as no exchange takes.

    Args:
        border: of a node, from status.json.
        mbit_up: speed as measured otherwise.
        mbit_down: the same.
    """
    up, down, every_s = mbit_up or border["mbit_up"], mbit_down or border["mbit_down"], border["every_s"]
    if not (up and down and every_s):
        return None
    seen = {"parameters": border["parameters"], "codec": border["codec"], "overlap": border["overlap"]}
    facts = LinkFacts(**seen, mbit_up=up, mbit_down=down, round_s=every_s)
    rest_s = every_s - facts.up_s - facts.down_s
    if facts.overlap or rest_s <= 0.0:
        return facts
    return LinkFacts(**seen, mbit_up=up, mbit_down=down, round_s=rest_s)


def _crossed(border: Mapping[str, Any]) -> str:
    said = [_way(border, "up"), _way(border, "down")]
    refused, offline_s, days = border["refused"], border["offline_s"], border["certificate_days"]
    said.append(f"{border['accepted']} accepted")
    if refused:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items()))
        said.append(f"{sum(refused.values())} refused ({reasons})")
    if border["resumed"]:
        said.append(f"{border['resumed']} parts sent again")
    if days is not None:
        said.append(f"certificate {days:.0f} days")
    said.append(f"offline for {duration(offline_s)}" if offline_s else "there")
    return ", ".join(said)


def _way(border: Mapping[str, Any], way: str) -> str:
    speed = border[f"mbit_{way}"]
    return f"{amount(border[f'bytes_{way}'])}B {way}" + (f" at {speed:,.1f} Mbit/s" if speed else "")
