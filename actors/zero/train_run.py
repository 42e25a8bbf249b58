"""The run of Ray Train that trains a ZeRO client's model. Its workers live as long as the client does.

Their start is paid once and not every round.
"""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.graceful_shutdown import stay_to_the_end
from actors.shared import end_process
from actors.zero.capacity import room_for_others
from actors.zero.tasks import LOOK_S, TaskQueue
from actors.zero.worker import work
from worldlm_ray.launch.private import train
from worldlm_ray.launch.private.reservations import give_back, prefix
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.storage import filesystem

RESIZE_S = 5.0
"""How often Ray Train looks for more workers where their number is a range."""


@dataclass(frozen=True)
class TrainRun:
    """Ray Train's run for one client, from the start of the workers to the end of the client."""

    plan: Plan
    spec: NodeSpec
    namespace: str
    """Of the run's actors."""
    token: str
    """Of the client's incarnation."""

    def until_over(self, queue: TaskQueue, noise: float) -> None:
        """Train until the client ends or its workers cannot be had, which the queue is told.

        Args:
            queue: the client's.
            noise: noise multiplier of a private client, else 0.
        """
        low, high = self.spec.settings.resources.worker_range
        try:
            # What an earlier incarnation has left must not keep the workers of this one from finding room.
            give_back(prefix(self.namespace, self.spec.path))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = self._trainer(noise)
                with room_for_others(self.plan, self.namespace) if low < high else nullcontext():
                    trainer.fit()
            queue.end(f"{self.spec.path}: its workers have left; resume the run")
        except Exception as error:  # noqa: BLE001  # whatever it is, the client must not wait for ever
            lines = [line for line in str(error).splitlines() if line.strip()]
            said = lines[-1] if lines else type(error).__name__
            queue.end(f"{self.spec.path}: its workers failed: {said}; mend that and resume the run")

    def _trainer(self, noise: float) -> train.Trainer:
        resources, labels = self.spec.settings.resources, dict(self.spec.settings.placement.labels)
        low, high = resources.worker_range
        config = {
            "plan": self.plan,
            "path": self.spec.path,
            "namespace": self.namespace,
            "token": self.token,
            "noise": noise,
        }
        wanted = {"CPU": float(resources.cpus)} | ({"GPU": resources.gpus} if resources.gpus else {})
        path, filesystem = self._storage()
        return train.Trainer(
            work,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=low if low == high else (low, high),
                use_gpu=resources.gpus > 0,
                resources_per_worker=wanted,
                label_selector=labels or None,
                elastic_resize_monitor_interval_s=RESIZE_S,
            ),
            run_config=RunConfig(
                name=f"{self.spec.name}-{self.token}",
                storage_path=path,
                storage_filesystem=filesystem,
                # The trainer above decides which failure is the last: it counts those in a row, not all of them.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
                callbacks=[_Reservations(self.namespace, self.spec.path, self.token)],
            ),
        )

    def _storage(self) -> tuple[str, Any]:
        """Where Ray Train keeps its own notes: a path and a file system."""
        folder = self.plan.run_dir / "workers" / self.spec.path
        with suppress(FileExistsError):
            filesystem.make_folder(folder)
        return filesystem.for_arrow(folder)


class _Reservations(train.Callbacks):
    """Part of Ray Train's controller: has its placement groups carry names (see launch/private/reservations.py).

    The controller may outlive its client, see the workers die, and reserve room for others after all reservations had
    been given back. So it checks after each reservation that its client lives: the end of the client removes it then.

    Args:
        namespace: of the run.
        path: of the client.
        token: of the client's incarnation.
    """

    def __init__(self, namespace: str, path: str, token: str) -> None:
        self._namespace, self._path, self._token = namespace, path, token
        self._made = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller ends with its client, which may still have to write a checkpoint."""
        stay_to_the_end()

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """The next placement group that is made is this group's."""
        self._made += 1
        name = f"{prefix(self._namespace, self._path)}{self._token}-{self._made}"
        train.reserve_by(partial(self._reserve, name=name))

    def _reserve(self, *arguments: Any, **named: Any) -> PlacementGroup:
        group = placement_group(*arguments, **named)
        if not self._client_lives():
            remove_placement_group(group)
            end_process(f"{self._path} is gone, the client of this controller")
        return group

    def _client_lives(self) -> bool:
        while True:
            try:
                client = ray.get_actor(self._path, namespace=self._namespace)
                return bool(ray.get(client.incarnation_token.remote()) == self._token)
            except ActorUnavailableError:
                time.sleep(LOOK_S)
            except (ValueError, RayActorError):
                return False
