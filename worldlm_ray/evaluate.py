"""Measure and sample the models of a run from its checkpoints, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from rich.table import Table

from worldlm_ray import checkpoint, rundir
from worldlm_ray.client import Client
from worldlm_ray.data import load_tokenizer
from worldlm_ray.errors import CheckpointError
from worldlm_ray.outcome import combine
from worldlm_ray.params import Flat
from worldlm_ray.plan import Plan
from worldlm_ray.privacy.account import Account
from worldlm_ray.records import Measure
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.sampling import sample as generate
from worldlm_ray.tree import NodeSpec


def evaluate(run: str, *, tokens: int, on_phase: Callable[[str], None] = lambda _: None) -> dict[str, Measure]:
    """Held-out quality of every node of a run, by path, parents first.

    A client's own model is measured on its own text; an inner node's on the text of every client below it. Texts of
    clients whose losses are private are left out.

    Args:
        run: the run's folder or name.
        tokens: held-out tokens per client, at most.
        on_phase: told which client is being measured.

    Raises:
        RunError: there is no such run.
        CheckpointError: a node has no whole checkpoint.
    """
    plan = rundir.reopen(run)
    inner = {spec.path: theta(plan, spec) for spec in plan.root.inner}
    found: dict[str, list[Measure]] = {path: [] for path in plan.kinds}
    for spec in plan.root.clients:
        on_phase(f"measuring on the text of {spec.path}")
        client = Client(plan, spec, make_trainer=partial(_trainer, plan, spec))
        if not client.reports:
            continue
        found[spec.path].append(client.measure(tokens, parameters=theta(plan, spec)))
        for path, parameters in inner.items():
            if spec.path.startswith(f"{path}/"):
                found[path].append(client.measure(tokens, parameters=parameters))
    combined = {path: combine(measures) for path, measures in found.items()}
    return {path: measure for path, measure in combined.items() if measure is not None}


def sample(run: str, node: str, *, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """Text from a node's model; see `worldlm_ray.training.sampling.sample`."""
    plan = rundir.reopen(run, check_data=False)
    spec = plan.node(node)
    trainer = _trainer(plan, spec)
    trainer.write(theta(plan, spec))
    tokenizer = load_tokenizer(plan.root.clients[0].settings.data.tokenizer)
    return generate(trainer, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed)


def _trainer(plan: Plan, spec: NodeSpec, _: Account | None = None) -> LocalTrainer:
    """Something that holds a model; nothing is trained here, whatever the client may spend."""
    return LocalTrainer(plan.shape, plan.layout, spec.settings.training, threads=spec.settings.resources.cpus)


def theta(plan: Plan, spec: NodeSpec) -> Flat:
    """The parameters in a node's newest whole checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    found = checkpoint.load(checkpoint.folder(plan.run_dir, spec.path))
    if found is None:
        raise CheckpointError(
            f"{spec.path} has no checkpoint yet in {plan.run_dir}; wait for one or stop the run cleanly"
        )
    return found[1]["theta"]


def table(run: str, measures: Mapping[str, Measure]) -> Table:
    """The measures as a table for the terminal."""
    drawn = Table(title=f"{run}: held-out text")
    drawn.add_column("model")
    for name in ("nats per byte", "perplexity per token", "held-out bytes"):
        drawn.add_column(name, justify="right")
    for path, value in measures.items():
        drawn.add_row(path, f"{value.loss:.4f}", f"{value.perplexity:.3f}", f"{value.heldout_bytes:,}")
    return drawn
