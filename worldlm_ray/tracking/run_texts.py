"""What TensorBoard's TEXT page says of a run, as Markdown: its configuration and its tree.

Samples of the clients' models are added at the end of the run (worldlm_ray/tracking/drawing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from worldlm_ray.config.loading import to_yaml
from worldlm_ray.config.schema import NodeSettings
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec

MAX_ROWS = 200
"""Nodes in the table of the tree."""
MAX_CONFIGURATION = 50_000
"""Characters of the configuration."""
MAX_VALUE = 80
"""Characters of one setting in the table of the tree."""


def introduction(plan: Plan) -> dict[str, str]:
    """Markdown by tag, in the order of the page."""
    return {"1 configuration": _configuration(plan), "2 tree": _tree(plan)}


def _configuration(plan: Plan) -> str:
    text = to_yaml(plan.config)
    if len(text) > MAX_CONFIGURATION:
        left_out = len(text) - MAX_CONFIGURATION
        text = f"{text[:MAX_CONFIGURATION]}\n# {left_out:,} more characters are in config.yaml of the run folder\n"
    return quoted(text)


def quoted(text: str) -> str:
    """A text that Markdown shows verbatim. It is indented, since it could contain the end of a fence."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _tree(plan: Plan) -> str:
    """A table: every node, its kind, and the settings in which it differs from its parent."""
    nodes = list(plan.root.walk())
    lines = [
        "The world's settings are those that differ from the defaults; any other node's, those that differ from "
        "its parent's.",
        "",
        "| node | kind | settings |",
        "|---|---|---|",
    ]
    parents = {child.path: node for node in nodes for child in node.children}
    for node in nodes[:MAX_ROWS]:
        above = parents[node.path].settings if node.path in parents else NodeSettings()
        indent = "&nbsp;&nbsp;&nbsp;&nbsp;" * node.path.count("/")
        lines.append(f"| {indent}{cell(node.name)} | {_kind(node)} | {', '.join(_differences(node.settings, above))} |")
    if len(nodes) > MAX_ROWS:
        clients = sum(node.kind == "client" for node in nodes[MAX_ROWS:])
        lines += ["", f"{len(nodes) - MAX_ROWS:,} more nodes, {clients:,} of them clients, are not listed."]
    return "\n".join(lines) + "\n"


def _kind(node: NodeSpec) -> str:
    if node.remote:
        return "remote"
    return node.kind if node.kind == "client" else f"{node.kind} of {len(node.clients):,} clients"


def _differences(settings: NodeSettings, above: NodeSettings) -> Iterator[str]:
    base = dict(_flat(asdict(above)))
    for key, value in _flat(asdict(settings)):
        if base.get(key) != value:
            yield f"`{key}: {cell(_short(value))}`"


def _flat(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(text):,} characters)"


def cell(text: str) -> str:
    """A text on one line of a Markdown table: nothing in it ends the cell, the line, or a quotation."""
    return " ".join(text.split()).replace("|", "&#124;").replace("`", "'").replace("<", "&lt;")
