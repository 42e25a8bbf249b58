"""What measuring costs, in tokens: a small run in the proportions of a real one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray.client import above
from worldlm_ray.client.client import Client
from worldlm_ray.client.measure import MeasuredModel
from worldlm_ray.config.loading import to_mapping
from worldlm_ray.experiments.comparison_run import run_one
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import RoundRecord
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import Batch

Tiny = Callable[..., Plan]
ROUND = 256
"""Tokens of a local round of `tiny`."""
PROPORTIONS = {"tokens": ROUND // 5, "final_tokens": 8 * ROUND // 5, "validation_tokens": ROUND // 5}
"""Those of the defaults to a round of 20 steps of 1,024 tokens."""
TARGET = 0.15


class Counted:
    """Tokens that a run has trained and measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained = self.measured = self.held_out = 0
        run, evaluate, measure = LocalTrainer.run, LocalTrainer.evaluate, MeasuredModel.measure

        def counted_run(trainer: LocalTrainer, *given: Any, **named: Any) -> Any:
            result = run(trainer, *given, **named)
            self.trained += result.tokens
            return result

        def counted_evaluate(trainer: LocalTrainer, batches: Iterator[Batch], **named: Any) -> tuple[float, int]:
            nats, tokens = evaluate(trainer, batches, **named)
            self.measured += tokens
            return nats, tokens

        def counted_measure(model: MeasuredModel, tokens: int, **named: Any) -> Any:
            before = self.measured
            found = measure(model, tokens, **named)
            if tokens == PROPORTIONS["tokens"]:  # the measurements at the end have more
                self.held_out += self.measured - before
            return found

        monkeypatch.setattr(LocalTrainer, "run", counted_run)
        monkeypatch.setattr(LocalTrainer, "evaluate", counted_evaluate)
        monkeypatch.setattr(MeasuredModel, "measure", counted_measure)

    @property
    def share(self) -> float:
        """Of the run's computation."""
        measured = self.measured / above.FORWARD
        return measured / (measured + self.trained)


@pytest.mark.parametrize(
    "settings",
    [
        {"merge": {"client": "validated"}},
        {"merge": {"client": 1.0}},
        {"merge": {"client": 0.0}, "evaluation": {"keep_best": True}},
    ],
    ids=["own_model", "common_model", "best_round"],
)
def test_measuring_takes_a_small_share_of_a_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    evaluation = PROPORTIONS | settings.get("evaluation", {})
    plan = tiny(
        aggregation={"trigger": "synchronous"},
        budget={"rounds": 16},
        merge=settings["merge"],
        evaluation=evaluation,
    )
    counted = Counted(monkeypatch)
    simulate(rundir.create(plan))
    assert counted.trained >= 16 * ROUND * len(plan.root.clients)
    assert counted.share < TARGET
    clients, tokens = len(plan.root.clients), PROPORTIONS["tokens"]
    during = counted.held_out - 2 * clients * tokens  # at the start and after the last round, whatever the share
    allowed = (plan.config.evaluation.share + above.SHARE) * above.FORWARD * 16 * ROUND * clients
    assert 0 < during <= allowed


@pytest.mark.parametrize(
    ("every_rounds", "share", "expected"),
    [
        (1, 10.0, [1, 2, 3, 4, 5, 6, 7]),
        (1, 0.1, [1, 2, 3, 4, 5, 6, 7]),  # 51 / (3 * 256 * 0.1) = 0.66
        (1, 0.04, [2, 4, 6, 7]),  # 1.66; the last round is measured
        (3, 0.02, [6]),  # 3.3 rounds: the next multiple of three
        (3, 0.03, [3, 6]),
        (0, 10.0, []),
    ],
)
def test_rounds_are_measured_as_often_as_their_share_allows(
    tiny: Tiny, every_rounds: int, share: float, expected: list[int]
) -> None:
    evaluation = PROPORTIONS | {"every_rounds": every_rounds, "share": share}
    records: list[RoundRecord] = []
    simulate(
        rundir.create(tiny(aggregation={"trigger": "synchronous"}, budget={"rounds": 7}, evaluation=evaluation)),
        on_record=lambda record: records.append(record) if isinstance(record, RoundRecord) else None,
    )
    measured = [record.round for record in records if record.node == "world/north/a" and record.loss is not None]
    assert measured == expected


def test_the_best_round_is_looked_for_in_every_round(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny(evaluation=PROPORTIONS | {"keep_best": True, "share": 1e-6}, budget={"rounds": 5})
    validated: list[int] = []

    def validate(client: Client, tokens: int, **_: Any) -> float:
        validated.append(client.round)
        return math.inf

    monkeypatch.setattr(Client, "validate", validate)
    simulate(rundir.create(plan))
    assert {0, 1, 2, 3, 4, 5} == set(validated)


def test_a_comparison_measures_no_model_twice_on_a_text(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    evaluate = LocalTrainer.evaluate

    def noted(trainer: LocalTrainer, batches: Iterator[Batch], *, parameters: Any = None) -> tuple[float, int]:
        read = list(batches)
        values = trainer.read() if parameters is None else parameters
        digest = hashlib.sha256(values.tobytes())
        for inputs, _ in read:
            digest.update(inputs.tobytes())
        measured.append(digest.hexdigest())
        return evaluate(trainer, read, parameters=parameters)

    monkeypatch.setattr(LocalTrainer, "evaluate", noted)
    evaluation = {"tokens": 48, "final_tokens": 512, "every_rounds": 1}
    run_one(to_mapping(tiny(budget={"rounds": 3}, evaluation=evaluation).config), "fedavg", 0, str(tmp_path / "out"))
    assert len(measured) > 4
    assert len(set(measured)) == len(measured)
