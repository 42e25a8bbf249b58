"""Local training on one device: AdamW over a flat buffer.

The whole model, its gradient and both moments are four flat fp32 buffers, so the optimizer makes one fused
pass, gradient clipping is one norm, and exchanging the model needs no walk over tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldlm_ray.config.schema import ResourcesConfig, TrainingConfig
from worldlm_ray.model.flat import bind, decayed
from worldlm_ray.model.making import LanguageModel, make_model
from worldlm_ray.model.pretrained_shape import Architecture, PretrainedShape
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.tensors.targets import counted
from worldlm_ray.training.deepspeed_config import is_bf16
from worldlm_ray.training.sampling import generate
from worldlm_ray.training.trainer import MOMENTS, STEP, Batch, Proximal, RoundResult, Trainer


def device_of(resources: ResourcesConfig) -> str | None:
    """The device of a client: the CPU unless its settings ask for a GPU, even if torch finds one.

    Ray hides no GPU from an actor that requests none, and a simulation has no scheduler. Without this rule all clients
    of a machine would share its first GPU.

    Returns:
        `cpu`, or None for CUDA when there is a device.
    """
    return None if resources.gpus > 0 else "cpu"


def threads_of(resources: ResourcesConfig) -> int:
    """Torch threads of a client: as many as its cores, up to the cores that this process may use.

    More threads than cores wait for each other at every operation.
    """
    return max(1, min(resources.cpus, cores()))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def too_many_cores(wanted: Mapping[str, ResourcesConfig]) -> str:
    """A warning if clients ask for more cores than this machine has; empty if none does.

    Args:
        wanted: resources by path of the client.
    """
    over = [path for path, resources in wanted.items() if resources.cpus > cores()]
    if not over:
        return ""
    more = f" and {len(over) - 1} more clients ask" if len(over) > 1 else " asks"
    most = max(wanted[path].cpus for path in over)
    return f"{over[0]}{more} for {most} cores (resources.cpus), this machine has {cores()}: so many threads are used"


class LocalTrainer(Trainer):
    """A model on one device with its optimizer; its parameters are the flat buffer `flat`.

    Args:
        shape: of the model.
        layout: the flat layout (which part is backbone, which is key).
        training: optimizer settings.
        threads: torch threads. Results are reproducible only with the same number.
        device: `cpu`, `cuda` or None for CUDA when there is a device.
    """

    noise = 0.0
    """Noise multiplier of the steps, where they are private."""

    def __init__(
        self,
        shape: Architecture,
        layout: Layout,
        training: TrainingConfig,
        *,
        threads: int,
        device: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.training, self.layout, self.shape = training, layout, shape
        self.threads = threads
        self.bf16 = is_bf16(training, cuda=self.device.type == "cuda")
        self._center: Tensor | None = None
        self._strength = 0.0
        self.flat = torch.zeros(layout.size, device=self.device)
        self.gradient = torch.zeros(layout.size, device=self.device)
        recompute = training.activation_checkpointing
        self.model: LanguageModel = make_model(shape, recompute=recompute, device=self.device.type)
        bind(self.model.root, layout, self.flat, self.gradient)
        self.model.to(self.device)
        self._parts = parts_of(layout, training)
        self._trains = 0
        """The part that the next step trains."""
        matrices = decayed(self.model)
        self._matrices = [[m for m in matrices if part.start <= m.storage_offset() < part.stop] for part in self._parts]
        self._training_loss = self._compiled() if is_compiled(training, shape, self.device) else self.model.loss
        self._tensors = [torch.nn.Parameter(self.flat[part]) for part in self._parts]
        # `step` applies weight decay, to matrices only: a flat tensor has no parameter groups.
        self.optimizer = torch.optim.AdamW(
            self._tensors,
            lr=training.lr,
            betas=(training.betas[0], training.betas[1]),
            weight_decay=0.0,
            fused=True,
        )

    def read(self, out: Flat | None = None) -> Flat:
        """The parameters as a flat numpy buffer: a copy, into `out` if given."""
        if out is None:
            out = np.empty(self.layout.size, np.float32)
        torch.from_numpy(out).copy_(self.flat.detach())
        return out

    def write(self, values: Flat) -> None:
        """Set the parameters from a flat numpy buffer."""
        if self.device.type == "cpu":
            np.copyto(self.flat.numpy(), values)
        else:
            self.flat.copy_(torch.from_numpy(np.array(values)))

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        """Take one optimizer step per batch.

        Args:
            batches: token ids and targets.
            rate: learning rate of the step with this index.
            first: place of the first batch in its round. The first steps of a round train the head (`head_first`).
            should_stop: asked before every step. True ends the training early and keeps the steps so far.
            proximal: another model, to which every step is drawn.
        """
        self._center = None if proximal is None else torch.from_numpy(np.array(proximal.center)).to(self.device)
        self._strength = 0.0 if proximal is None else proximal.strength
        torch.set_num_threads(self.threads)
        self.model.train()
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        steps = tokens = 0
        learning_rate = 0.0
        began = time.perf_counter()
        for inputs, targets in batches:
            if should_stop():
                break
            learning_rate = rate(steps)
            self._trains = len(self._parts) - 1 if first + steps < self.training.head_steps else 0
            losses += self.step(inputs, targets, learning_rate)
            steps, tokens = steps + 1, tokens + inputs.size
            if self.training.step_delay_s:
                time.sleep(self.training.step_delay_s)
        loss_sum = float(losses)  # on CUDA this waits for the device, so that train_s is correct
        return RoundResult(
            steps=steps,
            tokens=tokens,
            loss_sum=loss_sum,
            train_s=time.perf_counter() - began,
            learning_rate=learning_rate,
        )

    def step(self, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], learning_rate: float) -> Tensor:
        """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101); returns the loss, still on the device.

        A part of the batch weighs as much as its share of the counted targets.
        """
        self.gradient.zero_()
        loss = torch.zeros((), device=self.device)
        parts, whole = self.training.accumulation_steps, max(counted(targets), 1)
        for part in range(parts):
            rows = slice(part * len(inputs) // parts, (part + 1) * len(inputs) // parts)
            weight = counted(targets[rows]) * parts / whole  # 1 where all targets count
            share = self._mean_loss(inputs[rows], targets[rows]) * weight / parts
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
        self._descend(learning_rate)
        return loss

    def _descend(self, learning_rate: float) -> None:
        """Add the proximal term's gradient; then clip, decay the matrices and take the step of the part that trains."""
        if self._center is not None:
            self.gradient.add_(self.flat - self._center, alpha=self._strength)
        gradient = self.gradient[self._parts[self._trains]]
        if self.training.grad_clip:
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_(torch.clamp(self.training.grad_clip / (norm + 1e-6), max=1.0))
        matrices = self._matrices[self._trains]
        if self.training.weight_decay and matrices:
            torch._foreach_mul_(matrices, 1.0 - learning_rate * self.training.weight_decay)
        for index, tensor in enumerate(self._tensors):
            # Without a gradient a part is frozen, and so are its moments.
            tensor.grad = gradient if index == self._trains else None
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        """Summed loss in nats and number of counted targets over the batches.

        Args:
            batches: token ids and targets.
            parameters: another model to measure instead of this one, which does not change.
        """
        torch.set_num_threads(self.threads)
        self.model.eval()
        own = self.read() if parameters is not None else None
        if parameters is not None:
            self.write(parameters)
        total, tokens = 0.0, 0
        try:
            for inputs, targets in batches:
                total += float(self._loss(inputs, targets, "sum"))
                tokens += counted(targets)
        finally:
            if own is not None:
                self.write(own)
        return total, tokens

    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt: see worldlm_ray/training/sampling.py."""
        self.model.eval()
        return generate(
            self.model,
            prompt,
            context=self.shape.context,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            device=self.device,
        )

    def optimizer_state(self) -> dict[str, Flat]:
        """The moments and each part's step count as flat buffers, for a checkpoint. Empty before the first step."""
        if not self.optimizer.state:
            return {}
        states = [self.optimizer.state.get(tensor, {}) for tensor in self._tensors]
        found = {
            name: [
                state[name].detach().cpu().numpy().reshape(-1) if state else np.zeros(tensor.numel(), np.float32)
                for state, tensor in zip(states, self._tensors, strict=True)
            ]
            for name in MOMENTS
        }
        found[STEP] = [np.array([float(state[STEP]) if state else 0.0], np.float32) for state in states]
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def forget(self) -> None:
        """Drop the moments and the step count."""
        self.optimizer.state.clear()

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        """Restore the result of `optimizer_state`."""
        if not saved:
            return
        for index, (tensor, part) in enumerate(zip(self._tensors, self._parts, strict=True)):
            steps = float(saved[STEP][min(index, len(saved[STEP]) - 1)])
            moments = {name: torch.from_numpy(np.array(saved[name][part])).to(self.device) for name in MOMENTS}
            self.optimizer.state[tensor] = {STEP: torch.tensor(steps, device=self.device), **moments}

    def _mean_loss(self, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> Tensor:
        tokens_BT, targets_BT = on_device(inputs, self.device), on_device(targets, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self._training_loss(tokens_BT, targets_BT)

    def _loss(self, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], reduction: str) -> Tensor:
        tokens_BT, targets_BT = on_device(inputs, self.device), on_device(targets, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.model.loss(tokens_BT, targets_BT, reduction=reduction)

    def _compiled(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The mean loss, fused by `torch.compile`. Shapes are fixed, since they are equal in every step."""
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(self.model.loss, dynamic=False)
        return compiled


def parts_of(layout: Layout, training: TrainingConfig) -> list[slice]:
    """What is trained by separate steps: the whole model, or where the head comes first its body and its head."""
    if not training.head_steps:
        return [slice(0, layout.size)]
    return [slice(0, layout.backbone_size), slice(layout.backbone_size, layout.size)]


def is_compiled(training: TrainingConfig, shape: Architecture, device: torch.device) -> bool:
    """Whether the training step is fused.

    `auto` leaves out what nothing here has measured or tested compiled: a model of transformers, for which `on` is
    refused (plan/backend_checks.py). Recomputed activations prevent it: they break the graph at every block.
    """
    if training.compile == "auto":
        can_be = not isinstance(shape, PretrainedShape) and not training.activation_checkpointing
        return device.type == "cuda" and can_be
    return training.compile == "on"


def on_device(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Token ids on a device. To CUDA they go through pinned memory: the copy then overlaps with the step before."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
