"""A worker of a ZeRO client: a loop inside Ray Train that performs what the client's actor asks for.

Only the first worker waits for tasks; it tells the others the task's number, and each fetches the task itself, since
its buffers travel by reference.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from actors.graceful_shutdown import stay_to_the_end
from actors.zero.tasks import LEAVE
from worldlm_ray.errors import RunError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tracking import log_lines
from worldlm_ray.training.local import threads_of
from worldlm_ray.training.trainer import MOMENTS

if TYPE_CHECKING:
    from worldlm_ray.training.zero import ZeroWorker

WAIT_S = 5.0
"""Longest wait of one call for a task. The other workers wait in a collective meanwhile, which has a time limit."""
LONGEST_ERROR = 300
"""Characters of an error that are passed on, in one line."""


def work(config: dict[str, Any]) -> None:
    """The training function of Ray Train.

    Args:
        config: `plan` (the run's), `path` and `namespace` of the client's actor, its `token`, and the
            `noise` multiplier of a private one.
    """
    stay_to_the_end()
    # Not above: the client's own process imports this module, and has no use for DeepSpeed.
    from worldlm_ray.training.zero import ZeroWorker

    plan: Plan = config["plan"]
    spec = plan.node(config["path"])
    log_lines.of_node(plan, f"{spec.path}/worker")
    client = _Client(ray.get_actor(config["path"], namespace=config["namespace"]))
    resources = spec.settings.resources
    cuda = resources.gpus > 0
    control = dist.new_group(backend="gloo") if cuda else None
    name = [secrets.token_hex(4)]
    dist.broadcast_object_list(name, src=0, group=control)
    group = (config["token"], name[0])
    number = 0
    try:
        privacy = spec.settings.privacy
        worker = ZeroWorker(
            plan.shape,
            plan.layout,
            spec.settings.training,
            threads=threads_of(resources),
            cuda=cuda,
            privacy=privacy if privacy.unit == "record" else None,
            noise=config["noise"],
        )
        tasks = _Tasks(worker)
        if worker.rank == 0:
            client.call("group_started", group, worker.workers)
        while True:
            number = _agree(client, group, number, control)
            if number == LEAVE:
                return
            task = client.call("task", group, number)
            result = getattr(tasks, task.kind)(*task.args)
            dist.barrier(group=control)  # done when all have done it, the slowest reader of buffers included
            if worker.rank == 0:
                client.call("task_done", group, number, result)
    except Exception as error:
        # Ray Train would say it too, but after its last retry and in many lines.
        said = " ".join(f"{type(error).__name__}: {error}".split())
        client.call("group_failed", group, said[:LONGEST_ERROR])
        raise


class _Client:
    """The client's actor. A call that fails is not repeated: the workers end with their client."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, *args: Any) -> Any:
        """Call a method and wait for its answer."""
        return ray.get(getattr(self._actor, method).options(max_task_retries=0).remote(*args))


def _agree(client: _Client, group: tuple[str, str], number: int, control: Any) -> int:
    """The number of the next task, which the first worker waits for."""
    while True:
        answer = torch.zeros((), dtype=torch.int64)
        if dist.get_rank() == 0:
            answer += client.call("next_task", group, number, WAIT_S) or 0
        dist.broadcast(answer, src=0, group=control)
        if int(answer):
            return int(answer)


class _Tasks:
    """What a worker can be asked; results are those of the first worker."""

    def __init__(self, worker: ZeroWorker) -> None:
        self._worker = worker

    def read(self) -> list[Any]:
        """References to the parameters, a layer each: the object store holds the only whole copy."""
        return [ray.put(layer) for layer in self._worker.read() if layer.size]

    def write(self, refs: list[Any]) -> None:
        self._worker.write(ray.get(refs[0]))

    def run(self, refs: list[Any], rates: list[float]) -> float:
        return self._worker.run(ray.get(refs[0]), rates)

    def evaluate(self, refs: list[Any]) -> tuple[float, int]:
        return self._worker.evaluate(ray.get(refs[0]))

    def sample(self, prompt: list[int], tokens: int, temperature: float, seed: int) -> list[int] | str:
        """Token ids, or why there are none: an error would end the workers."""
        try:
            return self._worker.sample(np.array(prompt), tokens=tokens, temperature=temperature, seed=seed)
        except RunError as error:
            return str(error)

    def moments(self) -> tuple[int, dict[str, list[Any]]]:
        """The step count, and references to both moments, a layer each."""
        gathered = {name: [ray.put(layer) for layer in self._worker.moments(name) if layer.size] for name in MOMENTS}
        return self._worker.optimizer_steps, gathered

    def set_moments(self, steps: int, refs: dict[str, list[Any]]) -> None:
        for name, [ref] in refs.items():
            self._worker.set_moments(name, ray.get(ref))
        self._worker.optimizer_steps = steps

    def forget(self) -> None:
        self._worker.forget()
