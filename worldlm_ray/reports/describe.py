"""What a configuration means, before a run: its tree, its parameters, bytes sent, bytes of memory."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from worldlm_ray.aggregation.node_memory import node_bytes
from worldlm_ray.data import describe as describe_data
from worldlm_ray.data.text import find_sources
from worldlm_ray.exchange.compression import loses, nbytes
from worldlm_ray.model.expert_names import EXPERTS
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.reports.tables import amount
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.training.deepspeed_config import is_zero, worker_bytes

TRAINING_BUFFERS = 4
"""Flat buffers of what a client trains: parameters, gradient, two AdamW moments. It also holds the base of its round.
One that can also train its parent's model beside its own has them twice."""
MEASURING_BUFFERS = 2
"""Those of the module in which a client of a smaller rank measures models of the world's rank."""
ZERO_CLIENT_BUFFERS = 3
"""Those of a client whose workers hold the model: the base of the round, the update, the last known parameters."""


def describe(plan: Plan) -> dict[str, Any]:
    """The facts, ready for JSON. Sizes are bytes; activations of training are not counted.

    Of siblings that are copies, only the first is listed, with their number as `copies`.
    """
    layout, shape = plan.layout, plan.shape
    return {
        "name": plan.config.name,
        "method": plan.config.method,
        "budget": {k: v for k, v in vars(plan.config.budget).items() if v is not None},
        "model": {
            "preset": plan.config.model.preset if plan.base is None else None,
            **_base(plan),
            "tokenizer": plan.tokenizer,
            **{name: getattr(shape, name) for name in ("hidden_size", "layers", "heads", "context", "vocab_size")},
            "parameters": layout.size,
            **_frozen(plan),
            "backbone_parameters": layout.backbone_size,
            "key_parameters": layout.key_size,
            "key_layers": {layer.name: layer.stop - layer.start for layer in layout.key_layers},
            "layout_hash": layout.hash,
        },
        "bytes_per_pull": layout.nbytes,
        "nodes": dict(_nodes(plan, plan.root)),
        "crossings": crossings(plan),
    }


def _base(plan: Plan) -> dict[str, Any]:
    """The facts about the model that a run begins from."""
    if plan.base is None:
        return {}
    folder = plan.config.model.initial_from
    return {"initial_from": folder, "longest": plan.base.max_positions, "was_tied": plan.base.tied}


def _frozen(plan: Plan) -> dict[str, Any]:
    """The facts about a pre-trained model of which a part is trained."""
    shape = plan.shape
    if not isinstance(shape, PretrainedShape):
        return {}
    trainable = shape.trainable if isinstance(shape.trainable, str) else list(shape.trainable)
    return {"model_type": shape.model_type, "trainable": trainable, "frozen_parameters": shape.frozen}


def _origin(model: Mapping[str, Any]) -> str:
    """Where shape and weights come from, and how the model differs from the one that the run begins from."""
    if "initial_from" not in model:
        return f"preset {model['preset']}"
    is_apart = model["was_tied"] and "model_type" not in model
    apart = ", embedding and head trained apart though they were one tensor there" if is_apart else ""
    return f"from {model['initial_from']} (sequences of at most {model['longest']:,} tokens there{apart})"


def _nodes(plan: Plan, spec: NodeSpec, copies: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    yield spec.path, _node(plan, spec) | ({"copies": copies} if copies > 1 else {})
    for first, number in alike(spec.children):
        yield from _nodes(plan, first, number)


def alike(children: Sequence[NodeSpec]) -> list[tuple[NodeSpec, int]]:
    """Siblings without their copies: the first of each kind, and the number of alike ones."""
    numbers = Counter(child.key for child in children)
    firsts = {child.key: child for child in reversed(children)}
    return [(firsts[key], number) for key, number in numbers.items()]


def crossings(plan: Plan) -> list[dict[str, Any]]:
    """Edges whose ends are placed differently, and the bytes that cross each in a whole run.

    The number of exchanges assumes a budget that is spent evenly. For a federation it is an upper limit, since one
    exchange at a time is under way. It is None if the budget is in seconds. Of edges that are copies, only the first
    is listed, with the exchanges and bytes of all.
    """
    found = []
    numbers = Counter(spec.key for spec in plan.root.walk())
    for parent in (spec for spec in plan.root.one_of_each() if spec.kind != "client"):
        for child, _ in alike(parent.children):
            if child.settings.placement.labels == parent.settings.placement.labels:
                continue
            copies, exchanges = numbers[child.key], _exchanges(plan, child)
            exchanges = None if exchanges is None else exchanges * copies
            found.append(
                {
                    "node": child.path,
                    **({"copies": copies} if copies > 1 else {}),
                    "from": dict(child.settings.placement.labels),
                    "to": dict(parent.settings.placement.labels),
                    "exchanges": exchanges,
                    "bytes_up": None if exchanges is None else exchanges * _push_bytes(plan, child),
                    "bytes_down": None if exchanges is None else exchanges * _pull_bytes(plan, child),
                }
            )
    return found


def _push_bytes(plan: Plan, spec: NodeSpec) -> int:
    """Of an update. A federation's change of an exact sum has more digits than fp32 holds: it is two buffers."""
    buffers = 2 if spec.kind != "client" and spec.settings.aggregation.rule == "sums" else 1
    return buffers * nbytes(spec.settings.exchange.codec, plan.layout.size)


def _pull_bytes(plan: Plan, spec: NodeSpec) -> int:
    """Of a model. Under the rule `sums` a federation's brings what lies beyond it."""
    brings_rest = spec.path.count("/") > 1 and spec.settings.aggregation.rule == "sums"
    return (2 if brings_rest else 1) * plan.layout.nbytes


def _exchanges(plan: Plan, spec: NodeSpec) -> int | None:
    if spec.kind == "client":
        return plan.planned_rounds(spec)
    if spec.remote:
        return None
    below = [_exchanges(plan, child) for child in spec.children]
    known = [number for number in below if number is not None]
    if len(known) < len(below):
        return None
    rules = spec.settings.aggregation
    together = {
        "goal_achieved": math.ceil(sum(known) / rules.buffer_size),
        "synchronous": max(known),
        "time_up": math.ceil(sum(known) / rules.quorum),
    }
    return math.ceil(together[rules.trigger] / rules.push_every)


def _node(plan: Plan, spec: NodeSpec) -> dict[str, Any]:
    settings, size = spec.settings, plan.layout.nbytes
    codec = settings.exchange.codec
    exchange = {
        "codec": codec,
        "bytes_per_push": _push_bytes(plan, spec),
        "bytes_per_pull": _pull_bytes(plan, spec),
    }
    push = {} if spec.kind == "world" else exchange
    if spec.remote:
        return {"kind": "remote", "memory_bytes": 0, **push}
    if spec.kind == "client":
        training = settings.training
        smaller = plan.smaller_rank(spec)
        trained = TRAINING_BUFFERS * plan.model_of(spec)[1].nbytes
        buffers = ZERO_CLIENT_BUFFERS * size if is_zero(settings) else trained + size
        if settings.merge.has_base and settings.privacy.unit != "record":
            buffers += trained
        buffers += 0 if smaller is None else MEASURING_BUFFERS * size
        if plan.config.model.lora.experts != "none":
            # The adapters of others, and its part in the parent's sums in twice the bytes.
            buffers += (len(EXPERTS[plan.config.model.lora.experts]) - 1 + 2) * size
        buffers += 4 * plan.layout.backbone_size * loses(codec)  # the codec error
        buffers += size * settings.exchange.overlap  # the update in flight
        return {
            "kind": spec.kind,
            "data": describe_data(settings.data),
            "tokens_per_round": plan.round_tokens(spec),
            "local_steps": training.local_steps,
            "lr": training.lr,
            **({} if smaller is None else {"rank": smaller.shape.lora.r, "trained_parameters": smaller.layout.size}),
            "memory_bytes": buffers,
            **push,
            "workers": _workers(plan, spec, buffers),
        }
    rules = settings.aggregation
    memory_bytes = node_bytes(
        rules,
        backbone=plan.layout.backbone_size,
        keys=plan.layout.key_size,
        children=len(spec.children),
        is_world=spec.kind == "world",
        codec=codec,
    )
    return {
        "kind": spec.kind,
        "trigger": rules.trigger,
        "buffer_size": rules.buffer_size,
        "staleness": rules.staleness.fn,
        "score": rules.attention.score if plan.layout.key_size else None,
        "server_optimizer": rules.server_optimizer.name,
        "memory_bytes": memory_bytes,
        **push,
    }


def _workers(plan: Plan, spec: NodeSpec, buffers: int) -> dict[str, Any]:
    """Bytes on each worker of a client, at its ZeRO stage and at the others, and whether they fit."""
    training, resources = spec.settings.training, spec.settings.resources
    cuda = resources.gpus > 0
    limit = _worker_limit(spec)
    fewest, most = resources.worker_range
    if not is_zero(spec.settings):
        # A client without workers is one process, which holds both the training state and the exchange buffers.
        return {"number": [1, 1], "limit_bytes": limit, "stage": None, "fits": limit is None or buffers <= limit}
    stages = {}
    for stage in range(4):
        found = worker_bytes(training, parameters=plan.layout.size, workers=fewest, cuda=cuda, stage=stage)
        on_device = found.total - found.host if cuda else found.total
        stages[stage] = {**vars(found), "on_device": on_device, "fits": limit is None or on_device <= limit}
    stage = training.zero_stage
    return {
        "number": [fewest, most],
        "limit_bytes": limit,
        "stage": stage,
        "stages": stages,
        "fits": stages[stage]["fits"],
    }


def _worker_limit(spec: NodeSpec) -> int | None:
    """Memory that one worker may fill: the configured one, else this machine's; None if unknown."""
    resources = spec.settings.resources
    if resources.memory_gb is not None:
        return int(resources.memory_gb * 1e9)
    if resources.gpus == 0:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import torch  # takes seconds: only runs with GPUs pay for it

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory * min(resources.gpus, 1.0))


def tables(facts: Mapping[str, Any]) -> Iterator[FittingTable]:
    """The facts as tables for the terminal."""
    model = facts["model"]
    split = FittingTable(
        f"{facts['name']}: {facts['method']}, budget {_budget(facts['budget'])}",
        [Column("parameters", is_number=False), Column("number"), Column("share")],
    )
    rows = {"backbone": model["backbone_parameters"]}
    rows |= {f"key layer {name}": count for name, count in model["key_layers"].items()}
    for name, number in rows.items():
        split.add_row(name, f"{number:,}", f"{number / model['parameters']:.1%}")
    split.add_row("all", f"{model['parameters']:,}", "100.0%")
    if model.get("frozen_parameters"):
        split.add_row("frozen, never sent", f"{model['frozen_parameters']:,}", "")
    shape = ", ".join(f"{name} {model[name]}" for name in ("hidden_size", "layers", "heads", "context", "vocab_size"))
    split.caption = f"{_origin(model)}: {shape}; tokenizer {model['tokenizer']}; "
    what = "what is trained is" if model.get("frozen_parameters") else "a whole model is"
    split.caption += f"{what} {amount(facts['bytes_per_pull'])}B"
    yield split
    tree = FittingTable(
        "the tree",
        [
            Column("node", is_number=False),
            Column("kind", rank=1, is_number=False),
            Column("push"),
            Column("pull"),
            Column("memory"),
            Column("what it does", is_number=False),
        ],
    )
    for path, node in facts["nodes"].items():
        indent = "  " * path.count("/") + path.rsplit("/", 1)[-1] + _others(node)
        moved = [f"{amount(node[f'bytes_per_{way}'])}B" if "codec" in node else "" for way in ("push", "pull")]
        tree.add_row(indent, node["kind"], *moved, f"{amount(node['memory_bytes'])}B", _what(node))
    tree.caption = (
        "push, pull: bytes of an update and of the model that is pulled after it; "
        "memory: parameter-sized buffers, without activations and the interpreter"
    )
    if any("copies" in node for node in facts["nodes"].values()):
        tree.caption += "; all of each of those that are alike"
    yield tree
    if any(node["kind"] == "client" and (node["workers"]["stage"] is not None) for node in facts["nodes"].values()):
        yield _sharding(facts)


def _others(node: Mapping[str, Any]) -> str:
    return f" and {node['copies'] - 1:,} alike" if "copies" in node else ""


def _sharding(facts: Mapping[str, Any]) -> FittingTable:
    """Memory of each worker of the ZeRO clients, by stage."""
    numbers = map(Column, ("stage", "workers", "params", "grads", "optimizer", "on host"))
    table = FittingTable(
        "memory per worker of clients that DeepSpeed trains",
        [Column("client", is_number=False), *numbers, Column("fits", is_number=False)],
        caption="* as configured; by ZeRO's arithmetic for the fewest workers, without activations and buckets",
    )
    for path, node in facts["nodes"].items():
        if node["kind"] != "client" or node["workers"]["stage"] is None:
            continue
        workers = node["workers"]
        number = "-".join(str(end) for end in dict.fromkeys(workers["number"]))
        for stage, held in workers["stages"].items():
            chosen = stage == workers["stage"]
            table.add_row(
                path.removeprefix("world/") if stage == 0 else "",
                f"{'* ' if chosen else ''}{stage}",
                number,
                *(f"{amount(held[part])}B" for part in ("parameters", "gradients", "optimizer", "host")),
                "yes" if held["fits"] else "no",
            )
    return table


def crossing_table(facts: Mapping[str, Any], *, per_gb: float | None) -> FittingTable:
    """Bytes that move between places, and their cost."""
    numbers = ("exchanges", "up", "down", *(["price"] if per_gb is not None else []))
    table = FittingTable(
        "what moves between places",
        [*(Column(name, is_number=False) for name in ("node", "from", "to")), *map(Column, numbers)],
    )
    total = 0.0
    for edge in facts["crossings"]:
        row = [edge["node"].removeprefix("world/") + _others(edge), _labels(edge["from"]), _labels(edge["to"])]
        if edge["exchanges"] is None:
            table.add_row(*row, *["?"] * len(numbers))
            continue
        price = (edge["bytes_up"] + edge["bytes_down"]) / 1e9 * (per_gb or 0.0)
        total += price
        row += [f"{edge['exchanges']:,}", f"{amount(edge['bytes_up'])}B", f"{amount(edge['bytes_down'])}B"]
        table.add_row(*row, *([f"{price:,.2f}"] if per_gb is not None else []))
    table.caption = "one pull and one push an exchange; exchanges of the whole budget, of federations at most"
    if per_gb is not None:
        table.caption += f"; {total:,.2f} in all at {per_gb:g} per GB"
    return table


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items()) or "anywhere"


def misfits(facts: Mapping[str, Any]) -> list[str]:
    """A line for each client whose workers hold more than their memory."""
    found = []
    for path, node in facts["nodes"].items():
        if node["kind"] == "client" and not node["workers"]["fits"]:
            workers = node["workers"]
            fitting = [str(s) for s, held in workers.get("stages", {}).items() if held["fits"]]
            cure = f"ZeRO stage {fitting[0]} would" if fitting else "use more workers, offloading or a smaller model"
            limit = f"{amount(workers['limit_bytes'])}B per worker"
            found.append(f"{path}{_others(node)} does not fit into {limit}; {cure}")
    return found


def left_out(plan: Plan) -> list[str]:
    """A line for each folder or glob of a client with files that are not read."""
    if not plan.root.settings.simulation.train:
        return []
    lines = []
    for spec in plan.root.one_of_each():
        if spec.kind == "client":
            found = find_sources(spec.settings.data, f"{spec.key}.data")
            lines += [f"{spec.path}: {line}" for line in found.left_out]
    return lines


def _budget(budget: Mapping[str, Any]) -> str:
    [(name, value)] = budget.items()
    return f"{value:,} {name}"


def _what(node: Mapping[str, Any]) -> str:
    if node["kind"] == "client":
        rank = f"; rank {node['rank']}: {node['trained_parameters']:,} trained" if "rank" in node else ""
        steps = f"{node['local_steps']} steps ({amount(node['tokens_per_round'])} tokens) a round"
        return f"{node['data']}; {steps}, lr {node['lr']:g}{rank}"
    if node["kind"] == "remote":
        return "is in another cluster"
    when = f"every {node['buffer_size']} updates" if node["trigger"] == "goal_achieved" else node["trigger"]
    attention = f"; {node['score']} attention" if node["score"] else ""
    return f"{when}; {node['staleness']} staleness{attention}; {node['server_optimizer']}"
