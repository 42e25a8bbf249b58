"""A client's model on the client's validation text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.worlds import client

from worldlm_ray.client.measure import MeasuredModel
from worldlm_ray.errors import DataError
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan

Tiny = Callable[..., Plan]


def measured(plan: Plan) -> MeasuredModel:
    return MeasuredModel(plan, plan.root.clients[0])


def test_validation_loss_is_in_nats_per_byte_of_the_validation_part(tiny: Tiny) -> None:
    plan = tiny()
    model = measured(plan)
    assert model.has_validation
    # Zero parameters give every token the same probability.
    zeros = np.zeros(plan.layout.size, dtype=np.float32)
    assert model.validate(64, parameters=zeros) == pytest.approx(np.log(256))
    initial = build.initial(plan)
    assert model.validate(64, parameters=initial) != model.measure(64, parameters=initial).loss
    windows = model.dataset.validation_windows(64, context=16, batch_size=model.training.batch_size)
    nats, count = model.trainer.evaluate(windows, parameters=initial)
    assert count == 64
    assert model.validate(64, parameters=initial) == nats / count


def test_without_validation_text_there_is_no_loss_on_it(tiny: Tiny, tmp_path: Path) -> None:
    one = client("a", tmp_path, 1)
    one["data"]["validation_fraction"] = 0.0
    model = measured(tiny([one]))
    assert not model.has_validation
    with pytest.raises(DataError, match="validation: 0 tokens"):
        model.validate(64)


def test_a_client_with_record_privacy_has_no_validation_text(tiny: Tiny, tmp_path: Path) -> None:
    privacy = {"unit": "record", "noise_multiplier": 0.8, "target_epsilon": 3.0, "grad_sample_mode": "hooks"}
    private, open_ = client("a", tmp_path, 1, privacy=privacy), client("b", tmp_path, 2)
    plan = tiny([private, open_])
    assert [spec.settings.data.validation_fraction for spec in plan.root.clients] == [0.0, 0.05]
    assert not measured(plan).has_validation
