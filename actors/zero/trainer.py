"""The trainer of a ZeRO client. It stands where a plain client has its own model.

What the client asks of it becomes a task in the `TaskQueue`, and the workers (see worker.py) fetch it there.

When a worker dies, Ray Train starts all of them again. The trainer gives the new ones the parameters that it knew last,
the moments of the last checkpoint, and the batches since. The local round goes on: the client sees a longer round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ObjectLostError

from actors.zero.tasks import TRIES, Group, GroupLost, Task, TaskQueue
from worldlm_ray.errors import RunError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.trainer import MOMENTS, Batch, Proximal, RoundResult, Trainer

CHUNK_S = 2.0
"""Seconds of training that one task is meant to take: between tasks the client looks whether it should stop."""


class ZeroTrainer(Trainer):
    """The trainer of a ZeRO client: asks its workers, and puts new ones where the old had been.

    Args:
        queue: where they meet.
        plan: the run.
        spec: the client.
        tell: told of losses, as an event in the client's life and its detail.
    """

    def __init__(self, queue: TaskQueue, plan: Plan, spec: NodeSpec, *, tell: Callable[[str, str], None]) -> None:
        self._queue, self._layout, self._path, self._tell = queue, plan.layout, spec.path, tell
        self._delay_s = spec.settings.training.step_delay_s
        self._group: Group | None = None
        self._restored = False
        """Whether the group has been given what was known."""
        self._failures = 0
        self._known: list[Any] = []
        """Reference to the parameters as of the last write or read (in a list; empty before the first)."""
        self._moments: tuple[int, dict[str, list[Any]]] | None = None
        """Step count and references of the moments as of the last checkpoint."""
        self._since: list[Task] = []
        """Training since then."""
        self._chunk = 4

    # ---- what a client asks of a trainer -----------------------------------------------------------------------

    def read(self, out: Flat | None = None) -> Flat:
        """The parameters: see `Trainer`. Asked twice without training in between, the workers are asked once."""
        out = np.empty(self._layout.size, np.float32) if out is None else out
        if self._since or not self._known:
            self._gather(lambda: self._perform(Task("read")), out)
            self._known, self._since = [ray.put(out)], []
        else:
            np.copyto(out, ray.get(self._known[0]))
        return out

    def write(self, values: Flat) -> None:
        """Set the parameters."""
        self._known, self._since = [ray.put(np.asarray(values))], []
        self._perform(Task("write", (self._known,)))

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        """Take one optimizer step per batch, a few seconds' worth of them to a task."""
        remaining, began = iter(batches), time.perf_counter()
        steps = tokens = 0
        loss_sum = learning_rate = 0.0
        while not should_stop():
            chunk = list(islice(remaining, self._chunk))
            if not chunk:
                break
            rates = [rate(steps + index) for index in range(len(chunk))]
            task = Task(
                "run",
                ([ray.put([(inputs.astype(np.int32), targets.astype(np.int32)) for inputs, targets in chunk])], rates),
            )
            chunk_began = time.perf_counter()
            loss_sum += self._perform(task)
            took_s = time.perf_counter() - chunk_began
            self._since.append(task)
            steps, learning_rate = steps + len(chunk), rates[-1]
            tokens += sum(inputs.size for inputs, _ in chunk)
            if took_s < CHUNK_S / 2 and len(chunk) == self._chunk:  # one that the round cut short says nothing
                self._chunk *= 2
            elif took_s > 2 * CHUNK_S:
                self._chunk = max(self._chunk // 2, 1)
            if self._delay_s:
                time.sleep(self._delay_s * len(chunk))
        return RoundResult(
            steps=steps,
            tokens=tokens,
            loss_sum=loss_sum,
            train_s=time.perf_counter() - began,
            learning_rate=learning_rate,
        )

    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        """Summed loss in nats and number of counted targets, of the model or of other parameters."""
        own = self.read() if parameters is not None else None
        if parameters is not None:
            self.write(parameters)
        try:
            windows = [(inputs.astype(np.int32), targets.astype(np.int32)) for inputs, targets in batches]
            nats, tokens = self._perform(Task("evaluate", ([ray.put(windows)],)))
            return float(nats), int(tokens)
        finally:
            if own is not None:
                self.write(own)

    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt."""
        found = self._perform(Task("sample", (prompt.tolist(), tokens, temperature, seed)))
        if isinstance(found, str):
            raise RunError(found)
        return list(found)

    def optimizer_state(self) -> dict[str, Flat]:
        """The moments, in the run's layout: whatever the stage and the number of workers, as a plain client's."""
        steps = 0

        def ask() -> list[Any]:
            nonlocal steps
            steps, moments = self._perform(Task("moments"))
            return [ref for refs in moments.values() for ref in refs]

        both = np.empty(2 * self._layout.size, np.float32)
        self._gather(ask, both)
        if steps == 0:
            return {}
        found = dict(zip(MOMENTS, np.split(both, 2), strict=True))
        found["step"] = np.array([steps], np.float32)
        self._remember(found)
        return found

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        """Restore what `optimizer_state` gave; nothing leaves the moments as they are."""
        if saved:
            self._remember(saved)
            assert self._moments is not None
            self._perform(Task("set_moments", self._moments))

    def forget(self) -> None:
        """Drop the moments and the step count."""
        self._moments = None
        self._perform(Task("forget"))

    # ---- workers come and go -----------------------------------------------------------------------------------

    def _remember(self, saved: dict[str, Flat]) -> None:
        refs = {name: [ray.put(np.asarray(saved[name]))] for name in MOMENTS}
        self._moments = (int(saved["step"][0]), refs)

    def _gather(self, ask: Callable[[], list[Any]], out: Flat) -> None:
        """Copy layers, which lie in the object store for as long as their worker lives, into a flat buffer."""
        while True:
            start = 0
            try:
                for ref in ask():
                    layer = ray.get(ref)
                    out[start : start + layer.size] = layer
                    start += layer.size
                return
            except ObjectLostError:
                self._lost()

    def _perform(self, task: Task) -> Any:
        """The result of a task, from these workers or from those that take their place."""
        while True:
            try:
                group = self._ready_group()
                result = self._queue.ask(group, task)
                self._failures = 0
                return result
            except GroupLost:
                self._lost()

    def _ready_group(self) -> Group:
        """A group of workers that knows what its predecessor knew."""
        if self._group is None or not self._restored:
            self._group, workers = self._queue.wait_for_group(None)
            again = bool(self._known)
            if self._known:
                self._queue.ask(self._group, Task("write", (self._known,)))
            if self._moments is not None:
                self._queue.ask(self._group, Task("set_moments", self._moments))
            for task in self._since:
                self._queue.ask(self._group, task)
            self._restored = True
            if again:
                self._tell("training", f"{workers} workers took the place of those before")
        return self._group

    def _lost(self) -> None:
        lost, self._group, self._restored = self._group, None, False
        self._failures += 1
        if self._failures >= TRIES:
            said = self._queue.last_error or "they said nothing"
            often = f"its workers died {TRIES} times in a row; the last said: {said}"
            raise RunError(f"{self._path}: {often}; mend that and resume the run")
        self._tell("waiting", "a worker died; others are on their way")
        self._group, _ = self._queue.wait_for_group(lost)
