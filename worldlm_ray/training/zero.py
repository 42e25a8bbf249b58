"""One worker of a model that DeepSpeed trains over several: the engine, and weights in and out of it.

Every method but the constructor is a collective: all workers of the client call it at once, with the same arguments,
as processes of one torch.distributed group. Weights and moments pass a layer at a time, so no worker ever holds
a second whole copy: DeepSpeed's public calls gather a tensor over the workers and shard it again.

Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import deepspeed
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from worldlm_ray.config.schema import PrivacyConfig, TrainingConfig
from worldlm_ray.errors import PrivacyError
from worldlm_ray.model.decoder import cross_entropy
from worldlm_ray.model.pretrained_shape import Architecture
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Entry, Layout
from worldlm_ray.tensors.targets import counted
from worldlm_ray.training.deepspeed_config import deepspeed_config, is_bf16
from worldlm_ray.training.sampling import generate
from worldlm_ray.training.spans import spans
from worldlm_ray.training.trainer import MOMENTS, Batch
from worldlm_ray.training.zero_model import checked, groups_of, join, make_zero_model, move_buffers

if TYPE_CHECKING:
    from worldlm_ray.privacy.dp_sgd import RecordGradients
    from worldlm_ray.privacy.noise import Noise


class _Private:
    """What a private worker has in addition to its engine."""

    def __init__(self, records: RecordGradients, noise: Noise, scale: float) -> None:
        self.records, self.noise, self.scale = records, noise, scale
        self.is_last = False
        """Whether the next backward pass is the last of its step, which adds the noise."""
        self.noised = 0
        """Parameters with noise in this step."""

    def add_noise(self, gradient: Tensor) -> Tensor:
        """Add noise to a parameter's gradient on this worker, before it is reduced."""
        if not self.is_last:
            return gradient
        self.noised += 1
        if self.scale == 0.0:
            return gradient
        noised = gradient.detach().clone(memory_format=torch.contiguous_format)
        self.noise.add(noised, self.scale)
        return noised


class ZeroWorker:
    """DeepSpeed's engine on one worker; torch.distributed is initialised.

    Args:
        shape: of the model.
        layout: the flat layout.
        training: optimizer settings, the ZeRO stage, and DeepSpeed's further keys.
        threads: torch threads.
        cuda: train on this process's GPU.
        privacy: clip every record's gradient and add noise; None for plain training.
        noise: noise multiplier.

    Raises:
        PrivacyError: per-record gradients of this model cannot be computed, or are computed wrongly.
    """

    def __init__(
        self,
        shape: Architecture,
        layout: Layout,
        training: TrainingConfig,
        *,
        threads: int,
        cuda: bool = False,
        privacy: PrivacyConfig | None = None,
        noise: float = 0.0,
    ) -> None:
        self.expected_records = training.batch_size
        if privacy is not None:
            # Records are clipped one by one, and the size of the batch decides the number of parts of a private step.
            part = training.batch_size // training.accumulation_steps
            training = replace(training, grad_clip=0.0, batch_size=part, accumulation_steps=1)
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.shape, self.layout, self.training = shape, layout, training
        self.device = torch.device("cuda" if cuda else "cpu")
        self.spans = spans(layout)
        torch.set_num_threads(threads)
        join(cuda=cuda)
        config = deepspeed_config(training, workers=self.workers, parameters=layout.size, cuda=cuda)
        self.sharded = training.zero_stage == 3
        model = make_zero_model(shape, layout, training, config)
        if privacy is not None:
            privacy = checked(privacy, shape, model)
        groups = groups_of(model, training)
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
        move_buffers(model, self.device)
        self.parameters = {n: p for n, p in self.engine.module.root.named_parameters() if p.requires_grad}
        self._private = None if privacy is None else self._make_private(privacy, noise, cuda=cuda)
        self.forget()

    # ---- weights and moments in and out ------------------------------------------------------------------------

    def read(self) -> Iterator[Flat]:
        """The fp32 parameters, a span at a time in the order of `spans`; empty arrays on all but the first worker."""
        yield from self._gathered(self._full_parameter)

    def write(self, values: Flat) -> None:
        """Set the parameters, and the optimizer's fp32 copy of them, from a flat buffer that every worker has."""
        for entry in self.layout.entries:
            parameter, value = self.parameters[entry.name], self._tensor(values, entry)
            if self.sharded:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.rank == 0:
                        parameter.data.copy_(value)
                safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
            else:
                parameter.data.copy_(value)
                safe_set_full_fp32_param(parameter, value)

    def moments(self, name: str) -> Iterator[Flat]:
        """One of `MOMENTS`, as `read` gives parameters."""
        yield from self._gathered(lambda parameter: self._full_moment(parameter, name))

    def set_moments(self, name: str, values: Flat) -> None:
        """Set one of `MOMENTS` from a flat buffer that every worker has."""
        for entry in self.layout.entries:
            parameter, value = self.parameters[entry.name], self._tensor(values, entry)
            if self.sharded:
                safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), name)
            elif hasattr(parameter, "_hp_mapping"):
                safe_set_full_optimizer_state(parameter, value, name)
            else:
                self._states[parameter][name].copy_(value)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the moments have seen."""
        return max(int(state["step"]) for state in self._states.values())

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self._states.values():
            state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps
        for group in self._optimizer.param_groups:
            if "step" in group:  # DeepSpeed's fused optimizers count here
                group["step"] = steps

    def forget(self) -> None:
        """Set the moments and the step count to zero."""
        if not self._states:
            # The optimizer makes its state in its first step. A step at rate zero does not change the parameters.
            tokens_BT = np.zeros((self.training.batch_size, min(self.shape.context, 8)), np.int64)
            self._set_rate(0.0)
            self._step((tokens_BT, tokens_BT))
            self._link_moments()
        zeros = np.zeros(self.layout.size, np.float32)  # untouched pages take no memory
        for name in MOMENTS:
            self.set_moments(name, zeros)
        self.optimizer_steps = 0

    # ---- training and measuring --------------------------------------------------------------------------------

    def run(self, batches: Iterable[Batch], rates: Iterable[float]) -> float:
        """One optimizer step per batch. Each worker takes its part of the batch's sequences.

        Returns:
            Sum over steps of the step's mean loss over all workers, nats per token.
        """
        self.engine.train()
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        step = self._step if self._private is None else self._private_step
        for batch, rate in zip(batches, rates, strict=True):
            self._set_rate(rate)
            losses += step(batch)
        dist.all_reduce(losses)
        return float(losses) / self.workers

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed loss in nats and number of counted targets. Each worker takes its part of a batch's sequences."""
        self.engine.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for inputs, targets in batches:
            own = slice(self.rank, None, self.workers)
            # Stage 3 gathers layers in every forward pass: a worker without sequences takes part, too.
            empty = len(inputs[own]) == 0
            rows = slice(0, 1) if empty else own
            loss = self._loss(inputs[rows], targets[rows], "sum")
            total += 0.0 if empty else loss.double()
            tokens += counted(targets)
        dist.all_reduce(total)
        return float(total), tokens

    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt. Every worker draws the same ids."""
        self.engine.eval()
        return generate(
            self.engine,
            prompt,
            context=self.shape.context,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            device=self.device,
        )

    def _step(self, batch: Batch) -> Tensor:
        """One optimizer step on this worker's part of a batch. Returns its share of the loss, times the workers."""
        inputs, targets = batch
        parts, whole = self.training.accumulation_steps, max(counted(targets), 1)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in range(parts):
            share = self.rank * parts + part
            rows = slice(*(len(inputs) * end // (self.workers * parts) for end in (share, share + 1)))
            weight = counted(targets[rows]) * self.workers * parts / whole  # 1 where all targets count
            loss = self._loss(inputs[rows], targets[rows], "mean") * weight
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach().double() / parts
        return total

    # ---- privacy -----------------------------------------------------------------------------------------------

    def _make_private(self, privacy: PrivacyConfig, noise: float, *, cuda: bool) -> _Private:
        from worldlm_ray.privacy.dp_sgd import RecordGradients
        from worldlm_ray.privacy.noise import Noise

        mode, bf16 = privacy.grad_sample_mode, is_bf16(self.training, cuda=cuda)
        assert mode != "auto", "it was decided when the model was checked"
        records = RecordGradients(self.engine.module, max_grad_norm=privacy.max_grad_norm, mode=mode, bf16=bf16)
        # Each of W workers adds noise of sigma C / sqrt(W); DeepSpeed takes the mean over workers, the loss is times W.
        scale = noise * privacy.max_grad_norm / self.workers**0.5 * self.workers / self.expected_records
        private = _Private(records, Noise(torch.device(self.device)), scale)
        for parameter in self.parameters.values():
            # A hook on the gradient: offloading would silently lose noise that is added to DeepSpeed's shards.
            parameter.register_hook(private.add_noise)
        return private

    def _private_step(self, batch: Batch) -> Tensor:
        """One step of DP-SGD on a Poisson batch, which may be empty. Returns the mean loss of this worker's records.

        Every part is two passes: one with respect to the layers' outputs, for each record's norm, and one through the
        engine with every record's loss times its coefficient. All workers make equally many parts, padded with records
        of weight zero, since all must take part in each collective. The last part adds the noise.
        """
        assert self._private is not None
        inputs, targets = (ids[self.rank :: self.workers] for ids in batch)
        most = -(-len(batch[0]) // self.workers)
        size = self.training.batch_size // self.workers
        parts = max(1, -(-most // size))
        total, private = torch.zeros((), dtype=torch.float64, device=self.device), self._private
        private.noised = 0
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            tokens_BT, targets_BT, real_B = self._padded(inputs[rows], targets[rows], size)
            norm_B, loss_B = private.records.norms(tokens_BT, targets_BT)
            weight_B = private.records.weights(norm_B) * real_B
            # A record whose gradient is not finite must not enter the sum, since zero times infinity is not zero.
            tokens_BT[~torch.isfinite(norm_B)] = 0
            losses_BT = cross_entropy(self.engine(tokens_BT), targets_BT, reduction="none").view(targets_BT.shape)
            private.is_last = part == parts - 1
            self.engine.set_gradient_accumulation_boundary(private.is_last)
            self.engine.backward((weight_B * losses_BT.mean(dim=1)).sum() * self.workers / self.expected_records)
            if private.is_last and private.noised != len(self.parameters):
                raise PrivacyError(
                    f"{private.noised} of {len(self.parameters)} parameters were noised: no step is taken"
                )
            self.engine.step()
            private.is_last = False
            total += (loss_B * real_B).nan_to_num(0.0, 0.0, 0.0).sum().double()
        return total / max(len(inputs), 1)

    def _padded(
        self, inputs: npt.NDArray[np.integer[Any]], targets: npt.NDArray[np.integer[Any]], size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The records, padded with records of zeros, and 1 for each real record."""
        real_B = torch.zeros(size, device=self.device)
        real_B[: len(inputs)] = 1.0
        padded = []
        for ids in (inputs, targets):
            filled = np.zeros((size, self.shape.context), np.int64)
            filled[: len(ids)] = ids
            padded.append(torch.from_numpy(filled).to(self.device))
        return padded[0], padded[1], real_B

    def _loss(self, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], reduction: str) -> Tensor:
        tokens_BT, targets_BT = (torch.from_numpy(np.array(ids, np.int64)).to(self.device) for ids in (inputs, targets))
        return cross_entropy(self.engine(tokens_BT), targets_BT, reduction=reduction)

    def _set_rate(self, rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    # ---- tensors of the engine ---------------------------------------------------------------------------------

    @property
    def _optimizer(self) -> Any:
        """The optimizer inside DeepSpeed's wrapping; stage 0 in fp32 has none."""
        optimizer = self.engine.optimizer
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer
        return optimizer

    @property
    def _states(self) -> Any:
        return self._optimizer.state

    def _link_moments(self) -> None:
        """Link every parameter to its moments.

        At stages 1 and 2 DeepSpeed does this once, after the first step of the first parameter group. The other groups
        have no moments then.
        """
        states = {flat.untyped_storage().data_ptr(): (flat, state) for flat, state in self._states.items()}
        for parameter in self.parameters.values():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                mapping.set_optim_state_fragment(*states[mapping.hp_fragment.untyped_storage().data_ptr()])

    def _full_parameter(self, parameter: nn.Parameter) -> Tensor:
        full: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter.detach() if full is None else full

    def _full_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        full: Tensor | None = safe_get_full_optimizer_state(parameter, name)
        return torch.as_tensor(self._states[parameter][name]) if full is None else full

    def _gathered(self, full: Callable[[nn.Parameter], Tensor]) -> Iterator[Flat]:
        for span in self.spans:
            where = span.where
            layer = np.empty(where.stop - where.start if self.rank == 0 else 0, np.float32)
            for entry in span.entries:
                value = full(self.parameters[entry.name])
                if self.rank == 0:
                    start = entry.offset - where.start
                    torch.from_numpy(layer)[start : start + entry.size].copy_(value.reshape(-1))
            yield layer

    def _tensor(self, values: Flat, entry: Entry) -> Tensor:
        """One parameter's part of a flat buffer, on the device."""
        part = np.array(values[entry.offset : entry.offset + entry.size])  # shared memory is read-only, torch is not
        return torch.from_numpy(part).view(entry.shape).to(self.device)

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """This worker's part of a parameter at stage 3. All parts are equal, with padding at the end."""
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size, dtype=value.dtype, device=value.device)
        own = value.reshape(-1)[self.rank * size : (self.rank + 1) * size]
        padded[: own.numel()] = own
        return padded
