"""Ray Train's controller: a trainer without its cleaner, its callbacks, and how it makes placement groups.

Ray Train has no setting for the name of a placement group, and none that leaves its cleaner out. Importing it takes
two seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util.placement_group import PlacementGroup


class Callbacks(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Base of callbacks that run in the controller: once it has started, and before each group of workers starts."""


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Without the process in which Ray Train waits for its controller's death, and which may wait for ever."""

    def _create_default_callbacks(self) -> list[Any]:
        made: list[Any] = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]


def reserve_by(make: Callable[..., PlacementGroup]) -> None:
    """Have the controller that runs in this process make its placement groups by `make`.

    Args:
        make: called as `ray.util.placement_group.placement_group` is.
    """
    worker_group.placement_group = make
