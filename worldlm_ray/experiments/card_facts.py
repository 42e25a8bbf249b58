"""What the card of an exported model says: from the run's plan, its summary.json, its ledgers and lm_eval.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.errors import PrivacyError
from worldlm_ray.experiments import harness_results
from worldlm_ray.huggingface.card import Contribution, Evaluated, Facts, Promise, base_facts
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.plan import kept, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.reports.policy import policy
from worldlm_ray.reports.spending import Statement, private_clients, statements
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.tensors.buffers import Flat, params_sha256

MOST_CLIENTS = 100
"""Clients that have a row each. Of more, every child of the node has one."""
FIELDS = {".jsonl", ".ndjson", ".json", ".parquet"}
"""Endings of files whose text is in a field or a column."""
PACKED = {".gz", ".zst", ".bz2", ".xz"}
PACKAGES = ("worldlm_ray", "torch", "transformers", "peft")


def facts(
    plan: Plan, spec: NodeSpec, files: dict[str, bytes], *, theta: Flat | None = None, merge: bool = False
) -> Facts:
    """The content of a node's card. A damaged summary.json only removes facts.

    Args:
        plan: the run.
        spec: the node.
        files: small files of the export, by name.
        theta: the node's parameters, by which lm_eval.json is asked; None without asking.
        merge: whether adapters are added to whole weights.
    """
    nodes = _summary(plan).get("nodes")
    below = [_number(nodes, client.path, "tokens") for client in spec.clients]
    base, folder = plan.base, plan.config.model.initial_from
    try:
        ledgers: Sequence[Statement] | PrivacyError = statements(plan) if private_clients(plan) else ()
    except PrivacyError as error:
        ledgers = error
    return Facts(
        run=plan.config.name,
        node=spec.path,
        kind=spec.kind,
        method=plan.config.method,
        architecture=_architecture(plan, spec),
        context=plan.shape.context,
        longest=plan.shape.context if base is None else max(base.max_positions, plan.shape.context),
        began_from=f"random weights, seed {plan.config.seed}"
        if folder is None
        else f"the model in a folder named {Path(folder).name}",
        tied=base is not None and base.tied and not isinstance(plan.shape, PretrainedShape),
        tokens=int(sum(number or 0 for number in below)) if any(number is not None for number in below) else None,
        tokenizer=_tokenizer(plan, files),
        loss=_number(nodes, spec.path, "loss"),
        perplexity_per_token=_number(nodes, spec.path, "perplexity_per_token"),
        privacy=_privacy(plan, ledgers),
        base=None if folder is None else Path(folder).name,
        of_base={} if folder is None else base_facts(expanded(folder)),
        is_adapter=plan.shape.has_adapters and not merge,
        has_adapters=plan.shape.has_adapters,
        contributions=_contributions(nodes, spec),
        others=_others(plan, spec, nodes),
        promises=_promises(plan, ledgers),
        policy=policy(plan),
        evaluated=_evaluated(nodes, spec),
        tasks=[] if theta is None else harness_results.read(plan.run_dir, spec.path, params_sha256(theta)),
        versions=_versions(),
    )


def _architecture(plan: Plan, spec: NodeSpec) -> str:
    shape, layout = plan.model_of(spec)
    trained = f"{layout.size:,}"
    if not isinstance(shape, PretrainedShape):
        return f"Llama, {trained} parameters in fp32, embedding and head apart"
    if shape.has_adapters:
        lora = f"LoRA adapters of rank {shape.lora.r}, alpha {shape.lora.alpha:g}: {trained} parameters"
        return f"{shape.model_type}, {shape.frozen:,} parameters, which are frozen; {lora} in fp32"
    return f"{shape.model_type}, {trained} trained parameters in fp32, {shape.frozen:,} frozen"


def _tokenizer(plan: Plan, files: dict[str, bytes]) -> str:
    if kept.TOKENIZER not in files:
        return "the bytes of UTF-8: id 0 to 255 is the byte, and no token is special"
    return f"{plan.shape.vocab_size:,} ids at most; tokenizer.json is the one that the run's text was encoded with"


def _contributions(nodes: Any, spec: NodeSpec) -> list[Contribution]:
    """One row for each client, or for each child if there are many clients.

    Tokens are counted by steps, batches and context: they say nothing of a text that the configuration does not.
    """
    rows = spec.clients if len(spec.clients) <= MOST_CLIENTS else spec.children[:MOST_CLIENTS]
    found = []
    for row in rows:
        tokens = [_number(nodes, client.path, "tokens") for client in row.clients]
        known = [int(number) for number in tokens if number is not None]
        formats = dict.fromkeys(_format(client.settings.data) for client in row.clients)
        found.append(
            Contribution(
                node=row.path,
                clients=len(row.clients),
                tokens=sum(known) if known else None,
                data=", ".join(list(formats)[:3]) + (" and others" if len(formats) > 3 else ""),
            )
        )
    return found


def _others(plan: Plan, spec: NodeSpec, nodes: Any) -> str:
    """By way of the world, a model may depend on clients that are not below its node."""
    left = len(plan.root.clients) - len(spec.clients)
    if not left:
        return ""
    below = {client.path for client in spec.clients}
    numbers = [_number(nodes, client.path, "tokens") for client in plan.root.clients if client.path not in below]
    tokens = int(sum(number or 0 for number in numbers))
    said = f", which trained on {tokens:,} tokens" if any(number is not None for number in numbers) else ""
    return f"The run has {left:,} more clients{said}. Models from above carry their work here."


def _format(data: DataConfig) -> str:
    """The format of a client's text, without the names of its files."""
    if data.pool:
        return f"a pool of {len(data.pool)} texts"
    if data.corpus is not None:
        return f"corpus {data.corpus}"
    if data.format == "conversations":
        return "conversations, of which the answers are the targets"
    endings = sorted({ending for name in data.files if (ending := _ending(Path(name)))})
    field = f", field `{data.text_key}`" if any(FIELDS & set(Path(f"x{each}").suffixes) for each in endings) else ""
    return f"text ({', '.join(endings)}{field})" if endings else "text"


def _ending(name: Path) -> str:
    """The ending of a file's name, such as `.jsonl.gz`."""
    return "".join(name.suffixes[-2:] if name.suffix in PACKED else name.suffixes[-1:])


def _privacy(plan: Plan, ledgers: Sequence[Statement] | PrivacyError) -> list[str]:
    """What clients have spent. By way of the world, a model depends on every client of its run."""
    clients = private_clients(plan)
    if not clients:
        return []
    number = f"{len(clients)} of {len(plan.root.clients)} clients"
    if isinstance(ledgers, PrivacyError):
        return [f"{number}; their ledgers cannot be read ({ledgers})"]
    if not ledgers:
        return [f"{number}; no ledger of theirs lies on this machine"]
    most = max(ledgers, key=lambda row: row.epsilon)
    return [f"{number}: epsilon {most.epsilon:.3f} at most, at delta {most.delta:g} (unit: {most.unit})"]


def _promises(plan: Plan, ledgers: Sequence[Statement] | PrivacyError) -> list[Promise]:
    """A row for each inner node with private clients directly below it, and for each unit and delta among them."""
    found = []
    for spec in plan.root.inner:
        groups: dict[tuple[str, float], list[str]] = {}
        for child in spec.children:
            privacy = child.settings.privacy
            if child.kind == "client" and privacy.unit != "none":
                groups.setdefault((privacy.unit, privacy.delta), []).append(child.path)
        for (unit, delta), paths in groups.items():
            rows = [] if isinstance(ledgers, PrivacyError) else [row for row in ledgers if set(paths) & set(row.nodes)]
            epsilon = max((row.epsilon for row in rows), default=None)
            found.append(Promise(node=spec.path, clients=len(paths), unit=unit, epsilon=epsilon, delta=delta))
    return found


def _evaluated(nodes: Any, spec: NodeSpec) -> list[Evaluated]:
    """The node's own model, and the own models of the clients below it."""
    line = nodes.get(spec.path) if isinstance(nodes, dict) else None
    private = isinstance(line, dict) and line.get("private") is True
    start = {"before": "loss_start", "perplexity_before": "perplexity_start"}
    own = start | {"after": "loss", "perplexity_after": "perplexity"}
    of_clients = start | {"after": "clients_loss", "perplexity_after": "clients_perplexity"}
    rows = {"this model, on its client's text" if spec.kind == "client" else "this model, on all clients' text": own}
    if spec.kind != "client":
        rows["own models of the clients, each on its own text (mean)"] = of_clients
    return [
        Evaluated(
            what=what,
            private=private,
            **{name: None if private else _number(nodes, spec.path, key) for name, key in keys.items()},
        )
        for what, keys in rows.items()
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _summary(plan: Plan) -> dict[str, Any]:
    try:
        with filesystem.refusals(plan.run_dir):
            found = json.loads((plan.run_dir / rundir.SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(nodes: Any, path: str, name: str) -> float | None:
    """A number of a node in summary.json; None if it is missing or not finite."""
    line = nodes.get(path) if isinstance(nodes, dict) else None
    found = line.get(name) if isinstance(line, dict) else None
    if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found):
        return None
    return float(found)
