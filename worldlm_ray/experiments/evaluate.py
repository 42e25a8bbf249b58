"""Measure and sample the models of a run from its checkpoints, in this process, without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from worldlm_ray.client.best import own_model
from worldlm_ray.client.client import Client
from worldlm_ray.data import load_tokenizer
from worldlm_ray.errors import CheckpointError, ConfigError
from worldlm_ray.plan import build, kept, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account
from worldlm_ray.records import Measure
from worldlm_ray.reports.outcome import combine
from worldlm_ray.reports.tables import NOTHING
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking.node_state import finite
from worldlm_ray.training.experts import ExpertTrainer
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.making import plain_trainer
from worldlm_ray.training.sampling import sample as generate
from worldlm_ray.training.trainer import Trainer


def evaluate(run: str, *, tokens: int, on_phase: Callable[[str], None] = lambda _: None) -> dict[str, Measure]:
    """Held-out quality of every node of a run, by path, parents first.

    A client's own model is measured on its text, an inner node's on the text of every client below it. Texts of
    clients with private losses are left out.

    Args:
        run: the run's folder or name.
        tokens: held-out tokens per client, at most.
        on_phase: called with the client that is measured next.

    Raises:
        RunError: there is no such run, or its tokenizer has changed.
        CheckpointError: a node has no whole checkpoint.
    """
    plan = rundir.reopen(run)
    kept.check_originals(plan.config)
    inner = {spec.path: theta(plan, spec) for spec in plan.root.inner}
    found: dict[str, list[Measure]] = {path: [] for path in plan.kinds}
    initial = build.initial(plan)
    for spec in plan.root.clients:
        on_phase(f"measuring on the text of {spec.path}")
        client = Client(plan, spec, initial=initial, make_trainer=partial(_trainer, plan, spec))
        if not client.reports:
            continue
        load_model(client.trainer, plan, spec)
        found[spec.path].append(client.measure(tokens))
        for path, parameters in inner.items():
            if spec.path.startswith(f"{path}/"):
                found[path].append(client.measure(tokens, parameters=parameters))
    combined = {path: combine(measures) for path, measures in found.items()}
    return {path: measure for path, measure in combined.items() if measure is not None}


def sample(run: str, node: str, *, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """Text from a node's model; see `worldlm_ray.training.sampling.sample`."""
    plan = rundir.reopen(run, check_data=False)
    spec = plan.find(node)
    trainer = _trainer(plan, spec)
    load_model(trainer, plan, spec)
    tokenizer = load_tokenizer(plan.tokenizer)
    return generate(trainer, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed)


def model(run: str, node: str) -> torch.nn.Module:
    """A node's model as a module in evaluation mode: transformers' own where the run has that backend.

    Args:
        run: the run's folder or name.
        node: path of the node, or the end of that path.

    Raises:
        RunError: there is no such run.
        ConfigError: there is no such node.
        CheckpointError: it has no whole checkpoint.
    """
    plan = rundir.reopen(run, check_data=False)
    spec = plan.find(node)
    trainer = _trainer(plan, spec)
    load_model(trainer, plan, spec)
    return trainer.model.root.eval()


def _trainer(plan: Plan, spec: NodeSpec, _: Account | None = None) -> LocalTrainer:
    """A trainer that only holds a model. It trains nothing, so it spends no privacy budget."""
    return plain_trainer(plan.shape, plan.layout, spec.settings)


def load_model(trainer: Trainer, plan: Plan, spec: NodeSpec) -> None:
    """Make a trainer compute a node's own model: of a client of experts, the mixture.

    Raises:
        CheckpointError: the node has no whole checkpoint.
    """
    arrays = _arrays(plan, spec)
    trainer.write(own_model(arrays))
    if not isinstance(trainer, ExpertTrainer):
        return
    trainer.experts.mix(spec.kind == "client")
    if spec.kind == "client":
        trainer.load_experts({name.removeprefix("optimizer."): values for name, values in arrays.items()})


def theta(plan: Plan, spec: NodeSpec) -> Flat:
    """A node's own parameters, from its newest whole checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    return own_model(_arrays(plan, spec))


def _arrays(plan: Plan, spec: NodeSpec) -> dict[str, Flat]:
    found = checkpoint.load(checkpoint.folder(plan.run_dir, spec.path))
    if found is None:
        raise CheckpointError(
            f"{spec.path} has no checkpoint yet in {plan.run_dir}; wait for one or stop the run cleanly"
        )
    return found[1]


def sound_theta(plan: Plan, spec: NodeSpec) -> Flat:
    """The parameters in a node's newest whole checkpoint, for use outside the run.

    Raises:
        CheckpointError: it has none, or the model has diverged.
        ConfigError: it is a mixture of experts, which parameters alone do not give.
    """
    if spec.kind == "client" and plan.config.model.lora.experts != "none":
        got = f"{spec.path} mixes several adapters anew for every token: no one adapter computes the same"
        raise ConfigError("NODE", got, "give an inner node, such as world")
    found = theta(plan, spec)
    if not np.isfinite(found).all():
        raise CheckpointError(f"the model of {spec.path} has diverged: its values are not finite; take another node's")
    return found


def clients_mean(measures: Mapping[str, Measure], path: str) -> Measure | None:
    """The mean over the clients below an inner node, of each client's own model on its text; None for a client."""
    inner = {other.rpartition("/")[0] for other in measures}
    return combine(
        measure for other, measure in measures.items() if other.startswith(f"{path}/") and other not in inner
    )


def values(measures: Mapping[str, Measure]) -> dict[str, dict[str, float | None]]:
    """The measures by path, under their names in summary.json."""
    found = {}
    for path, own in measures.items():
        mean = clients_mean(measures, path)
        found[path] = {
            "loss": own.loss,
            "perplexity": own.perplexity,
            "perplexity_per_token": own.perplexity_per_token,
            "clients_loss": mean.loss if mean else None,
            "clients_perplexity": mean.perplexity if mean else None,
            "heldout_bytes": own.heldout_bytes,
        }
    return dict(finite(found))


def table(run: str, measures: Mapping[str, Measure]) -> FittingTable:
    """The measures as a table for the terminal, with perplexity per token if a token is not a byte."""
    per_token = any(measure.perplexity_per_token is not None for measure in measures.values())
    heads = {"loss\n(nats/byte)\nown model": 0, "\nclients\n(mean)": 0, "perplexity\nper byte\nown model": 1}
    columns = [Column(head, rank=rank) for head, rank in heads.items()]
    columns += [Column("perplexity\nper token\nown model", rank=1)] if per_token else []
    drawn = FittingTable(f"{run}: held-out text", [Column("node", is_number=False), *columns, Column("bytes", rank=2)])
    for path, shown in values(measures).items():
        loss = _or(shown["loss"], ".4f") if math.isfinite(measures[path].loss) else "diverged"
        cells = [loss, _or(shown["clients_loss"], ".4f"), _or(shown["perplexity"], ".3f")]
        cells += [_or(shown["perplexity_per_token"], ".3f")] if per_token else []
        drawn.add_row(path, *cells, f"{shown['heldout_bytes']:,}")
    return drawn


def _or(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
