"""`worldlm compare`: several methods on one world, at equal work, with the same seeds.

Every (method, seed) is a simulated run in a separate folder. All methods share the initial weights and the order of
text. With a budget in rounds, every client takes equally many optimizer steps in every method. With a budget in tokens,
all clients together do, and in asynchronous methods fast clients take more of them. At the end every model is measured
on every client's held-out text:

    OUT/runs/METHOD-SEED/    the run folder, and measures.json once it is done (a comparison can be continued)
    OUT/results.json         one row per method, seed and client; also the configuration, the commands and the versions
    OUT/commands.txt         when and how the comparison was begun and continued
    OUT/report/              tables, plots and one HTML page: see worldlm_ray/experiments/comparison_report.py

Losses are in nats per byte. `own` is a client's own model on its text, `world` is the world's model on that text.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from worldlm_ray.aggregation.fold import OWN
from worldlm_ray.aggregation.merge import PARENT
from worldlm_ray.aggregation.residuals import RESIDUAL
from worldlm_ray.client.best import own_model
from worldlm_ray.config.loading import from_mapping, to_mapping, to_yaml
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.data import prepare
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments.comparison_progress import DONE, MEASURING, TRAINING, WAITING, RunProgress
from worldlm_ray.experiments.methods import configure, flat_name
from worldlm_ray.plan import rundir, tree
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.records import AggregationRecord, AttentionRecord, MergeRecord, Record, RoundRecord
from worldlm_ray.simulation.simulator import Simulation, simulate
from worldlm_ray.storage import checkpoint
from worldlm_ray.storage.paths import pasted
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking.status import read_status
from worldlm_ray.training.local import LocalTrainer, device_of

MEASURES, CURVE, COMMANDS = "measures.json", "curve.json", "commands.txt"
LOOK_EVERY_S = 1.0
"""Seconds between two checks of the progress of the runs."""
PACKAGES = ("worldlm_ray", "torch", "numpy")
"""Packages whose versions a report states."""

WORLD_POINTS = 24
"""Measurements of the world's model during a run, on a quarter of `evaluation.tokens` of each client's text."""


class _Curve:
    """Held-out losses during the run: the mean of the clients' own models, and the world's model on all texts."""

    def __init__(self, plan: Plan) -> None:
        self.points: list[dict[str, float]] = []
        self.world: list[dict[str, float]] = []
        budget = plan.config.budget
        self._total = budget.tokens or (budget.rounds or 0) * sum(map(plan.round_tokens, plan.root.clients))
        self._tokens = plan.config.evaluation.tokens // 4
        self._version = 0
        self._changed = False
        self._weights: dict[str, dict[str, list[float]]] = {}

    def add_record(self, record: Record) -> None:
        """Take in how nodes blend: attention over key layers, and the weight of the parent's backbone."""
        parent = record.node.rpartition("/")[0]
        if isinstance(record, AttentionRecord):
            names = {OWN: record.node, PARENT: parent}
            for index, candidate in enumerate(record.candidates):
                weight = sum(row[index] for row in record.weights) / len(record.weights)
                source = names.get(candidate) or (
                    candidate if candidate.startswith(RESIDUAL) else f"{record.node}/{candidate}"
                )
                self._add(record.node, source, weight)
        elif isinstance(record, MergeRecord):
            self._add(record.node, f"backbone of {parent}", record.m)
        elif isinstance(record, RoundRecord | AggregationRecord):
            self._changed = True

    def _add(self, node: str, source: str, weight: float) -> None:
        self._weights.setdefault(node, {}).setdefault(source, []).append(weight)

    @property
    def taken(self) -> dict[str, dict[str, float]]:
        """Mean weight of each source in a node's blends."""
        return {
            node: {source: sum(found) / len(found) for source, found in sources.items()}
            for node, sources in self._weights.items()
        }

    def add_points(self, simulation: Simulation) -> None:
        """Add a point if the clients' loss has changed, and occasionally one of the world's model."""
        if not self._changed:
            return
        self._changed = False
        snapshot = simulation.tracker.snapshot()
        loss, at = (
            snapshot["nodes"]["world"]["clients_loss"],
            {"tokens": snapshot["tokens"], "virtual_s": snapshot["now_s"]},
        )
        if loss is not None and (not self.points or loss != self.points[-1]["loss"]):
            self.points.append(at | {"loss": loss})
        node = simulation.nodes["world"]
        if node.version > self._version and node.published.tokens >= len(self.world) * self._total / WORLD_POINTS:
            self._version = node.version
            losses = [
                client.measure(self._tokens * client.dataset.parts, parameters=node.theta).loss
                for client in simulation.clients.values()
            ]
            self.world.append(at | {"loss": sum(losses) / len(losses)})


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    out: Path,
    jobs: int = 1,
    command: str = "",
    on_done: Callable[[str, int, float], None] = lambda method, seed, own: None,
    on_progress: Callable[[list[RunProgress]], None] = lambda runs: None,
) -> list[dict[str, Any]]:
    """Run what is missing and gather all results.

    Args:
        config: the world; its budget must be in rounds or in tokens.
        methods: names of methods, see worldlm_ray/experiments/methods.py.
        seeds: one run per method and seed.
        out: folder of the comparison.
        jobs: processes to run at a time.
        command: what the user typed, for the report.
        on_done: called with method, seed and mean own loss of each finished run.
        on_progress: called about once a second with the progress of all runs.

    Returns:
        Rows of results.json.

    Raises:
        ConfigError: a method is unknown or impossible on this world, or the budget is in seconds.
        RunError: `out` holds a comparison of another configuration, or cannot be written.
    """
    if config.budget.seconds is not None:
        raise ConfigError("budget", "in seconds", "a comparison at equal work wants budget.rounds or budget.tokens")
    if not config.simulation.train:
        raise ConfigError("simulation.train", "false: there are no losses to compare", "leave it out")
    methods = list(dict.fromkeys(methods))
    for method in methods:  # every error of the configuration shows before the first run
        make_plan(configure(config, method))
    _same_configuration(config, out)
    _note(command, out)
    wanted = [(method, seed) for seed in seeds for method in methods]
    _run_all(config, wanted, out, jobs=jobs, on_done=on_done, on_progress=on_progress)
    found = [_read(out, method, seed) for method, seed in wanted]
    rows = [{"method": entry["method"], "seed": entry["seed"], **row} for entry in found for row in entry["clients"]]
    results = {"about": _about(config, out), "rows": rows, "runs": found}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return rows


def _run_all(
    config: RunConfig,
    wanted: Sequence[tuple[str, int]],
    out: Path,
    *,
    jobs: int,
    on_done: Callable[[str, int, float], None],
    on_progress: Callable[[list[RunProgress]], None],
) -> None:
    """Run all pairs of a method and a seed, `jobs` at a time, each in a separate process."""
    mapping = to_mapping(config)
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(run_one, mapping, method, seed, str(out)): (method, seed) for method, seed in wanted}
        began = time.time()
        waiting: set[Future[dict[str, Any]]] = set(tasks)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                for task in ended:
                    measured = task.result()
                    on_done(*tasks[task], sum(row["own"] for row in measured["clients"]) / len(measured["clients"]))
                on_progress([_progress_of(out, method, seed, since=began) for method, seed in wanted])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the first failure must show now, not after the other runs
            raise


def _progress_of(out: Path, method: str, seed: int, *, since: float) -> RunProgress:
    """The progress of one run, by the files that its process has written since this comparison began or continued."""
    folder = out / "runs" / f"{method}-{seed}"
    state, trained = WAITING, 0.0
    if (folder / MEASURES).is_file():
        state, trained = DONE, 1.0
    elif (folder / CURVE).is_file():
        # A run that an interrupted comparison has trained waits to be measured.
        state, trained = (MEASURING if (folder / CURVE).stat().st_mtime >= since else WAITING), 1.0
    else:
        with suppress(RunError):
            status = read_status(folder)
            if float(status.get("updated_at", 0.0)) >= since:
                state, trained = TRAINING, float(status.get("progress", 0.0))
    return RunProgress(method=method, seed=seed, state=state, trained=trained)


def _note(command: str, out: Path) -> None:
    """Record when and by which command this comparison was begun or continued."""
    if command:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        with (out / COMMANDS).open("a", encoding="utf-8") as file:
            file.write(f"{now}  {command}\n")


def _about(config: RunConfig, out: Path) -> dict[str, Any]:
    """The facts of a report beside the results: world, budget, configuration, commands, versions."""
    file = out / COMMANDS
    return {
        "name": config.name,
        "budget": {unit: value for unit, value in asdict(config.budget).items() if value is not None},
        "configuration": to_yaml(replace(config, run_dir=None, seed=0)),
        "commands": file.read_text(encoding="utf-8").splitlines() if file.is_file() else [],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def run_one(mapping: dict[str, Any], method: str, seed: int, out: str) -> dict[str, Any]:
    """Simulate and measure one method with one seed, unless that is done."""
    folder = Path(out) / "runs" / f"{method}-{seed}"
    if (folder / MEASURES).is_file():
        return _read(Path(out), method, seed)
    world = from_mapping(mapping, resolved=True)
    config = replace(configure(world, method), seed=seed, run_dir=str(folder))
    plan = make_plan(config)
    if not (folder / CURVE).is_file():
        if folder.exists():
            shutil.rmtree(folder)  # of an interrupted run: a simulation starts over
        plan = rundir.create(plan)
        curve = _Curve(plan)
        simulate(plan, on_progress=curve.add_points, on_record=curve.add_record)
        found = {"curve": curve.points, "world_curve": curve.world, "taken": curve.taken}
        (folder / CURVE).write_text(json.dumps(found), encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    measured = {
        "method": method,
        "seed": seed,
        "virtual_s": summary["wall_s"],
        "tokens": summary["tokens"],
        "clients": _measure(tree.build(world).clients, plan, summary),
        "levels": _levels(summary),
        **json.loads((folder / CURVE).read_text(encoding="utf-8")),
    }
    temporary = folder / f".{MEASURES}"
    temporary.write_text(json.dumps(measured), encoding="utf-8")
    temporary.replace(folder / MEASURES)
    return measured


def _measure(originals: list[NodeSpec], plan: Plan, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses on each client's text: its own model, the world's, and every other client's."""
    tokens = plan.config.evaluation.final_tokens
    world = _theta(plan, "world")
    nodes = {spec.path: _node_of(spec, plan) for spec in originals}
    models = {path: _theta(plan, node) if node else world for path, node in nodes.items()}
    first = originals[0].settings
    trainer = LocalTrainer(plan.shape, plan.layout, first.training, threads=1, device=device_of(first.resources))
    rows = []
    for spec in originals:
        dataset = prepare(spec.settings.data, context=plan.shape.context, key=f"{spec.key}.data")

        def loss(parameters: Flat, limit: int, dataset: Any = dataset) -> float:
            windows = dataset.heldout_windows(limit, context=plan.shape.context, batch_size=16)
            nats, count = trainer.evaluate(windows, parameters=parameters)
            return float(nats / count / dataset.heldout_bytes_per_token())

        counted = summary["nodes"][nodes[spec.path] or plan.root.clients[0].path]
        rows.append(
            {
                "client": spec.path,
                "own": loss(models[spec.path], tokens),
                "world": loss(world, tokens),
                "by_model": {path: loss(theta, tokens // 4) for path, theta in models.items()},
                "steps": counted["steps"],
                "busy_fraction": counted["busy_fraction"],
                "bytes_up": counted["bytes_up"],
                "bytes_down": counted["bytes_down"],
            }
        )
    return rows


def _node_of(spec: NodeSpec, plan: Plan) -> str | None:
    """Path of a client of the original tree in a method's tree; None in centralized training."""
    kinds = plan.kinds
    for path in (spec.path, f"world/{flat_name(spec)}"):
        if kinds.get(path) == "client":
            return path
    return None


def _theta(plan: Plan, path: str) -> Flat:
    found = checkpoint.load(checkpoint.folder(plan.run_dir, path))
    if found is None:
        raise RunError(f"{plan.run_dir} has no checkpoint of {path}; delete the folder and compare again")
    return own_model(found[1])


def _levels(summary: dict[str, Any]) -> list[dict[str, int]]:
    """Bytes that cross each level of the tree: the edges below the world first."""
    levels: dict[int, dict[str, int]] = {}
    for path, node in summary["nodes"].items():
        depth = path.count("/")
        if depth:
            level = levels.setdefault(depth, {"level": depth, "bytes_up": 0, "bytes_down": 0})
            level["bytes_up"] += node["bytes_up"]
            level["bytes_down"] += node["bytes_down"]
    return [levels[depth] for depth in sorted(levels)]


def _read(out: Path, method: str, seed: int) -> dict[str, Any]:
    found = json.loads((out / "runs" / f"{method}-{seed}" / MEASURES).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _same_configuration(config: RunConfig, out: Path) -> None:
    """Check that the folder holds this comparison: methods and seeds may be added, the world may not change."""
    file = out / "world.json"
    mapping = json.loads(json.dumps(to_mapping(replace(config, run_dir=None, seed=0))))
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != mapping:
            raise RunError(f"{out} holds a comparison of another configuration; give another --out")
        return
    make_folder(out)
    try:
        file.write_text(json.dumps(mapping, indent=1), encoding="utf-8")
    except OSError as error:
        raise _unwritable(out, error) from error


def make_folder(out: Path) -> None:
    """Make the folder of a comparison, unless it exists.

    Raises:
        ConfigError: it holds a run.
        RunError: it cannot be made.
    """
    try:
        if (out / rundir.CONFIG).exists():
            raise ConfigError("--out", f"{pasted(out)} holds a run", "give another folder")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {pasted(out)}: {error.strerror}; give another --out")


REPLACED = {"seed": "--seeds", "method": "--methods", "run_dir": "--out"}
"""Keys that a comparison sets itself, each with its option."""


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse changes of keys that a comparison sets itself.

    Raises:
        ConfigError: there is such a change.
    """
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key in REPLACED:
            raise ConfigError(key, "a comparison sets it itself", f"use {REPLACED[key]}")
