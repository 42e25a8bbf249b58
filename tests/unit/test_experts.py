"""Worlds of clients with kin experts: sums, leaving, settings, and what is there after the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.drift import Drift, whole_run
from support.experts import plan_of, raw, tokens
from support.nodes import pulled

from worldlm_ray.aggregation.sums import GRID, on_grid
from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.replies import Welcome
from worldlm_ray.experiments.evaluate import evaluate, load_model, sample
from worldlm_ray.experiments.export import export
from worldlm_ray.experiments.methods import set_everywhere
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.describe import describe
from worldlm_ray.simulation.simulator import Simulation, simulate
from worldlm_ray.tensors.buffers import params_sha256
from worldlm_ray.training.experts import ExpertTrainer
from worldlm_ray.training.making import plain_trainer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- worlds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("method", ["kin", "fedalt"])
def test_a_world_learns(tmp_path: Path, base: Path, method: str, freeze_a: bool) -> None:
    summary = simulate(rundir.create(plan_of(tmp_path, base, method, freeze_a=freeze_a))).summary
    for path, node in summary["nodes"].items():
        assert node["loss"] < node["loss_start"] - 0.02, path


def finished(plan: Plan, make_client: Any = Client) -> Simulation:
    """A whole simulated run."""
    return whole_run(plan, plan.run_dir, make_client=make_client)[0]


def drifting(plan: Plan, spec: Any, **settings: Any) -> Client:
    sign = 0.01 * (1.0 + plan.root.clients.index(spec))
    return Client(plan, spec, make_trainer=lambda _: Drift(plan.layout.size, sign), **settings)


def check_sums(simulation: Simulation) -> None:
    """Every sum holds what its children have, and no child more or less."""
    for path, node in simulation.nodes.items():
        sums = node.published.sums
        assert sums is not None
        parts = [c.experts.own_part for p, c in simulation.clients.items() if p.rpartition("/")[0] == path]
        parts += [n.parent.own_part for p, n in simulation.nodes.items() if p.rpartition("/")[0] == path and n.parent]
        np.testing.assert_array_equal(sums.total, sum(part.held for part in parts), err_msg=path)
        assert sums.newest_weight == sum(part.weight for part in parts)
    for path, client in simulation.clients.items():
        own = client.experts.own_part
        assert own.is_known
        np.testing.assert_array_equal(own.held, on_grid(client.trainer.read(), own.weight), err_msg=path)


@pytest.mark.parametrize("method", ["kin", "kin+asynchronous", "kin+asynchronous+overlap"])
@pytest.mark.parametrize("seed", range(3))
def test_sums_hold_every_part_once_whatever_fails(tmp_path: Path, base: Path, method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    paths = ["world", "world/north", "world/south", *(f"world/{c}" for c in ("north/a", "north/b", "south/c"))]
    faults = [f"{at:.2f}s kill {rng.choice(paths)}" for at in sorted(rng.uniform(0.2, 3.0, size=5))]
    slow = {"tokens_per_s": 512.0, "latency_s": 0.01}
    plan = plan_of(
        tmp_path, base, method, faults=faults, simulation=slow, checkpoint={"every_s": 0.7}, budget={"rounds": 8}
    )
    check_sums(finished(plan, drifting))


def test_a_killed_client_goes_on_to_the_same_bits(tmp_path: Path, base: Path) -> None:
    slow = {"tokens_per_s": 256.0, "latency_s": 0.01}
    found = []
    for name, faults in (("whole", ["90s kill world/north/a"]), ("killed", ["2.5s kill world/north/a"])):
        (tmp_path / name).mkdir()
        plan = plan_of(tmp_path / name, base, faults=faults, simulation=slow, checkpoint={"every_s": 0.5})
        simulation = finished(plan)
        check_sums(simulation)
        state = {path: client.trainer.optimizer_state() for path, client in simulation.clients.items()}
        hashes = {
            f"{path}.{name}": params_sha256(values) for path, all_ in state.items() for name, values in all_.items()
        }
        found.append(hashes | {path: params_sha256(node.theta) for path, node in simulation.nodes.items()})
    assert found[0] == found[1]


def test_the_model_of_a_node_is_the_mean_of_its_clients(tmp_path: Path, base: Path) -> None:
    simulation = finished(plan_of(tmp_path, base), drifting)
    check_sums(simulation)
    for path, node in simulation.nodes.items():
        below = [c.trainer.read() for p, c in simulation.clients.items() if p.startswith(f"{path}/")]
        np.testing.assert_allclose(node.theta, np.mean(below, axis=0), atol=2 * GRID)


@pytest.mark.parametrize(
    ("client", "federation"), [(1.0, 0.0), (1.0, 1.0), (1.0, 0.5), (0.25, 0.0), (0.25, 1.0), (0.0, 0.0), (0.0, 1.0)]
)
def test_own_adapters_move_to_the_mean_of_their_federation_and_of_all(
    tmp_path: Path, base: Path, client: float, federation: float
) -> None:
    begun: dict[str, list[float]] = {}

    class Watched(Client):
        def begin(self, model: Any, *, now_s: float) -> Any:
            records = super().begin(model, now_s=now_s)
            begun.setdefault(self.spec.path, []).append(float(self.trainer.read()[0]))
            return records

    def watched(plan: Plan, spec: Any, **settings: Any) -> Client:
        sign = 0.01 * (1.0 + plan.root.clients.index(spec))
        return Watched(plan, spec, make_trainer=lambda _: Drift(plan.layout.size, sign), **settings)

    mapping = to_mapping(plan_of(tmp_path, base, freeze_a=True).config)  # B begins at 0
    set_everywhere(mapping, ["merge"], {"client": client, "federation": federation})
    simulation = finished(make_plan(from_mapping(mapping, resolved=True)), watched)
    starts = np.array(list(begun.values()))  # [clients, rounds]
    assert starts.shape == (4, 4)
    last = np.array([float(simulation.clients[path].trainer.read()[0]) for path in begun])
    if client == 0.0:  # a client has what it has learned itself, and nothing else
        np.testing.assert_allclose(last / last.max(), [0.25, 0.5, 0.75, 1.0], rtol=1e-3)
    for before, after in zip(starts.T[:-1], starts.T[1:], strict=True):
        drift = (after.mean() - before.mean()) * np.array([0.4, 0.8, 1.2, 1.6])
        pushed = (before + drift).reshape(2, 2)  # [federations, clients]
        means = (1 - federation) * pushed.mean(axis=1, keepdims=True) + federation * pushed.mean()
        expected = (1 - client) * pushed + client * means
        np.testing.assert_allclose(after, expected.ravel(), atol=4 * GRID)


def test_a_newcomer_begins_from_the_mean_of_its_federation(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    client = Client(plan, plan.root.clients[0])
    near, far = (np.full(plan.layout.size, value, np.float32) for value in (0.1, 0.5))
    client.begin(pulled(near, 3, weight=64, rest=far, rest_weight=192), now_s=0.0)
    np.testing.assert_array_equal(client.trainer.read(), near)  # merge.federation is 0
    assert isinstance(client.trainer, ExpertTrainer)
    found = {name: float(values.mean()) for name, values in client.trainer.experts.others.items()}
    assert found == pytest.approx({"federation": 0.1, "world": 0.5})


def test_where_no_sibling_has_a_part_a_newcomer_begins_from_what_there_is(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    nothing = np.zeros(plan.layout.size, np.float32)  # what sums publish that all have left
    model = pulled(nothing, 9, weight=0)
    client = Client(plan, plan.root.clients[0])
    initial = client.trainer.read()
    assert initial.any()
    client.begin(model, now_s=0.0)
    np.testing.assert_array_equal(client.trainer.read(), initial)

    far = np.full(plan.layout.size, 0.5, np.float32)
    other = Client(plan, plan.root.clients[0])
    other.begin(replace(model, rest=far, rest_weight=192), now_s=0.0)
    np.testing.assert_array_equal(other.trainer.read(), far)


def test_a_client_that_has_diverged_goes_on_from_the_mean_with_the_experts_of_others(
    tmp_path: Path, base: Path
) -> None:
    plan = plan_of(tmp_path, base)
    client = Client(plan, plan.root.clients[0])
    values = np.full(plan.layout.size, 0.1, np.float32)
    client.round, client.start_over = 2, True
    client.trainer.write(np.full(plan.layout.size, np.nan, np.float32))
    assert isinstance(client.trainer, ExpertTrainer)
    client.trainer.experts.router.fill_(np.nan)
    client.begin(pulled(values, 3, last_seq=2, weight=128), now_s=0.0)
    np.testing.assert_array_equal(client.trainer.read(), values)
    assert next(router.bias.tolist() for router in client.trainer.experts.routers) == [0.0, -1.0, -1.0]
    np.testing.assert_allclose(client.trainer.experts.others["federation"].numpy(), 0.1, rtol=1e-6)
    assert not client.start_over


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"trainable": "all"}}, "model.lora.experts"),
        ({"model": {"key_layers": ["*.1.*"]}}, "model.lora.experts"),
        ({"aggregation": {"rule": "mean"}}, "world.aggregation.rule"),
        ({"aggregation": {"rule": "sums", "buffer_size": 2}}, "world.aggregation.rule"),
        ({"aggregation": {"rule": "sums", "staleness": {"fn": "polynomial"}}}, "world.aggregation.rule"),
        ({"exchange": {"codec": "int8"}}, "world.exchange.codec"),
        ({"merge": {"client": "validated"}}, "merge.client"),
        ({"merge": {"client": "apart"}}, "merge.client"),
        ({"merge": {"client": 0.0, "fine_tune": 0.2}}, "merge.fine_tune"),
        ({"merge": {"client": 0.0, "serve_parent": True}}, "merge.serve_parent"),
        ({"evaluation": {"keep_best": True}}, "evaluation.keep_best"),
        ({"privacy": {"unit": "record", "noise_multiplier": 1.0}}, "privacy.unit"),
        ({"training": {"zero_stage": 1}}, "training.zero_stage"),
        ({"simulation": {"train": False}}, "simulation.train"),
    ],
)
def test_what_experts_do_not_go_with_is_told(tmp_path: Path, base: Path, changes: dict[str, Any], key: str) -> None:
    sound = raw(tmp_path, base) | {"merge": {"client": 0.0}, "aggregation": {"rule": "sums"}}
    sound["model"] = sound["model"] | {"lora": {"experts": "kin", "freeze_a": True}}
    make_plan(from_mapping(sound))
    broken = sound | {name: (sound[name] | value if name == "model" else value) for name, value in changes.items()}
    with pytest.raises(ConfigError) as caught:
        make_plan(from_mapping(broken))
    assert caught.value.each[0].key.endswith(key)


def test_methods_configure_a_tree_or_none(tmp_path: Path, base: Path) -> None:
    kin, fedalt = (plan_of(tmp_path, base, method) for method in ("kin", "fedalt"))
    assert [plan.config.model.lora.experts for plan in (kin, fedalt)] == ["kin", "rest"]
    assert [len(plan.root.children) for plan in (kin, fedalt)] == [2, 4]
    assert kin.layout.hash == fedalt.layout.hash


# ---- leaving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["synchronous", "goal_achieved"])
def test_a_client_that_forgets_takes_its_part_along(tmp_path: Path, base: Path, trigger: str) -> None:
    def forgetting(plan: Plan, spec: Any, **settings: Any) -> Client:
        client = drifting(plan, spec, **settings)
        if spec.name == "a":
            assert client.experts is not None
            client.experts.forget()
        return client

    variant = "kin" if trigger == "synchronous" else "kin+asynchronous"
    slow = {"tokens_per_s": 512.0, "latency_s": 0.01}
    plan = plan_of(tmp_path, base, variant, faults=["1.5s leave world/north/a"], simulation=slow, budget={"rounds": 8})
    simulation = finished(plan, forgetting)
    sums = simulation.nodes["world/north"].published.sums
    gone, stays = (simulation.clients[f"world/north/{name}"] for name in "ab")
    assert gone.round > 1
    assert not gone.experts.own_part.held.any()
    assert sums is not None
    assert list(sums.weights) == ["b"]
    np.testing.assert_array_equal(sums.total, on_grid(stays.trainer.read(), stays.experts.weight))


def test_a_client_that_has_lost_its_checkpoints_cannot_forget(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    client = drifting(plan, plan.root.clients[0])
    assert client.experts is not None
    client.welcomed(Welcome(incarnation=1, last_seq=3, durable_seq=3))
    with pytest.raises(ConfigError, match="without a checkpoint"):
        client.experts.forget()


# ---- after the run -------------------------------------------------------------------------------------------------


def test_checkpoints_give_the_mixture_and_the_worlds_adapter(tmp_path: Path, base: Path) -> None:
    plan = rundir.create(plan_of(tmp_path, base))
    summary = simulate(plan).summary
    measured = evaluate(str(plan.run_dir), tokens=256)
    for path, measure in measured.items():
        assert measure.loss == pytest.approx(summary["nodes"][path]["loss"], rel=1e-6), path
    assert sample(str(plan.run_dir), "world/north/a", prompt="the", tokens=4, temperature=0.0, seed=0)

    export(str(plan.run_dir), "world", tmp_path / "adapter")
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
    trainer: Any = plain_trainer(plan.shape, plan.layout, plan.root.clients[0].settings)
    load_model(trainer, plan, plan.root)
    with torch.no_grad():
        there = adapted.eval()(input_ids=tokens()).logits
        torch.testing.assert_close(trainer.model.eval()(tokens()), there, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="no one adapter"):
        export(str(plan.run_dir), "world/north/a", tmp_path / "mixture")


def test_show_counts_the_buffers_of_sums(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    nodes, size = describe(plan)["nodes"], plan.layout.nbytes
    moved = {path: (node.get("bytes_per_push"), node.get("bytes_per_pull")) for path, node in nodes.items()}
    assert moved["world/north"] == (2 * size, size)
    assert moved["world/north/a"] == (size, 2 * size)
    assert nodes["world/north"]["memory_bytes"] > 7 * size
