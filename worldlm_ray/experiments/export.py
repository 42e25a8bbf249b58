"""`worldlm export`: a node's model as a Hugging Face folder, with the tokenizer's files and a model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from worldlm_ray import huggingface
from worldlm_ray.errors import ConfigError, DataError, PrivacyError
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.huggingface.card import Facts, card
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.plan import kept, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.reports.spending import private_clients, statements
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.tensors.buffers import Flat


def export(run: str, node: str, folder: Path, *, merge: bool = False) -> tuple[str, list[str]]:
    """Write a node's model, from its checkpoint.

    Args:
        run: the run's folder or name.
        node: path of the node, or the end of that path.
        folder: made if missing. Files of an earlier export are replaced.
        merge: write whole weights of a run that trains adapters.

    Returns:
        Path of the node, and lines for the user.

    Raises:
        RunError: there is no such run, or one of its files has changed.
        ConfigError: there is no such node, or the folder is that of the model that the run began from.
        CheckpointError: the node has no whole checkpoint, or has diverged.
        DataError: the folder cannot be written.
    """
    plan = rundir.reopen(run, check_data=False)
    spec = plan.find(node)
    refuse_base(plan, folder)
    return spec.path, write_model(plan, spec, sound_theta(plan, spec), folder.expanduser(), merge=merge)


def export_whole(run: str, node: str, folder: Path) -> None:
    """Write a node's model as whole weights, which another run may begin from; see `export`.

    Adapters are added to the weights. A run that trains adapters then draws new ones beside them.
    """
    plan = rundir.reopen(run, check_data=False)
    export(run, node, folder, merge=plan.shape.has_adapters)


def refuse_base(plan: Plan, folder: Path) -> None:
    """Refuse to overwrite the model that a run began from.

    Raises:
        ConfigError: the folder is that of the model.
    """
    base = plan.config.model.initial_from
    if base is not None and expanded(base).resolve() == folder.expanduser().resolve():
        raise ConfigError("FOLDER", f"{folder} holds the model that the run began from", "give another folder")


def write_model(plan: Plan, spec: NodeSpec, theta: Flat, folder: Path, *, merge: bool = False) -> list[str]:
    """Write the parameters of a node with the tokenizer's files and a model card.

    Returns:
        Lines for the user.

    Raises:
        RunError: one of the run's files has changed.
        DataError: the folder cannot be written.
    """
    files = _files(plan)
    text = card(_facts(plan, spec, files))
    if isinstance(plan.shape, PretrainedShape):
        from worldlm_ray.huggingface.pretrained_export import export_pretrained

        export_pretrained(theta, plan.shape, plan.layout, folder, kept=files, card=text, merge=merge)
    elif merge:
        raise ConfigError("--merge", "the run trains no adapters", "leave it out")
    else:
        huggingface.export(theta, plan.shape, plan.layout, folder, kept=files, card=text)
    if huggingface.has_other_card(folder):
        return [f"README.md in {folder} was there before and stays: no model card was written"]
    return []


def _files(plan: Plan) -> dict[str, bytes]:
    """The run's small files: its copies, or the originals if it keeps none."""
    if plan.config.kept:
        return {name: kept.read(plan.config, name) or b"" for name in plan.config.kept}
    try:
        return kept.collect(plan.config, plan.tokenizer)
    except OSError as error:
        raise DataError(f"cannot read the run's tokenizer {plan.tokenizer} ({error.strerror}); restore it") from error


def _facts(plan: Plan, spec: NodeSpec, files: dict[str, bytes]) -> Facts:
    nodes = _summary(plan).get("nodes")
    below = [_number(nodes, client.path, "tokens") for client in spec.clients]
    base, folder = plan.base, plan.config.model.initial_from
    return Facts(
        run=plan.config.name,
        node=spec.path,
        kind=spec.kind,
        method=plan.config.method,
        architecture=_architecture(plan),
        context=plan.shape.context,
        longest=plan.shape.context if base is None else max(base.max_positions, plan.shape.context),
        began_from=f"random weights, seed {plan.config.seed}"
        if folder is None
        else f"the model in a folder named {Path(folder).name}",
        tied=base is not None and base.tied and not isinstance(plan.shape, PretrainedShape),
        # A damaged summary.json only removes facts from the card.
        tokens=int(sum(number or 0 for number in below)) if any(number is not None for number in below) else None,
        tokenizer=_tokenizer(plan, files),
        loss=_number(nodes, spec.path, "loss"),
        perplexity_per_token=_number(nodes, spec.path, "perplexity_per_token"),
        privacy=_privacy(plan),
    )


def _architecture(plan: Plan) -> str:
    shape, trained = plan.shape, f"{plan.layout.size:,}"
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


def _privacy(plan: Plan) -> list[str]:
    """What clients have spent. By way of the world, a model depends on every client of its run."""
    clients = private_clients(plan)
    if not clients:
        return []
    number = f"{len(clients)} of {len(plan.root.clients)} clients"
    try:
        rows = statements(plan)
    except PrivacyError as error:
        return [f"{number}; their ledgers cannot be read ({error})"]
    if not rows:
        return [f"{number}; no ledger of theirs lies on this machine"]
    most = max(rows, key=lambda row: row.epsilon)
    return [f"{number}: epsilon {most.epsilon:.3f} at most, at delta {most.delta:g} (unit: {most.unit})"]


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
