"""One federation in one page: what a node does with its children's updates, written to be read.

The package folds updates as they arrive into one flat buffer and never holds two of them; here everything is
a dictionary of small tensors and every formula stands as in the papers. At the end both are given the same
updates and must agree. Needs neither Ray nor text.
"""

from __future__ import annotations

import math

import numpy as np

from worldlm_ray.aggregation.events import Push
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.config.federated import AggregationConfig, MergeConfig, StalenessConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.exchange.messages import Update, pack
from worldlm_ray.tensors.layout import make_layout

SHAPES = [("backbone.weight", (4, 3)), ("head.weight", (2, 4))]  # the head is the key layer
TEMPERATURE, STALENESS_EXPONENT = 0.1, 0.5

Tensors = dict[str, np.ndarray]


def staleness(tau: int) -> float:
    """s(tau) = (tau + 1)^-a: an update counts less the more versions it missed (FedAsync, FedBuff)."""
    return (tau + 1) ** -STALENESS_EXPONENT


def average_backbone(own: Tensors, updates: list[dict]) -> np.ndarray:
    """theta + sum_i tokens_i s(tau_i) delta_i / sum_i tokens_i: stale updates shorten the step."""
    total = sum(update["tokens"] for update in updates)
    step = sum(update["tokens"] * staleness(update["tau"]) * update["backbone.weight"] for update in updates)
    return own["backbone.weight"] + step / total


def cosine(own: np.ndarray, other: np.ndarray, initial: np.ndarray) -> float:
    """How alike two key layers have moved since the run began."""
    a, b = (own - initial).ravel(), (other - initial).ravel()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def attend_to_keys(own: Tensors, updates: list[dict], initial: Tensors) -> tuple[np.ndarray, list[float]]:
    """softmax_i(cosine_i / temperature + log tokens_i + log s(tau_i)): likeness, data size and age in one."""
    logits = [
        cosine(own["head.weight"], own["head.weight"] + update["head.weight"], initial["head.weight"]) / TEMPERATURE
        + math.log(update["tokens"])
        + math.log(staleness(update["tau"]))
        for update in updates
    ]
    weights = np.exp(np.array(logits) - max(logits))
    weights /= weights.sum()
    change = sum(weight * update["head.weight"] for weight, update in zip(weights, updates, strict=True))
    return own["head.weight"] + change, [float(weight) for weight in weights]


def main() -> None:
    """Aggregate three updates both ways and compare."""
    rng = np.random.default_rng(0)
    initial = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES}
    own = {name: value + rng.normal(size=value.shape).astype(np.float32) for name, value in initial.items()}
    updates = [
        {
            "tokens": tokens,
            "tau": tau,
            "backbone.weight": rng.normal(size=(4, 3)).astype(np.float32),
            "head.weight": scale * rng.normal(size=(2, 4)).astype(np.float32),
        }
        for tokens, tau, scale in [(1000, 0, 0.2), (3000, 1, 0.5), (2000, 3, 2.0)]
    ]
    backbone = average_backbone(own, updates)
    head, weights = attend_to_keys(own, updates, initial)

    # The same through the package. The node is made to be at version 3, with `own` as its model.
    layout = make_layout(SHAPES, ["head.*"], layers=1)
    flat = np.concatenate([initial[name].ravel() for name, _ in SHAPES])
    staleness = StalenessConfig(fn="polynomial")
    rules = NodeRules(
        aggregation=AggregationConfig(buffer_size=3, staleness=staleness),
        merge=MergeConfig(),
        budget=BudgetConfig(rounds=1),
    )
    node = Node(NodePlace(path="world", children=("a", "b", "c"), has_parent=False), rules, layout, flat)
    meta, arrays = node.state()
    meta["published"]["version"] = 3
    node.restore(meta, arrays | {"theta": np.concatenate([own[name].ravel() for name, _ in SHAPES])})
    for name, update in zip("abc", updates, strict=True):
        message = Update(
            sender=name,
            seq=1,
            base_version=3 - update["tau"],
            tokens=update["tokens"],
            started_tokens=update["tokens"],
            values=np.concatenate([update[key].ravel() for key, _ in SHAPES]),
        )
        node.handle(Push(sender=name, packed=pack(message, layout), now_s=0.0))
    fast = layout.views(node.theta)

    print("attention weights of the three children:", "  ".join(f"{weight:.3f}" for weight in weights))
    print(f"largest difference, backbone:  {np.abs(fast['backbone.weight'] - backbone).max():.1e}")
    print(f"largest difference, key layer: {np.abs(fast['head.weight'] - head).max():.1e}")
    np.testing.assert_allclose(fast["backbone.weight"], backbone, atol=1e-5)
    np.testing.assert_allclose(fast["head.weight"], head, atol=1e-5)


if __name__ == "__main__":
    main()
