"""A client whose model DeepSpeed trains over several workers, which nobody else in the world notices.

The actor owns one Ray Train run whose workers live as long as the client does, so that their start is paid once and
not every round. `ZeroTrainer` stands where a plain client has its own model: what the client asks of it becomes a
task at the `Desk`, and the workers (see actors/zero_worker.py) fetch it there.

When a worker dies, Ray Train starts all of them again. The trainer then gives the new ones the parameters that it knew
last, the moments of the last checkpoint, and the batches since, and the local round goes on: the client above it only
sees a round that took longer.
"""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.client import ClientActor
from actors.graceful_shutdown import stay_to_the_end
from actors.reserved_capacity import room_for_others
from actors.shared import Address, end_process
from actors.zero_worker import LEAVE, Task, work
from worldlm_ray.errors import RunError
from worldlm_ray.launch.private import train
from worldlm_ray.launch.private.reservations import give_back, prefix
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account
from worldlm_ray.storage import filesystem
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.trainer import MOMENTS, Batch, RoundResult, Trainer

TRIES = 3
"""Groups of workers that may die one after the other without finishing a task."""
CHUNK_S = 2.0
"""Seconds of training that one task is meant to take: between tasks the client looks whether it should stop."""
LOOK_S = 0.5
RESIZE_S = 5.0
"""How often Ray Train looks for more workers where their number is a range."""

Group = tuple[str, str]
"""A group of workers: the token of the trainer that started it, and a name of its own."""


class GroupLost(Exception):
    """The workers that were asked are gone; others take their place."""


class Desk:
    """Where the workers of a client fetch tasks and leave results. Calls come on the actor's threads.

    Args:
        token: of the trainer: groups with another one belong to an earlier life of the client.
        name: of the client, for messages.
    """

    def __init__(self, token: str, *, name: str = "a client") -> None:
        self._token, self._name = token, name
        self._changed = threading.Condition()
        self._group: Group | None = None
        self._workers = 0
        self._number = 0
        self._task: Task | None = None
        self._results: list[Any] = []
        """The task's, once it is done."""
        self._ended: str | None = None
        self._failed_starts: set[Group] = set()
        """Groups that have failed since one was ready."""
        self._tries = 1
        """How many may. What keeps the very first from starting would keep the next, too."""
        self.last_error = ""
        """What a worker said before it died."""

    # ---- the client's side -------------------------------------------------------------------------------------

    def wait_for_group(self, other_than: Group | None) -> tuple[Group, int]:
        """The group of workers that is at work, once it is not the given one, and its size.

        Raises:
            RunError: there will be none.
        """
        with self._changed:
            while self._group is None or self._group == other_than:
                if self._ended is not None:
                    raise RunError(self._ended)
                self._changed.wait(LOOK_S)
            return self._group, self._workers

    def ask(self, group: Group, task: Task) -> Any:
        """Have a group of workers perform a task.

        Raises:
            GroupLost: it has been replaced, or has said that it failed.
            RunError: Ray Train has given up.
        """
        with self._changed:
            self._check(group)
            self._number += 1
            self._task = task
            self._results.clear()
            self._changed.notify_all()
            while not self._results:
                self._changed.wait(LOOK_S)
                self._check(group)
            return self._results.pop()

    def _check(self, group: Group) -> None:
        if self._ended is not None:
            raise RunError(self._ended)
        if self._group != group:
            raise GroupLost

    def end(self, why: str) -> None:
        """Say that Ray Train's run is over."""
        with self._changed:
            self._ended = self._ended or why
            self._changed.notify_all()

    # ---- the workers' side -------------------------------------------------------------------------------------

    def started(self, group: Group, workers: int) -> None:
        """A group of workers is ready; one that was there before is no more."""
        with self._changed:
            if group[0] == self._token:
                self._group, self._workers, self._failed_starts, self._tries = group, workers, set(), TRIES
                self._task = None  # what the group before was asked is not for this one
                self._changed.notify_all()

    def next(self, group: Group, after: int, wait_s: float) -> int | None:
        """Number of the task after the given one; None if there is none yet, LEAVE for a group that was replaced."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                if group != self._group or self._ended is not None:
                    return LEAVE
                if self._number > after and self._task is not None:
                    return self._number
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)

    def task(self, group: Group, number: int) -> Task:
        """The task of that number."""
        with self._changed:
            if group != self._group or number != self._number or self._task is None:
                raise RunError(f"task {number} is no more")
            return self._task

    def done(self, group: Group, number: int, result: Any) -> None:
        """A task is done."""
        with self._changed:
            if group == self._group and number == self._number and self._task is not None:
                self._task = None
                self._results.append(result)
                self._changed.notify_all()

    def failed(self, group: Group, error: str) -> None:
        """A worker failed, and its group with it."""
        with self._changed:
            if group[0] != self._token:
                return
            self.last_error = error
            if group == self._group:
                self._group = self._task = None
            else:
                self._failed_starts.add(group)
                if len(self._failed_starts) >= self._tries:
                    self._ended = self._ended or f"the workers of {self._name} cannot start: {error}"
            self._changed.notify_all()


class ZeroTrainer(Trainer):
    """The trainer of a ZeRO client: asks its workers, and puts new ones where the old had been.

    Args:
        desk: where they meet.
        plan: the run.
        spec: the client.
        tell: told of losses, as an event in the client's life and its detail.
    """

    def __init__(self, desk: Desk, plan: Plan, spec: NodeSpec, *, tell: Callable[[str, str], None]) -> None:
        self._desk, self._layout, self._path, self._tell = desk, plan.layout, spec.path, tell
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
        should_stop: Callable[[], bool] = lambda: False,
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
        """Summed loss in nats and number of tokens, of the model or of other parameters."""
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
                result = self._desk.ask(group, task)
                self._failures = 0
                return result
            except GroupLost:
                self._lost()

    def _ready_group(self) -> Group:
        """A group of workers that knows what its predecessor knew."""
        if self._group is None or not self._restored:
            self._group, workers = self._desk.wait_for_group(None)
            again = bool(self._known)
            if self._known:
                self._desk.ask(self._group, Task("write", (self._known,)))
            if self._moments is not None:
                self._desk.ask(self._group, Task("set_moments", self._moments))
            for task in self._since:
                self._desk.ask(self._group, task)
            self._restored = True
            if again:
                self._tell("training", f"{workers} workers took the place of those before")
        return self._group

    def _lost(self) -> None:
        lost, self._group, self._restored = self._group, None, False
        self._failures += 1
        if self._failures >= TRIES:
            said = self._desk.last_error or "they said nothing"
            raise RunError(f"{self._path}: its workers died {TRIES} times in a row; the last said: {said}")
        self._tell("waiting", "a worker died; others are on their way")
        self._group, _ = self._desk.wait_for_group(lost)


class _Reservations(train.Callbacks):
    """Part of Ray Train's controller: has its placement groups carry names (see launch/private/reservations.py).

    The controller may outlive its client, see the workers die, and reserve room for others after all reservations had
    been given back. So it checks after each reservation that its client lives: the end of the client removes it then.

    Args:
        namespace: of the run.
        path: of the client.
        token: of the client's life.
    """

    def __init__(self, namespace: str, path: str, token: str) -> None:
        self._namespace, self._path, self._token = namespace, path, token
        self._made = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller ends with its client, who may still have to write a checkpoint."""
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
            end_process(f"{self._path} is gone, whom this worked for")
        return group

    def _client_lives(self) -> bool:
        while True:
            try:
                client = ray.get_actor(self._path, namespace=self._namespace)
                return bool(ray.get(client.life.remote()) == self._token)
            except ActorUnavailableError:
                time.sleep(LOOK_S)
            except (ValueError, RayActorError):
                return False


class ZeroClientActor(ClientActor):
    """A client with workers. Its own process holds no model, only what is exchanged.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        self._token = secrets.token_hex(4)
        self._desk = Desk(self._token, name=address.path)
        super().__init__(address)

    def _make_trainer(self, account: Account | None) -> Trainer:
        noise = 0.0 if account is None else account.noise
        threading.Thread(target=self._train_with_workers, args=(noise,), daemon=True).start()
        return ZeroTrainer(
            self._desk, self.plan, self.spec, tell=lambda event, text: self._tell(self._life(event, text))
        )

    def _train_with_workers(self, noise: float) -> None:
        """Ray Train's run, from the start of the workers to the end of the client."""
        resources, labels = self.spec.settings.resources, dict(self.spec.settings.placement.labels)
        low, high = resources.worker_range
        config = {
            "plan": self.plan,
            "path": self.spec.path,
            "namespace": self._address.namespace,
            "token": self._token,
            "noise": noise,
        }
        mine = prefix(self._address.namespace, self.spec.path)
        wanted = {"CPU": float(resources.cpus)} | ({"GPU": resources.gpus} if resources.gpus else {})
        try:
            give_back(mine)  # what an earlier life has left must not keep the workers of this one from finding room
            path, filesystem = self._storage()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = train.Trainer(
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
                        name=f"{self.spec.name}-{self._token}",
                        storage_path=path,
                        storage_filesystem=filesystem,
                        # Which failure is the last is decided above: by those in a row, not by all in a long life.
                        failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
                        callbacks=[_Reservations(self._address.namespace, self.spec.path, self._token)],
                    ),
                )
                with room_for_others(self.plan, self._address.namespace) if low < high else nullcontext():
                    trainer.fit()
            self._desk.end(f"{self.spec.path}: its workers have left")
        except Exception as error:  # noqa: BLE001  # whatever it is, the client must not wait for ever
            lines = [line for line in str(error).splitlines() if line.strip()]
            self._desk.end(f"{self.spec.path}: its workers failed: {lines[-1] if lines else type(error).__name__}")

    def _storage(self) -> tuple[str, Any]:
        """Where Ray Train keeps its own notes: a path and a file system."""
        folder = self.plan.run_dir / "workers" / self.spec.path
        with suppress(FileExistsError):
            filesystem.make_folder(folder)
        return filesystem.for_arrow(folder)

    def life(self) -> str:
        """A word that no other life of this client has."""
        return self._token

    # ---- called by the workers ---------------------------------------------------------------------------------

    def group_started(self, group: Group, workers: int) -> None:
        """See `Desk.started`."""
        self._desk.started(group, workers)

    def next_task(self, group: Group, after: int, wait_s: float) -> int | None:
        """See `Desk.next`."""
        return self._desk.next(group, after, wait_s)

    def task(self, group: Group, number: int) -> Task:
        """See `Desk.task`."""
        return self._desk.task(group, number)

    def task_done(self, group: Group, number: int, result: Any) -> None:
        """See `Desk.done`."""
        self._desk.done(group, number, result)

    def group_failed(self, group: Group, error: str) -> None:
        """See `Desk.failed`."""
        self._desk.failed(group, error)
