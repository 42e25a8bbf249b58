"""A client after a restart, and after its update was refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import save
from worldlm_ray.errors import RunError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports.outcome import finish
from worldlm_ray.tracking.tracker import Tracker


@pytest.fixture
def plan(tiny: Callable[..., Plan]) -> Plan:
    return tiny(budget={"rounds": 5})


def a_client(plan: Plan) -> Client:
    return Client(plan, plan.root.clients[0])


def model(plan: Plan, *, version: int = 0, values: np.ndarray | None = None) -> Model:
    values = build.initial(plan) if values is None else values
    return Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=values)


def refusal(reason: str) -> Verdict:
    return Verdict(reason=reason, seq=1, base_version=0, version=0, tau=0)


def a_round(client: Client, parent: Model) -> None:
    client.begin(parent, now_s=0.0)
    client.train()
    client.update()


def test_a_round_that_was_interrupted_goes_on_to_the_same_bits(plan: Plan) -> None:
    whole, parts = a_client(plan), a_client(plan)
    a_round(whole, model(plan))
    parts.begin(model(plan), now_s=0.0)
    asked = iter([False, False, True])
    parts.train(lambda: next(asked))
    assert (parts.step, parts.round) == (2, 0)
    again = a_client(plan)
    again.restore(*parts.state())
    again.train()
    assert again.round == 1
    assert again.trainer.read().tobytes() == whole.trainer.read().tobytes()


def test_rounds_that_the_parent_has_accepted_are_not_done_again(plan: Plan) -> None:
    client = a_client(plan)
    a_round(client, model(plan))
    saved = client.state()
    client.begin(model(plan), now_s=0.0)  # it went on, pushed rounds 2 and 3, and was killed
    back = a_client(plan)
    back.restore(*saved)
    back.welcomed(Welcome(incarnation=1, last_seq=3, durable_seq=3))
    assert (back.round, back.seq, back.began) == (3, 3, False)
    assert back.steps == 3 * plan.root.settings.training.local_steps
    assert back.tokens == 3 * back.round_tokens


def test_a_client_that_knows_as_much_as_its_parent_goes_on_with_its_round(plan: Plan) -> None:
    client = a_client(plan)
    client.begin(model(plan), now_s=0.0)
    client.welcomed(Welcome(incarnation=1, last_seq=0, durable_seq=0))
    assert client.began


def test_a_client_that_has_diverged_takes_its_parents_model_whole(plan: Plan) -> None:
    client = a_client(plan)
    a_round(client, model(plan))
    client.trainer.write(np.full(plan.layout.size, np.nan, np.float32))
    client.answered(1, refusal("not_finite"))
    client.begin(model(plan, version=1), now_s=0.0)
    assert client.trainer.read().tobytes() == build.initial(plan).tobytes()
    assert client.trainer.optimizer_state() == {}
    client.train()
    assert np.isfinite(client.trainer.read()).all()


def test_a_stale_client_keeps_its_model(plan: Plan) -> None:
    client = a_client(plan)
    a_round(client, model(plan))
    client.answered(1, refusal("stale"))
    client.begin(model(plan, version=1), now_s=0.0)
    assert client.trainer.optimizer_state() != {}


def test_a_budget_of_seconds_trains_from_the_first_round_on(tiny: Callable[..., Plan]) -> None:
    plan = tiny(budget={"seconds": 60.0})
    client = a_client(plan)
    client.begin(model(plan), now_s=0.0)
    client.train()
    assert client.learning_rate > 0.5 * plan.root.settings.training.lr


def ended(plan: Plan, *, backend: str) -> None:
    plan.run_dir.mkdir()
    save(plan.config, plan.run_dir / "config.yaml")
    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams={}, budget=plan.config.budget)
    finish(
        plan,
        tracker,
        world=build.initial(plan),
        measures={},
        samples={},
        wall_s=1.0,
        status="finished",
        backend=backend,
    )
    tracker.close()


def test_a_run_at_its_full_budget_wants_a_larger_one(plan: Plan) -> None:
    ended(plan, backend="ray")
    with pytest.raises(RunError, match="full budget"):
        rundir.resume(str(plan.run_dir), [])
    assert rundir.resume(str(plan.run_dir), ["budget.rounds=9"]).config.budget.rounds == 9
    # An attempt that did not begin keeps the results, and can be made again without the change.
    assert (plan.run_dir / "summary.json").exists()
    assert rundir.resume(str(plan.run_dir), []).config.budget.rounds == 9
    rundir.forget_end(plan.run_dir)
    assert not (plan.run_dir / "summary.json").exists()
    assert rundir.resume(str(plan.run_dir), []).config.budget.rounds == 9


def test_a_simulation_is_not_continued_on_ray(plan: Plan) -> None:
    ended(plan, backend="simulate")
    with pytest.raises(RunError, match="simulation"):
        rundir.resume(str(plan.run_dir), ["budget.rounds=9"])


def test_a_run_folder_with_a_colon_in_its_name_is_found_again(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "a: b #c"
    folder.mkdir()
    save(plan.config, folder / "config.yaml")
    assert rundir.reopen(str(folder)).run_dir == folder
