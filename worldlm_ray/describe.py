"""What a configuration means before anything runs: the tree, the parameters, what is sent, what is held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from worldlm_ray.aggregation.server_optimizer import state_buffers
from worldlm_ray.data import describe as describe_data
from worldlm_ray.plan import Plan
from worldlm_ray.report import amount
from worldlm_ray.tree import NodeSpec

CLIENT_BUFFERS = 5
"""Flat buffers of a client: parameters, gradient, two AdamW moments, the round's base."""


def describe(plan: Plan) -> dict[str, Any]:
    """The facts, ready for JSON. Sizes are bytes; activations of training are not counted."""
    layout, shape = plan.layout, plan.shape
    return {
        "name": plan.config.name,
        "method": plan.config.method,
        "budget": {k: v for k, v in vars(plan.config.budget).items() if v is not None},
        "model": {
            "preset": plan.config.model.preset,
            **{name: getattr(shape, name) for name in ("hidden_size", "layers", "heads", "context", "vocab_size")},
            "parameters": layout.size,
            "backbone_parameters": layout.backbone_size,
            "key_parameters": layout.key_size,
            "key_layers": {layer.name: layer.stop - layer.start for layer in layout.key_layers},
            "layout_hash": layout.hash,
        },
        "bytes_per_push": layout.nbytes,
        "nodes": {spec.path: _node(plan, spec) for spec in plan.root.walk()},
    }


def _node(plan: Plan, spec: NodeSpec) -> dict[str, Any]:
    settings, size = spec.settings, plan.layout.nbytes
    if spec.kind == "client":
        training = settings.training
        return {
            "kind": spec.kind,
            "data": describe_data(settings.data),
            "tokens_per_round": plan.round_tokens(spec),
            "local_steps": training.local_steps,
            "lr": training.lr,
            "memory_bytes": (CLIENT_BUFFERS + (settings.merge.client == "adaptive")) * size,
        }
    rules = settings.aggregation
    # The published model, the fold, and for a federation the anchor that the next push is measured from.
    buffers = (2 if spec.kind == "world" else 3) * size
    if spec.kind == "federation" and settings.merge.federation == "adaptive":
        buffers += size  # what the parent said last
    buffers += 4 * plan.layout.backbone_size * len(state_buffers(rules.server_optimizer))
    return {
        "kind": spec.kind,
        "trigger": rules.trigger,
        "buffer_size": rules.buffer_size,
        "staleness": rules.staleness.fn,
        "score": rules.attention.score,
        "server_optimizer": rules.server_optimizer.name,
        "memory_bytes": buffers,
    }


def tables(facts: Mapping[str, Any]) -> Iterator[Table]:
    """The facts as tables for the terminal."""
    model = facts["model"]
    split = Table(title=f"{facts['name']}: {facts['method']}, budget {_budget(facts['budget'])}", title_justify="left")
    split.add_column("parameters")
    split.add_column("number", justify="right")
    split.add_column("share", justify="right")
    rows = {"backbone": model["backbone_parameters"]}
    rows |= {f"key layer {name}": count for name, count in model["key_layers"].items()}
    for name, number in rows.items():
        split.add_row(name, f"{number:,}", f"{number / model['parameters']:.1%}")
    split.add_row("all", f"{model['parameters']:,}", "100.0%")
    shape = ", ".join(f"{name} {model[name]}" for name in ("hidden_size", "layers", "heads", "context", "vocab_size"))
    split.caption = f"preset {model['preset']}: {shape}; a push or a pull is {amount(facts['bytes_per_push'])}B"
    yield split
    tree = Table(title="the tree", title_justify="left")
    for name in ("node", "kind", "what it does", "memory"):
        tree.add_column(name, justify="right" if name == "memory" else "left")
    for path, node in facts["nodes"].items():
        indent = "  " * path.count("/") + path.rsplit("/", 1)[-1]
        tree.add_row(indent, node["kind"], _what(node), f"{amount(node['memory_bytes'])}B")
    tree.caption = "memory: parameter-sized buffers, without activations and the interpreter"
    yield tree


def _budget(budget: Mapping[str, Any]) -> str:
    [(name, value)] = budget.items()
    return f"{value:,} {name}"


def _what(node: Mapping[str, Any]) -> str:
    if node["kind"] == "client":
        return (
            f"{node['data']}; {node['local_steps']} steps ({amount(node['tokens_per_round'])} tokens) a round, "
            f"lr {node['lr']:g}"
        )
    when = f"every {node['buffer_size']} updates" if node["trigger"] == "goal_achieved" else node["trigger"]
    return f"{when}; {node['staleness']} staleness; {node['score']} attention; {node['server_optimizer']}"
