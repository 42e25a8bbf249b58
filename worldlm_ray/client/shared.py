"""Many clients in one process: they take turns at one model and one optimizer.

A client needs the model and the optimizer only while it trains. In between it is a few flat buffers: its weights, its
moments, the base of its round, its parent's key layers. `SharedTrainer` has the only model and optimizer; each client
holds a `Slot`, which is a trainer to it. Training a client swaps its state in and the state of the client before out:
the buffers of the two are copied. What a client computes does not depend on who trained before it.

Buffers lie in memory up to a limit and in mapped files beyond it: those the system writes out when memory is short.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from worldlm_ray.client.client import Client
from worldlm_ray.data import prepare_shards
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account
from worldlm_ray.storage import open_files
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.making import trainer_of_one_model, with_common
from worldlm_ray.training.smaller_rank import SmallerRankTrainer
from worldlm_ray.training.trainer import MOMENTS, Batch, Proximal, RoundResult, Trainer


class BufferStore:
    """Where buffers lie: in memory up to a limit, in files that are mapped into memory beyond it.

    Args:
        limit_bytes: of all buffers in memory; None for no limit.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.memory_bytes = self.file_bytes = 0

    def keep(self, values: Flat) -> Flat:
        """A copy of a buffer in the store, to be changed in place from now on. Its bytes count while it is in use."""
        if self.limit_bytes is None or self.memory_bytes + values.nbytes <= self.limit_bytes:
            self.memory_bytes += values.nbytes
            copied = np.array(values)
            weakref.finalize(copied, self._released, values.nbytes).atexit = False
            return copied
        self.file_bytes += values.nbytes
        with tempfile.TemporaryFile(prefix="worldlm-") as file:  # without a name: it goes with the process
            file.truncate(values.nbytes)
            kept: Flat = open_files.mapped(file, np.float32, writable=True).reshape(values.shape)
        kept[:] = values
        return kept

    def _released(self, nbytes: int) -> None:
        """A buffer in memory is gone: its client has left."""
        self.memory_bytes -= nbytes


class SharedTrainer:
    """The model and the optimizer that clients take turns to use. One thread may use it at a time.

    Args:
        trainer: what trains.
        store: where clients' buffers lie.
    """

    def __init__(self, trainer: LocalTrainer | SmallerRankTrainer, store: BufferStore) -> None:
        self.trainer, self.store = trainer, store
        self.swaps = 0
        """How often one client has taken the place of another."""
        self._active: Slot | None = None

    def slot(self, *, noise: float = 0.0) -> Slot:
        """A place for one client more, whose privacy needs so much noise."""
        return Slot(self, noise=noise)

    def activate(self, slot: Slot) -> None:
        """Swap a client into the model."""
        if self._active is slot:
            return
        self.deactivate()
        self.swaps += 1
        self.trainer.write(slot.theta)
        self.trainer.forget()
        self.trainer.load_optimizer_state(slot.moments)
        self.trainer.noise = slot.noise
        self._active = slot

    def deactivate(self) -> None:
        """Swap the active client out: keep what it has learned."""
        slot, self._active = self._active, None
        if slot is None:
            return
        self.trainer.read(slot.theta)
        slot.take_moments(self.trainer.optimizer_state())

    def is_active(self, slot: Slot) -> bool:
        """Whether the model is this client's now."""
        return self._active is slot


class Slot(Trainer):
    """The trainer of one client among many: see worldlm_ray/training/trainer.py for what its methods do."""

    def __init__(self, shared: SharedTrainer, *, noise: float = 0.0) -> None:
        self._shared, self.noise = shared, noise
        self.theta: Flat = np.empty(0, np.float32)
        """The client's weights, while another client has the model."""
        self.moments: dict[str, Flat] = {}
        """Its optimizer's state, likewise."""

    def read(self, out: Flat | None = None) -> Flat:
        """The parameters: a copy, into `out` if given."""
        if self._shared.is_active(self):
            return self._shared.trainer.read(out)
        if out is None:
            return np.array(self.theta)
        out[:] = self.theta
        return out

    def write(self, values: Flat) -> None:
        """Set the parameters; the optimizer's state stays."""
        if self._shared.is_active(self):
            self._shared.trainer.write(values)
        elif self.theta.size == 0:
            self.theta = self._shared.store.keep(values)
        else:
            self.theta[:] = values

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        """Take one optimizer step per batch."""
        self._shared.activate(self)
        return self._shared.trainer.run(batches, rate, first=first, should_stop=should_stop, proximal=proximal)

    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        """Summed loss in nats and number of tokens."""
        # Of other parameters, the model of the active client is put back afterwards.
        if parameters is None and not self._shared.is_active(self):
            parameters = self.theta
        return self._shared.trainer.evaluate(batches, parameters=parameters)

    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt."""
        self._shared.activate(self)
        return self._shared.trainer.sample(prompt, tokens=tokens, temperature=temperature, seed=seed)

    def optimizer_state(self) -> dict[str, Flat]:
        """The moments and the step count."""
        if self._shared.is_active(self):
            return self._shared.trainer.optimizer_state()
        return {name: np.array(values) for name, values in self.moments.items()}

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        """Restore what `optimizer_state` gave."""
        if not saved:
            return
        if self._shared.is_active(self):
            self._shared.trainer.load_optimizer_state(saved)
        else:
            self.take_moments(saved)

    def forget(self) -> None:
        """Drop the moments and the step count."""
        if self._shared.is_active(self):
            self._shared.trainer.forget()
        self.moments = {}

    def take_moments(self, state: dict[str, Flat]) -> None:
        """Keep an optimizer's state; what stands in place already is written over."""
        for name, values in state.items():
            if name in self.moments:
                self.moments[name][:] = values
            else:
                self.moments[name] = self._shared.store.keep(values)
        if not state:
            self.moments = {}


def slot_bytes(plan: Plan, spec: NodeSpec) -> int:
    """Bytes of one client between its turns, without a common model and what its parent has not made durable yet.

    Its weights and the base of its round have the world's layout, its moments that of what it trains.

    Args:
        plan: the run.
        spec: the client's node.
    """
    moments = len(MOMENTS) * plan.model_of(spec)[1].nbytes
    return 2 * plan.layout.nbytes + moments + 4 * plan.layout.key_size


class VirtualClients:
    """The clients of one process.

    Args:
        plan: the run.
        specs: the clients' nodes: alike but for their texts.
        limit_bytes: of their buffers in memory; None for no limit.
    """

    def __init__(self, plan: Plan, specs: Sequence[NodeSpec], *, limit_bytes: int | None = None) -> None:
        self.plan = plan
        open_files.raise_limit()
        self.specs = {spec.path: spec for spec in specs}
        self.store = BufferStore(limit_bytes)
        settings = specs[0].settings
        noise = 0.0 if settings.privacy.unit == "record" else None  # of each client: see Slot
        trainer = trainer_of_one_model(plan.shape, plan.layout, settings, noise=noise)
        self.shared = SharedTrainer(trainer, self.store)
        self._origin: Flat | None = None

    @cached_property
    def initial(self) -> Flat:
        """The run's initial parameters, the same for all clients."""
        return build.initial(self.plan)

    def add(self, plan: Plan, spec: NodeSpec) -> None:
        """One client more may live here, by a plan that has it."""
        self.plan, self.specs[spec.path] = plan, spec

    def prepare(self) -> None:
        """Cut the texts of all clients at once: a text that they share out is read once."""
        first = next(iter(self.specs.values()))
        prepare_shards(
            [spec.settings.data for spec in self.specs.values()],
            context=self.plan.shape.context,
            key=f"{first.key}.data",
        )

    def make(self, path: str) -> Client:
        """A client of this process; like any other for who drives it, but only one may be driven at a time."""
        spec = self.specs[path]
        client = Client(self.plan, spec, initial=self.initial, make_trainer=partial(self._trainer, spec))
        if self._origin is None:
            self._origin = client.merger.initial_keys
        client.merger.initial_keys = self._origin  # never changed: one for all
        return client

    def _trainer(self, spec: NodeSpec, account: Account | None) -> Trainer:
        """A slot of the client, and where it trains its parent's model beside its own a second one for that."""
        own = self.shared.slot(noise=0.0 if account is None else account.noise)
        return own if account is not None else with_common(own, self.shared.slot, spec.settings)

    def settle(self, client: Client) -> None:
        """Keep a client's buffers in the store, once it is as its checkpoint says."""
        link = client.link
        link.anchor, link.parent_keys = self.store.keep(link.anchor), self.store.keep(link.parent_keys)
