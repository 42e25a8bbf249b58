"""DeepSpeed's configuration from ours, what is refused, and ZeRO's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client

from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports.describe import describe, misfits
from worldlm_ray.training.deepspeed_config import deepspeed_config, worker_bytes

Tiny = Callable[..., Plan]


def made(**changes: Any) -> dict[str, Any]:
    cuda = changes.pop("cuda", False)
    return deepspeed_config(TrainingConfig(**changes), workers=2, parameters=1 << 22, cuda=cuda)


def test_a_batch_is_shared_by_workers_and_parts() -> None:
    config = made(batch_size=32, accumulation_steps=4)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("clip", [0.0, 0.3, 1.0])
def test_clipping_is_always_said(clip: float) -> None:
    assert made(grad_clip=clip)["gradient_clipping"] == clip


def test_offloading_says_where_to() -> None:
    zero = made(zero_stage=3, offload_optimizer=True, offload_parameters=True)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert "offload_optimizer" not in made(zero_stage=3)["zero_optimization"]


@pytest.mark.parametrize(("stage", "bf16", "autocast"), [(0, False, True), (1, True, False), (3, True, False)])
def test_bf16_is_autocast_at_stage_0(stage: int, bf16: bool, autocast: bool) -> None:
    config = made(zero_stage=stage, cuda=True)
    assert config["bf16"]["enabled"] is bf16
    assert config["torch_autocast"]["enabled"] is autocast


def test_further_keys_are_passed_through_beside_ours() -> None:
    config = made(zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": True, "stage": 2}, "comms_logger": {}})
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["stage"] == 2
    assert config["comms_logger"] == {}


@pytest.mark.parametrize(
    ("further", "key"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage"),
        ({"gradient_clipping": 1.5}, "gradient_clipping"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params.lr"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type"),
        ({"train_batch_size": 8}, "train_batch_size"),
    ],
)
def test_a_key_that_contradicts_ours_is_refused_by_name(further: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(zero_stage=2, deepspeed=further)
    assert caught.value.key == f"training.deepspeed.{key}"
    assert "follows from training." in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"training": {"zero_stage": 4}}, "training.zero_stage"),
        ({"resources": {"workers": 0}}, "resources.workers"),
        ({"resources": {"workers": [2, 1]}}, "resources.workers"),
        ({"resources": {"workers": "many"}}, "resources.workers"),
        ({"resources": {"workers": 3}}, "training.batch_size"),
        ({"resources": {"workers": [1, 3]}}, "training.batch_size"),
        ({"training": {"accumulation_steps": 3}}, "training.batch_size"),
        ({"training": {"offload_optimizer": True}}, "training.offload_optimizer"),
        ({"training": {"deepspeed": {"wall_clock_breakdown": True}}}, "training.deepspeed"),
        ({"training": {"offload_parameters": True, "zero_stage": 2}}, "training.offload_parameters"),
        ({"training": {"offload_optimizer": True}, "resources": {"workers": 2}}, "training.offload_optimizer"),
        ({"training": {"zero_stage": 2}, "resources": {"gpus": 0.5}}, "resources.gpus"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny([client("a", tmp_path, 1, **settings)])
    assert caught.value.key == f"world.children[0].{key}"


def test_the_arithmetic_of_the_zero_paper() -> None:
    """Figure 1: 7.5e9 parameters, 64 workers, mixed precision: 31.4, 16.6 and 1.9 GB at stages 1, 2 and 3."""
    gigabytes = [
        worker_bytes(TrainingConfig(), parameters=7_500_000_000, workers=64, cuda=True, stage=stage).total / 1e9
        for stage in (1, 2, 3)
    ]
    assert gigabytes == pytest.approx([31.4, 16.6, 1.9], abs=0.05)


def test_offloaded_states_lie_on_the_host() -> None:
    training = TrainingConfig(offload_optimizer=True, offload_parameters=True)
    found = worker_bytes(training, parameters=100, workers=2, cuda=True, stage=3)
    assert found.host == found.total == 800
    assert worker_bytes(training, parameters=100, workers=2, cuda=True, stage=1).host == 600


def test_show_names_the_client_that_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    sharded = {"training": {"zero_stage": 2}, "resources": {"workers": 2, "memory_gb": 1e-5}}
    facts = describe(tiny([client("a", tmp_path, 1), client("b", tmp_path, 2, **sharded)]))
    assert facts["nodes"]["world/b"]["workers"]["stage"] == 2
    [line] = misfits(facts)
    assert line.startswith("world/b does not fit into")
