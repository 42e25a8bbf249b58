"""A council on disk: an exported model in a folder of each member, and council.json.

council.json holds `format`, `run`, `eps`, `top`, `after` (see `council.CouncilRules`), `context` (tokens that a model
sees at most), `backend` (what computes the models: see `ModelConfig.backend`), `tokenizer` (`bytes`, or a file of this
folder) and `members`: for each its `node` in the run, its `folder`, which `AutoModelForCausalLM` loads, and its
`prior`, the weight with which a text begins. Of a run that trains adapters the folders hold whole weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray import huggingface
from worldlm_ray.config.schema import ModelConfig
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.experiments import council
from worldlm_ray.experiments.council import CouncilRules, Floats
from worldlm_ray.experiments.council_members import Members, members_of
from worldlm_ray.experiments.council_scores import PRIOR_TOKENS, scored, texts_of
from worldlm_ray.experiments.export import refuse_base, write_model
from worldlm_ray.model.pretrained_base import read_whole
from worldlm_ray.model.pretrained_shape import Architecture
from worldlm_ray.plan import kept, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.making import plain_trainer

COUNCIL = "council.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """A council that was read."""

    thetas: dict[str, Flat]
    """Parameters [layout.size] by path of the node."""
    prior_K: Floats
    """Log of the prior."""
    rules: CouncilRules
    shape: Architecture
    layout: Layout
    tokenizer: str
    """`bytes`, or the path of a tokenizer.json."""


def is_one(folder: Path) -> bool:
    """Whether a folder holds an exported council."""
    return (folder / COUNCIL).is_file()


def export_council(
    run: str,
    folder: Path,
    *,
    members: str | None = None,
    rules: CouncilRules | None = None,
    prior_of: str | None = None,
) -> tuple[list[str], list[str]]:
    """Write the models of a council, from a run's checkpoints.

    Args:
        run: the run's folder or name.
        folder: made if missing. Files of an earlier export are replaced.
        members: nodes with commas between them; None for all whose models may serve.
        rules: how the council weighs its members.
        prior_of: a node: the prior is fitted on the validation text of the clients at or below it. None: uniform.

    Returns:
        Paths of the nodes, and lines for the user.

    Raises:
        RunError: there is no such run, or one of its files has changed.
        ConfigError: a node is unknown or may not serve, or the folder is that of the model that the run began from.
        CheckpointError: a node has no whole checkpoint, or no model can serve.
        DataError: the folder cannot be written.
    """
    plan, rules = rundir.reopen(run, check_data=prior_of is not None), rules or CouncilRules()
    refuse_base(plan, folder)
    found, folder = members_of(plan, members), folder.expanduser()
    prior_K = np.exp(council.uniform(len(found.thetas)) if prior_of is None else _fitted(plan, found, prior_of))
    with _writing(folder):  # an export that is interrupted leaves no council of old and new members
        (folder / COUNCIL).unlink(missing_ok=True)
    width, notes, entries = len(str(len(found.thetas))), list(found.left_out), list[dict[str, Any]]()
    for number, (path, theta) in enumerate(found.thetas.items(), 1):
        name = f"{number:0{width}}"
        refuse_base(plan, folder / name)
        notes += write_model(plan, plan.specs[path], theta, folder / name, merge=plan.shape.has_adapters)
        entries.append({"node": path, "folder": name, "prior": float(prior_K[number - 1])})
    written = {
        "format": FORMAT,
        "run": plan.config.name,
        "eps": rules.eps,
        "top": rules.top,
        "after": rules.after,
        "context": plan.shape.context,
        "backend": plan.config.model.backend,
        "tokenizer": "bytes" if plan.tokenizer == "bytes" else f"{entries[0]['folder']}/{kept.TOKENIZER}",
        "members": entries,
    }
    with _writing(folder):
        (folder / COUNCIL).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return list(found.thetas), notes


def _fitted(plan: Plan, members: Members, node: str) -> Floats:
    """The log prior that the validation text at or below a node says.

    Raises:
        ConfigError: there is no such node, or no validation text that may be used.
    """
    spec = plan.find(node)
    trainer = plain_trainer(plan.shape, plan.layout, plan.root.clients[0].settings)
    texts = texts_of(plan, spec.clients, trainer, part="validation", tokens=PRIOR_TOKENS)
    if not texts:
        problem = f"no client at or below {spec.path} has validation text whose losses may be known"
        raise ConfigError("--prior-of", problem, "set data.validation_fraction in a new run, or leave the option out")
    return council.fitted(np.concatenate(list(scored(trainer, members, texts).log_p.values())))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot export to {folder}: {error.strerror}; give another folder") from error


def read(folder: Path) -> Saved:
    """Read an exported council.

    Raises:
        DataError: a file is missing or damaged, or the members are models of different sizes.
    """
    file = folder.expanduser() / COUNCIL
    found = huggingface.read_object(file)
    if found.get("format") != FORMAT:
        raise DataError(f"{file}: has format {found.get('format')!r}, this version reads {FORMAT}; export it again")
    try:
        rules = CouncilRules(eps=float(found["eps"]), top=found["top"], after=int(found["after"]))
        context, tokenizer, entries = int(found["context"]), str(found["tokenizer"]), list(found["members"])
        is_pretrained = {"decoder": False, "transformers": True}[found["backend"]]
        priors = [float(entry["prior"]) for entry in entries]
        folders = {str(entry["node"]): _below(file, str(entry["folder"])) for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: is damaged ({type(error).__name__}: {error}); export it again") from error
    _check(file, rules, priors, folders)
    read_shape = _pretrained_shape if is_pretrained else huggingface.read_shape
    shapes: dict[Path, Architecture] = {path: read_shape(path, context=context) for path in folders.values()}
    shape = next(iter(shapes.values()))
    for path, other in shapes.items():
        if (other.parameters, other.vocab_size) != (shape.parameters, shape.vocab_size):
            raise DataError(f"{path}: is a model of other sizes than the first member; export the council again")
    layout = shape.layout([])
    read_weights = read_whole if is_pretrained else huggingface.read_weights
    return Saved(
        thetas={node: read_weights(path, layout) for node, path in folders.items()},
        prior_K=np.log(priors),
        rules=rules,
        shape=shape,
        layout=layout,
        tokenizer=tokenizer if tokenizer == "bytes" else str(_below(file, tokenizer)),
    )


def _pretrained_shape(folder: Path, *, context: int) -> Architecture:
    """The shape of a member that transformers computes."""
    from worldlm_ray.model.pretrained import read_shape  # transformers takes seconds to import

    file, model = folder / huggingface.CONFIG, ModelConfig(backend="transformers", context=context)
    found = huggingface.read_object(file)
    # No weight is frozen, so that nothing goes into a cache.
    return read_shape(found, model, file=file, folder=folder, cache_dir=str(folder))[0]


def _below(file: Path, name: str) -> Path:
    """A file or folder that council.json names: it lies in the same folder."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise DataError(f"{file}: names {name!r}, which lies outside this folder; export it again")
    return file.parent / name


def _check(file: Path, rules: CouncilRules, priors: list[float], folders: dict[str, Path]) -> None:
    """Refuse numbers that no council can have."""
    if not priors or len(folders) != len(priors):
        raise DataError(f"{file}: names {len(folders)} different members of {len(priors)}; export it again")
    if not all(math.isfinite(prior) and prior > 0.0 for prior in priors):
        raise DataError(f"{file}: a prior is not above 0; give every member a weight above 0")
    if not 0.0 <= rules.eps < 1.0:
        raise DataError(f"{file}: eps is {rules.eps}; give a number from 0 to below 1")
    whole = rules.top is None or (isinstance(rules.top, int) and rules.top >= 1)
    if not whole or rules.after < 1:
        raise DataError(f"{file}: top is {rules.top!r} and after {rules.after}; give whole numbers above 0")
