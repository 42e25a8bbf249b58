"""`worldlm newcomer`: how good is a client that joins an old world, after a few steps?

Three simulated runs for each seed, of one world whose newcomers are left out at first:

    OUT/world/       the world without its newcomers
    OUT/newcomers/   the newcomers, each alone, from the world's model: a few steps
    OUT/alone/       the newcomers, each alone, from the initial weights: ten times as many steps

All three are kept, and a call that was interrupted goes on where it was. A newcomer's model and its rival are both
those of their best round by validation text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.config.schema import BudgetConfig, RunConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments.compare import compare
from worldlm_ray.experiments.comparison_progress import RunProgress
from worldlm_ray.experiments.comparison_run import folder_of
from worldlm_ray.experiments.export import export_whole
from worldlm_ray.experiments.methods import configure, set_everywhere
from worldlm_ray.experiments.stages import from_model
from worldlm_ray.plan import tree
from worldlm_ray.plan.initial_model import with_tokenizer
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.reports.terminal import Column, FittingTable

STEPS_PER_ROUND = 10
"""Optimizer steps between two looks at validation text, for a newcomer."""


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """What joining brings to one client, in nats per byte of its held-out text: means over seeds."""

    client: str
    joined: float
    """After a few steps from the world's model, which has never seen the client's text."""
    alone: float
    """After many more steps from the initial weights."""

    @property
    def gain(self) -> float:
        """1 - loss of the newcomer / that of its rival."""
        return 1.0 - self.joined / self.alone


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is compared."""

    names: tuple[str, ...] | None = None
    """Paths of the newcomers; the last client of every federation unless given."""
    steps: int = 50
    """Of a newcomer, from the world's model; a multiple of `STEPS_PER_ROUND`."""
    alone_steps: int = 500
    """Of the same client from the initial weights; a multiple of `training.local_steps`."""


def last_of_each(root: NodeSpec) -> list[str]:
    """Paths of the last client of every federation that has others, too."""
    found = [
        node.children[-1].path
        for node in root.walk()
        if node.kind == "federation" and len(node.children) > 1 and node.children[-1].kind == "client"
    ]
    return found or [root.clients[-1].path]


def newcomers(
    config: RunConfig,
    seeds: Sequence[int],
    *,
    out: Path,
    rules: Rules,
    jobs: int = 1,
    command: str = "",
    on_phase: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[list[RunProgress]], None] = lambda runs: None,
) -> list[Newcomer]:
    """Run what is missing, and compare each newcomer with itself alone.

    Args:
        config: the world, with its newcomers.
        seeds: one run each.
        out: folder for all runs.
        rules: who joins, and after how many steps they are compared.
        jobs: processes to run at a time.
        command: what the user typed.
        on_phase: called with what begins.
        on_progress: called about once a second with the progress of all runs of a phase.

    Raises:
        ConfigError: a newcomer is no client of the world, no client would be left, or the steps are no whole rounds.
        RunError: `out` holds runs of another configuration, or cannot be written.
    """
    config = with_tokenizer(config)
    root = tree.build(config)
    late = _chosen(root, rules.names)
    per_round = root.clients[0].settings.training.local_steps
    for option, value, unit in (
        ("--steps", rules.steps, STEPS_PER_ROUND),
        ("--alone-steps", rules.alone_steps, per_round),
    ):
        if value < unit or value % unit:
            raise ConfigError(option, f"got {value}", f"give a multiple of {unit}")
    shared: dict[str, Any] = {"jobs": jobs, "command": command, "on_progress": on_progress}
    only = _only(config, root, late)
    on_phase("1/3 training the world without its newcomers")
    compare(_without(config, root, late), ["worldlm"], seeds, out=out / "world", **shared)
    on_phase("2/3 training the newcomers alone")
    many = replace(only, budget=BudgetConfig(rounds=rules.alone_steps // per_round))
    alone = compare(many, ["local"], seeds, out=out / "alone", **shared)
    on_phase("3/3 training the newcomers from the world's model")
    joined: list[dict[str, Any]] = []
    for seed in seeds:
        model = out / "models" / str(seed)
        if not (model / "config.json").is_file():
            export_whole(str(folder_of(out / "world", "worldlm", seed)), "world", model)
        few = _few_steps(from_model(only, str(model)), rules.steps)
        joined += compare(few, ["local"], [seed], out=out / "newcomers" / str(seed), **shared)
    return [Newcomer(client=path, joined=_mean(joined, path), alone=_mean(alone, path)) for path in late]


def table(found: Sequence[Newcomer], rules: Rules) -> FittingTable:
    """The newcomers for a terminal."""
    columns = [
        Column("newcomer"),
        Column(f"joined,\n{rules.steps} steps", is_number=True),
        Column(f"alone,\n{rules.alone_steps} steps", is_number=True),
        Column("gain", is_number=True),
    ]
    shown = FittingTable("", columns, caption="nats per byte of held-out text; each model is that of its best round")
    for each in found:
        shown.add_row(each.client, f"{each.joined:.4f}", f"{each.alone:.4f}", f"{each.gain:+.1%}")
    joined, alone = fmean(each.joined for each in found), fmean(each.alone for each in found)
    shown.add_row("mean", f"{joined:.4f}", f"{alone:.4f}", f"{1 - joined / alone:+.1%}")
    return shown


def _mean(rows: Iterable[dict[str, Any]], path: str) -> float:
    return fmean(row["own"] for row in rows if row["client"] == path)


def _chosen(root: NodeSpec, names: Sequence[str] | None) -> list[str]:
    """The paths of the newcomers."""
    clients = [spec.path for spec in root.clients]
    late = list(dict.fromkeys(last_of_each(root) if names is None else names))
    for path in late:
        if path not in clients:
            raise ConfigError("--newcomers", f"{path!r} is no client of the world", f"choose of {', '.join(clients)}")
    if len(late) == len(clients):
        raise ConfigError("--newcomers", "no client would be left in the world", "name fewer")
    return late


def _without(config: RunConfig, root: NodeSpec, late: Iterable[str]) -> RunConfig:
    """The world without some clients, and without federations that had no others."""
    mapping = to_mapping(configure(config, "worldlm"))  # every node is written out, with its settings
    mapping["world"]["children"] = _pruned(mapping["world"]["children"], root.children, set(late))
    return from_mapping(mapping | {"name": config.name, "method": config.method}, resolved=True)


def _pruned(children: Sequence[dict[str, Any]], specs: Sequence[NodeSpec], late: set[str]) -> list[dict[str, Any]]:
    kept = []
    for child, spec in zip(children, specs, strict=True):
        if spec.path in late:
            continue
        if spec.kind == "federation":
            below = _pruned(child["children"], spec.children, late)
            if not below:
                continue
            child = child | {"children": below}
        kept.append(child)
    return kept


def _only(config: RunConfig, root: NodeSpec, late: Sequence[str]) -> RunConfig:
    """The world of some clients alone."""
    everyone = {spec.path for spec in root.clients}
    return _without(config, root, everyone - set(late))


def _few_steps(config: RunConfig, steps: int) -> RunConfig:
    """Few steps in short rounds: validation text is looked at after each."""
    mapping = to_mapping(config)
    set_everywhere(mapping, ["training", "local_steps"], STEPS_PER_ROUND)
    mapping["budget"] = asdict(BudgetConfig(rounds=steps // STEPS_PER_ROUND))
    return from_mapping(mapping, resolved=True)
