"""What a checkpoint holds of an inner node: one mapping and some buffers for each of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from worldlm_ray.errors import CheckpointError
from worldlm_ray.tensors.buffers import Flat

if TYPE_CHECKING:
    from worldlm_ray.aggregation.node import Node


def state(node: Node) -> tuple[dict[str, Any], dict[str, Flat]]:
    """See Node.state."""
    meta: dict[str, Any] = {"layout": node.layout.hash, "optimizer_steps": node.optimizer.steps}
    meta["children"], meta["budget"] = node.children.state(), node.budget.state()
    meta["contributions"] = node.privacy.state()
    arrays = {f"optimizer.{name}": values for name, values in node.optimizer.buffers.items()}
    parts: dict[str, Any] = {"published": node.published, "intake": node.intake, "residuals": node.residuals}
    if node.parent is not None:
        parts["parent"] = node.parent
    for name, part in parts.items():
        meta[name], found = part.state()
        arrays |= found
    return meta, arrays


def changes(name: str) -> bool:
    """Whether a buffer of the state changes in place with the next event."""
    if name == "fold.first" or name.startswith("fold.kept."):  # updates as they came
        return False
    return name in ("codec_error", "sums.total") or name.startswith(("fold.", "optimizer."))


def restore(node: Node, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
    """See Node.restore."""
    if meta["layout"] != node.layout.hash:
        of = "another model or another choice of key layers"
        raise CheckpointError(f"{node.path}: the checkpoint is of {of}; set what has changed back")
    node.privacy.check(meta["contributions"])
    node.published.restore(meta["published"], arrays)
    node.budget.restore(meta["budget"])
    # A private sum takes only those that the plan knows: of others nothing says how they are to be clipped.
    node.children.restore(meta["children"], known_only=node.privacy.privacy is not None)
    # Its backend has written the time down.
    node.now_s = max(node.now_s, node.budget.began_s or 0.0, meta.get("now_s", 0.0))
    node.ended = False
    node.serving.clear()
    # The budget may be larger than it was: a federation hears from its parent, the world counts again.
    if node.rules.budget.tokens is not None and node.parent is None:
        node.budget.spend(tokens=node.published.tokens, started_tokens=node.started_tokens, now_s=0.0)
    node.optimizer.steps = meta["optimizer_steps"]
    for name in node.optimizer.buffers:
        node.optimizer.buffers[name] = np.array(arrays[f"optimizer.{name}"])
    node.residuals.restore(meta["residuals"], arrays)
    node.intake.restore(meta["intake"], arrays)
    if node.parent is not None:
        node.parent.restore(meta["parent"], arrays)
