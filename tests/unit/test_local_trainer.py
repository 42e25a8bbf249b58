"""The training step: what it fetches from the device, which attention it runs, and compiled against plain."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from support.pretrained import shape_of
from torch.utils._python_dispatch import TorchDispatchMode

from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.training.local import LocalTrainer, is_compiled
from worldlm_ray.training.trainer import Batch


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def a_trainer(shape: ModelShape, **settings: Any) -> LocalTrainer:
    layout = shape.layout([])
    made = LocalTrainer(shape, layout, TrainingConfig(**settings), threads=1, device="cpu")
    made.write(initial_parameters(shape, layout, seed=0))
    return made


def batches(shape: ModelShape, count: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, shape.vocab_size, (count, 4, shape.context + 1))
    return [(rows[:, :-1].copy(), rows[:, 1:].copy()) for rows in drawn]


@pytest.mark.parametrize("steps", [1, 5])
def test_a_round_fetches_one_number(shape: ModelShape, steps: int) -> None:
    made = a_trainer(shape)
    made.run(batches(shape, 1), lambda _: 1e-3)  # the optimizer makes its state in its first step
    with Calls() as calls:
        made.run(batches(shape, steps), lambda _: 1e-3)
    assert calls.names["_local_scalar_dense"] == 1, "a step that fetches a number waits for the device"
    assert calls.names["nonzero"] == 0


def test_attention_runs_in_the_flash_kernel(shape: ModelShape) -> None:
    made = a_trainer(shape)
    with Calls() as calls:
        made.run(batches(shape, 1), lambda _: 1e-3)
    flash = {name: count for name, count in calls.names.items() if name.startswith("_scaled_dot_product_flash")}
    assert sum(count for name, count in flash.items() if not name.endswith("backward")) == shape.layers


@pytest.mark.parametrize(
    ("compile_", "recompute", "device", "expected"),
    [
        ("auto", False, "cpu", False),
        ("auto", False, "cuda", True),
        ("auto", True, "cuda", False),
        ("on", False, "cpu", True),
        ("off", False, "cuda", False),
    ],
)
def test_auto_compiles_on_cuda_alone(
    shape: ModelShape, compile_: Any, recompute: bool, device: str, expected: bool
) -> None:
    training = TrainingConfig(compile=compile_, activation_checkpointing=recompute)
    assert is_compiled(training, shape, torch.device(device)) == expected


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_auto_compiles_no_model_of_transformers(trainable: Any) -> None:
    adapters = shape_of((("q.weight", (2, 2)),), trainable=trainable)
    assert not is_compiled(TrainingConfig(compile="auto"), adapters, torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.timeout(600)  # the compiler takes half a minute of CPU time
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when it imports its compiler
def test_a_compiled_client_learns_the_same(shape: ModelShape) -> None:
    drawn = batches(shape, 20)
    plain, compiled = a_trainer(shape, compile="off"), a_trainer(shape, compile="on")
    losses = [[made.run([batch], lambda _: 3e-3).loss_sum for batch in drawn] for made in (plain, compiled)]
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-5)
    np.testing.assert_allclose(compiled.read(), plain.read(), atol=2e-4)
