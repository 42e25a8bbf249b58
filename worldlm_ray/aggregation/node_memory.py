"""Memory of an inner node: the buffers that `Node`, its fold and its optimizer hold at the same time.

The one place that knows them: `worldlm show` and `examples/size_a_world.py` ask here.
"""

from __future__ import annotations

from worldlm_ray.aggregation.rules import rule_of
from worldlm_ray.aggregation.server_optimizer import state_buffers
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.exchange.compression import loses

WORLD_MODELS = 2
"""Models that the world holds: the published one and the fold."""
FEDERATION_MODELS = 5
"""Models of a federation in an exchange: those two, the anchor, the update in flight, and the merged model."""


def node_bytes(
    rules: AggregationConfig,
    *,
    backbone: int,
    keys: int,
    children: int,
    is_world: bool,
    codec: str = "fp32",
) -> int:
    """Bytes of the buffers that an inner node holds at most.

    Args:
        rules: its aggregation rules.
        backbone: elements of the backbone.
        keys: elements of all key layers.
        children: children of the node.
        is_world: whether the node has no parent.
        codec: how its updates travel; a codec that rounds makes it keep the error.
    """
    model, backbone_bytes = 4 * (backbone + keys), 4 * backbone
    found = (WORLD_MODELS if is_world else FEDERATION_MODELS) * model
    found += backbone_bytes * (not is_world and loses(codec))
    found += backbone_bytes * len(state_buffers(rules.server_optimizer))
    found += model * rule_of(rules).models_held(rules, children)
    return found
