"""One run of a comparison: one method with one seed, simulated and measured.

A method has one stage or two (see stages.py). The folder of the run is that of its last stage; an earlier one lies in
`base/` below it. `measures.json` holds the result, once it is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worldlm_ray.client.best import own_model
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.data import Dataset, prepare
from worldlm_ray.errors import RunError
from worldlm_ray.experiments.comparison_curve import Curve
from worldlm_ray.experiments.comparison_numbers import is_alone
from worldlm_ray.experiments.comparison_progress import DONE, MEASURING, TRAINING, WAITING, RunProgress
from worldlm_ray.experiments.export import export_whole
from worldlm_ray.experiments.methods import ALL, flat_name
from worldlm_ray.experiments.stages import SHARE, from_model, has_two, stages
from worldlm_ray.plan import rundir, tree
from worldlm_ray.plan.initial_model import with_tokenizer
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking.status import read_status
from worldlm_ray.training.local import LocalTrainer, device_of

MEASURES, CURVE = "measures.json", "curve.json"
LOSSES = "losses"
"""In the file of the curves: the losses at the end of the last stage, by node and then by client."""
BASE, MODEL = "base", "model"
"""Folders below that of a run: its first stage, and below that the model which the second begins from."""
SHORTER = 16
"""Every client's model is measured on every client's text, n^2 times: so on fewer tokens than its own text."""
FLOPS_PER_PARAMETER = 6
"""Of training, by token and parameter: two forward, four backward (arXiv 2001.08361). Attention is left out."""
FLOPS_PER_FROZEN = 4
"""By token and parameter that is not trained: two forward, and two backward for the gradient of its inputs."""


@dataclass(frozen=True)
class _Stage:
    """A stage of a run."""

    plan: Plan
    summary: dict[str, Any]
    """Empty before its end."""


def folder_of(out: Path, method: str, seed: int) -> Path:
    """Folder of a run."""
    return out / "runs" / f"{method}-{seed}"


def progress_of(out: Path, method: str, seed: int, *, since: float) -> RunProgress:
    """The progress of one run, by the files that its process has written since this comparison began or continued."""
    folder = folder_of(out, method, seed)
    state, trained = WAITING, 0.0
    if (folder / MEASURES).is_file():
        state, trained = DONE, 1.0
    elif (folder / CURVE).is_file():
        # A run that an interrupted comparison has trained waits to be measured.
        state, trained = (MEASURING if (folder / CURVE).stat().st_mtime >= since else WAITING), 1.0
    else:
        second = SHARE if has_two(method) else 1.0
        for place, before, share in ((folder / BASE, 0.0, 1.0 - second), (folder, 1.0 - second, second)):
            with suppress(RunError):
                status = read_status(place)
                if float(status.get("updated_at", 0.0)) >= since:
                    state, trained = TRAINING, before + share * float(status.get("progress", 0.0))
    return RunProgress(method=method, seed=seed, state=state, trained=trained)


def read(out: Path, method: str, seed: int) -> dict[str, Any]:
    """The result of a run that is done."""
    found = json.loads((folder_of(out, method, seed) / MEASURES).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def run_one(mapping: dict[str, Any], method: str, seed: int, out: str) -> dict[str, Any]:
    """Simulate and measure one method with one seed, unless that is done."""
    folder = folder_of(Path(out), method, seed)
    if (folder / MEASURES).is_file():
        return read(Path(out), method, seed)
    world = with_tokenizer(from_mapping(mapping, resolved=True))
    configs = [replace(config, seed=seed) for config in stages(world, method)]
    places = [folder] if len(configs) == 1 else [folder / BASE, folder]
    if len(configs) > 1:
        configs[1] = from_model(configs[1], str(folder / BASE / MODEL))
    if not (folder / CURVE).is_file():
        if folder.exists():
            shutil.rmtree(folder)  # of an interrupted run: a simulation starts over
        found = _train(configs, places, world=not is_alone(method))
        (folder / CURVE).write_text(json.dumps(found), encoding="utf-8")
    done = [_done(config, place) for config, place in zip(configs, places, strict=True)]
    trained = json.loads((folder / CURVE).read_text(encoding="utf-8"))
    measured = {
        "method": method,
        "seed": seed,
        "virtual_s": sum(stage.summary["wall_s"] for stage in done),
        "tokens": sum(stage.summary["tokens"] for stage in done),
        "flops": sum(flops(stage.plan, stage.summary["nodes"]) for stage in done),
        "clients": _measure(tree.build(world).clients, done, trained.pop(LOSSES), validates=is_alone(method)),
        "levels": levels([stage.summary for stage in done]),
        **trained,
    }
    temporary = folder / f".{MEASURES}"
    temporary.write_text(json.dumps(measured), encoding="utf-8")
    temporary.replace(folder / MEASURES)
    return measured


def _train(configs: Sequence[RunConfig], places: Sequence[Path], *, world: bool) -> dict[str, Any]:
    """Simulate the stages of a run.

    Args:
        configs: of the stages.
        places: their folders.
        world: whether the world's model is measured during the run.

    Returns:
        Its curves, and the losses that its last stage has measured at its end.
    """
    curve: list[dict[str, float]] = []
    world_curve: list[dict[str, float]] = []
    taken: dict[str, dict[str, float]] = {}
    tokens, virtual_s = 0, 0.0
    for index, (config, place) in enumerate(zip(configs, places, strict=True)):
        if index:
            export_whole(str(places[index - 1]), ALL, places[index - 1] / MODEL)
        plan = rundir.create(make_plan(replace(config, run_dir=str(place))))
        found = Curve(plan, tokens=tokens, virtual_s=virtual_s, world=world and not index)
        # A comparison shows no losses of other inner nodes, and of the stage before none.
        nodes = ["world"] if world and len(configs) == 1 else []
        outcome = simulate(plan, on_progress=found.add_points, on_record=found.add_record, measured=nodes)
        tokens, virtual_s = tokens + outcome.summary["tokens"], virtual_s + outcome.summary["wall_s"]
        curve, world_curve, taken = curve + found.points, world_curve + found.world, taken or found.taken
    losses = {node: {client: m.loss for client, m in each.items()} for node, each in outcome.texts.items()}
    return {"curve": curve, "world_curve": world_curve, "taken": taken, LOSSES: losses}


def _done(config: RunConfig, place: Path) -> _Stage:
    summary = json.loads((place / rundir.SUMMARY).read_text(encoding="utf-8"))
    return _Stage(make_plan(replace(config, run_dir=str(place))), summary)


class _Text:
    """One client's text, and the losses of models on it, in nats per byte.

    Args:
        dataset: the text.
        trainer: evaluates.
        context: of the model.
        batch_size: the client's: sums then have the same bits as those of the run.
    """

    def __init__(self, dataset: Dataset, trainer: LocalTrainer, *, context: int, batch_size: int) -> None:
        self._dataset, self._trainer = dataset, trainer
        self._windows = {"context": context, "batch_size": batch_size}

    def loss(self, parameters: Flat, tokens: int) -> float:
        """On the held-out part."""
        windows = self._dataset.heldout_windows(tokens, **self._windows)
        nats, count = self._trainer.evaluate(windows, parameters=parameters)
        return float(nats / count / self._dataset.heldout_bytes_per_token())


def _measure(
    originals: list[NodeSpec], done: Sequence[_Stage], known: Mapping[str, Mapping[str, float]], *, validates: bool
) -> list[dict[str, Any]]:
    """Losses on each client's text: its own model, the world's, and every other client's.

    The world's model is that of the first stage, a client's own that of the last. Of texts in one place, it is that of
    their best round.

    Args:
        originals: the clients of the world, whatever the method makes of them.
        done: the stages.
        known: losses that the last stage has measured. They are not measured again.
        validates: whether the loss is given that each client's own model was chosen by.
    """
    first, last = done[0], done[-1]
    tokens, shape = last.plan.config.evaluation.final_tokens, last.plan.shape
    world = _theta(first.plan, ALL if len(done) > 1 else "world")
    nodes = {spec.path: _node_of(spec, last.plan) for spec in originals}
    models = {path: _theta(last.plan, node) if node else world for path, node in nodes.items()}
    settings = originals[0].settings

    def trainer_of(stage: _Stage) -> LocalTrainer:
        device = device_of(settings.resources)
        return LocalTrainer(stage.plan.shape, stage.plan.layout, settings.training, threads=1, device=device)

    trainer = trainer_of(last)
    # Adapters of the first stage belong to the model that this stage began from.
    trainer_of_world = trainer if first.plan.shape == shape else trainer_of(first)
    rows = []
    for spec in originals:
        own, of_world = (known.get(node or "", {}).get(nodes[spec.path] or "") for node in (nodes[spec.path], "world"))
        dataset = prepare(spec.settings.data, context=shape.context, key=f"{spec.key}.data")
        windows = {"context": shape.context, "batch_size": spec.settings.training.batch_size}
        text, text_of_world = (_Text(dataset, each, **windows) for each in (trainer, trainer_of_world))
        counted = [
            stage.summary["nodes"][_node_of(spec, stage.plan) or stage.plan.root.clients[0].path] for stage in done
        ]
        rows.append(
            {
                "client": spec.path,
                "own": text.loss(models[spec.path], tokens) if own is None else own,
                "validation": _best_loss(last.plan, nodes[spec.path] or "") if validates else None,
                "world": text_of_world.loss(world, tokens) if of_world is None or len(done) > 1 else of_world,
                "by_model": {path: text.loss(theta, tokens // SHORTER) for path, theta in models.items()},
                "best_round": counted[-1]["best_round"],
                **{name: sum(each[name] for each in counted) for name in ("steps", "bytes_up", "bytes_down")},
            }
        )
    return rows


def _node_of(spec: NodeSpec, plan: Plan) -> str | None:
    """Path of a client of the original tree in a method's tree; None where all texts are pooled."""
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


def _best_loss(plan: Plan, path: str) -> float | None:
    """On validation text, of the model of a client's best round, nats per byte; None of one that keeps none."""
    meta, _ = checkpoint.load(checkpoint.folder(plan.run_dir, path)) or ({}, {})
    best = meta.get("best")
    return float(best["loss"]) if best else None


def flops(plan: Plan, nodes: dict[str, Any]) -> int:
    """Floating-point operations of a run's training; of a client that trains two models with each token, of both.

    Args:
        plan: the run.
        nodes: of its summary.json.
    """
    total = 0
    for spec in plan.root.clients:
        models, (_, trained) = spec.settings.merge.models_per_token, plan.model_of(spec)
        of_token = FLOPS_PER_PARAMETER * trained.size + FLOPS_PER_FROZEN * plan.shape.frozen
        total += of_token * nodes[spec.path]["tokens"] * models
    return total


def levels(summaries: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Bytes that cross each level of the tree, in all stages: the edges below the world first."""
    found: dict[int, dict[str, int]] = {}
    for path, node in ((path, node) for summary in summaries for path, node in summary["nodes"].items()):
        depth = path.count("/")
        if depth:
            level = found.setdefault(depth, {"level": depth, "bytes_up": 0, "bytes_down": 0})
            level["bytes_up"] += node["bytes_up"]
            level["bytes_down"] += node["bytes_down"]
    return [found[depth] for depth in sorted(found)]
