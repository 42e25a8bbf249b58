"""`worldlm export`: a node's model as a Hugging Face folder, with the tokenizer's files and a model card."""

from __future__ import annotations

from pathlib import Path

from worldlm_ray import huggingface
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.experiments.card_facts import facts
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.huggingface.card import card
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.plan import kept, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
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
    text = card(facts(plan, spec, files, theta=theta, merge=merge))
    shape, layout = plan.model_of(spec)
    if (rank := plan.smaller_rank(spec)) is not None:
        theta = rank.cut(theta)
    if isinstance(shape, PretrainedShape):
        from worldlm_ray.huggingface.pretrained_export import export_pretrained

        export_pretrained(theta, shape, layout, folder, kept=files, card=text, merge=merge)
    elif merge:
        raise ConfigError("--merge", "the run trains no adapters", "leave it out")
    else:
        huggingface.export(theta, shape, layout, folder, kept=files, card=text)
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
