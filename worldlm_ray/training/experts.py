"""The trainer of a client that mixes experts (model/experts.py): its own adapter and its routers are trained.

The routers have an AdamW of their rate and without weight decay. Routers and experts of others are part of what a
restart needs; neither is ever part of a push.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.model.expert_names import EXPERT, EXPERTS, ROUTER
from worldlm_ray.model.experts import Experts
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import MOMENTS, STEP, Batch

_THETA = f"{ROUTER}theta"


class ExpertTrainer(LocalTrainer):
    """A trainer whose model is a mixture of experts, of which it trains one.

    Args:
        shape: of the model; names the experts.
        layout: as for `LocalTrainer`.
        training: as for `LocalTrainer`.
        threads: as for `LocalTrainer`.
        device: as for `LocalTrainer`.
    """

    def __init__(
        self,
        shape: PretrainedShape,
        layout: Layout,
        training: TrainingConfig,
        *,
        threads: int,
        device: str | None = None,
    ) -> None:
        super().__init__(shape, layout, training, threads=threads, device=device)
        self.experts = Experts(self.model.root, layout, EXPERTS[shape.lora.experts], self.device)
        self._router = torch.nn.Parameter(self.experts.router)
        self._router.grad = self.experts.gradient
        betas = (training.betas[0], training.betas[1])
        self._router_optimizer = torch.optim.AdamW([self._router], betas=betas, weight_decay=0.0, fused=True)

    def take_experts(self, values: Mapping[str, Flat]) -> bool:
        """See Trainer."""
        self.experts.take(values)
        return True

    def step(self, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], learning_rate: float) -> Tensor:
        """One step of the own adapter and of the routers; see LocalTrainer."""
        self.experts.gradient.zero_()
        loss = super().step(inputs, targets, learning_rate)
        self._turn(learning_rate)
        return loss

    def _turn(self, learning_rate: float) -> None:
        """Clip the routers' gradient, and take their step."""
        if self.training.grad_clip:
            norm = torch.linalg.vector_norm(self.experts.gradient)
            self.experts.gradient.mul_(torch.clamp(self.training.grad_clip / (norm + 1e-6), max=1.0))
        self._router_optimizer.param_groups[0]["lr"] = learning_rate
        self._router_optimizer.step()

    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        """Summed loss and tokens: of the mixture, or of other parameters alone, such as the world's adapter."""
        self.experts.mix(parameters is None)
        try:
            return super().evaluate(batches, parameters=parameters)
        finally:
            self.experts.mix(True)

    def optimizer_state(self) -> dict[str, Flat]:
        """What a restart needs beside the own adapter: moments, routers, and the experts of others."""
        found = super().optimizer_state() | {_THETA: self._copied(self.experts.router)}
        state = self._router_optimizer.state.get(self._router, {})
        if state:
            found |= {f"{ROUTER}{name}": self._copied(state[name]) for name in MOMENTS}
            found[f"{ROUTER}{STEP}"] = np.array([float(state[STEP])], np.float32)
        return found | {f"{EXPERT}{name}": self._copied(values) for name, values in self.experts.others.items()}

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        """Restore the result of `optimizer_state`."""
        super().load_optimizer_state({n: v for n, v in saved.items() if not n.startswith((ROUTER, EXPERT))})
        if _THETA not in saved:
            return
        self.load_experts(saved)
        if f"{ROUTER}{STEP}" in saved:
            moments = {n: torch.from_numpy(np.array(saved[f"{ROUTER}{n}"])).to(self.device) for n in MOMENTS}
            step = torch.tensor(float(saved[f"{ROUTER}{STEP}"][0]), device=self.device)
            self._router_optimizer.state[self._router] = {STEP: step, **moments}

    def load_experts(self, saved: Mapping[str, Flat]) -> None:
        """Restore of the result of `optimizer_state` what a model computes with: routers and experts of others."""
        self.experts.router.copy_(torch.from_numpy(np.array(saved[_THETA])))
        self.experts.take({name: saved[f"{EXPERT}{name}"] for name in self.experts.others})

    def forget(self) -> None:
        """Drop the moments and what the routers have become. The experts of others are sound: they stay."""
        super().forget()
        self._router_optimizer.state.clear()
        self.experts.reset()

    @staticmethod
    def _copied(values: Tensor) -> Flat:
        return values.detach().cpu().numpy().reshape(-1).copy()
