"""Kin experts: every adapted layer mixes the client's own adapter with those of others, token by token.

    y = W x + s * sum_k m_k(x) B_k A x        m(x) = softmax(U x + c)

A is the same for all experts and everywhere (`model.lora.freeze_a`), so that the mean of several B is the mean of their
adapters. Only the own B and the router (U, c) are trained, and the router never leaves the client.

Source: kin experts follow FedALT (Bian et al., arXiv 2503.11880: own and rest-of-the-world adapters, mixed per token)
and CoMiGS (Fan et al., arXiv 2410.10757), with one expert per level of the tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from worldlm_ray.model.flat import bind
from worldlm_ray.model.pretrained_shape import LORA_B
from worldlm_ray.tensors.layout import Layout, make_layout

OTHERS = -1.0
"""c of the experts that are not the client's own, at the beginning; c of the own one is 0."""


class Mixture:
    """One adapted layer with several experts: what its forward pass computes.

    Args:
        layer: peft's, with the adapter `default`.
        others: B of each expert but the own one, [outputs, r]: views that change in place.
        router: gives a logit per expert from the layer's inputs.
    """

    def __init__(self, layer: Any, others: Sequence[Tensor], router: nn.Module) -> None:
        self.layer, self.others, self.router = layer, others, router
        self.is_mixed = True
        """Whether the experts of others take part."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., outputs] of inputs [..., inputs]."""
        layer = self.layer
        found: Tensor = layer.base_layer(x, *args, **kwargs)
        low, own = layer.lora_A["default"](layer.lora_dropout["default"](x)), layer.lora_B["default"].weight
        if self.is_mixed:
            gates = torch.softmax(self.router(x), dim=-1)
            low = (gates.unsqueeze(-1) * low.unsqueeze(-2)).flatten(-2)  # [..., experts * r]: one product for all
            own = torch.cat([own, *self.others], dim=1)
        mixed: Tensor = found + functional.linear(low, own) * layer.scaling["default"]
        return mixed


class Experts:
    """The experts and the routers of a whole model.

    Args:
        root: transformers' model with adapters, bound to a flat buffer.
        layout: of what is trained: the B of every adapted layer.
        names: of the experts; the first is the client's own.
        device: of the model.
    """

    def __init__(self, root: nn.Module, layout: Layout, names: Sequence[str], device: torch.device) -> None:
        self.others = {name: torch.zeros(layout.size, device=device) for name in names[1:]}
        """Parameters [layout.size] of the experts of others. Changed in place."""
        views = [
            {entry.name: flat[entry.offset : entry.offset + entry.size].view(entry.shape) for entry in layout.entries}
            for flat in self.others.values()
        ]
        layers = {name.removesuffix(LORA_B): None for name in views[0]}
        adapted: list[Any] = [root.get_submodule(name) for name in layers]
        with torch.device("meta"):
            routers = nn.ModuleList(nn.Linear(layer.in_features, len(names)) for layer in adapted)
        shapes = [(name, tuple(parameter.shape)) for name, parameter in routers.named_parameters()]
        self._layout = make_layout(shapes, [], layers=0)
        self.router = torch.zeros(self._layout.size, device=device)
        """U and c of all layers, flat."""
        self.gradient = torch.zeros_like(self.router)
        bind(routers, self._layout, self.router, self.gradient)
        self.routers = routers
        self.reset()
        self.mixtures = [
            Mixture(layer, [view[name + LORA_B] for view in views], router)
            for name, layer, router in zip(layers, adapted, routers, strict=True)
        ]
        for mixture in self.mixtures:
            mixture.layer.forward = mixture.forward  # names of modules and parameters stay those of the layout

    def reset(self) -> None:
        """Routers as they are at the beginning, and experts of others without effect."""
        with torch.no_grad():
            self.router.zero_()
            for router in self.routers:
                router.bias[1:] = OTHERS  # type: ignore[operator]
        for flat in self.others.values():
            flat.zero_()

    def take(self, values: Mapping[str, Any]) -> None:
        """Replace the experts of others; numpy buffers [layout.size] by name."""
        for name, flat in self.others.items():
            flat.copy_(torch.from_numpy(np.array(values[name])))

    def mix(self, is_mixed: bool) -> None:
        """Let the experts of others take part, or compute with the bound adapter alone."""
        for mixture in self.mixtures:
            mixture.is_mixed = is_mixed
