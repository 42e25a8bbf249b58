"""Kin experts: every adapted layer mixes the client's own adapter with those of others, token by token.

    y = W x + s * sum_k m_k(x) B_k A_k x        m(x) = softmax(U x + c)

Where A is frozen (`model.lora.freeze_a`), it is the same for all experts and everywhere, and the mean of several B is
the mean of their adapters. Where it is trained, A_k and B_k are means of A and of B, as in FedIT. Only the own adapter
and the router (U, c) are trained, and the router never leaves the client.

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
from worldlm_ray.model.pretrained_shape import LORA_A, LORA_B
from worldlm_ray.tensors.layout import Layout, make_layout

OTHERS = -1.0
"""c of the experts that are not the client's own, at the beginning; c of the own one is 0."""


class Mixture:
    """One adapted layer with several experts: what its forward pass computes.

    Args:
        layer: peft's, with the adapter `default`.
        others_a: A of each expert but the own one, [r, inputs]: views that change in place; none where A is frozen.
        others_b: B of the same, [outputs, r].
        router: gives a logit per expert from the layer's inputs.
    """

    def __init__(self, layer: Any, others_a: Sequence[Tensor], others_b: Sequence[Tensor], router: nn.Module) -> None:
        self.layer, self.others_a, self.others_b, self.router = layer, others_a, others_b, router
        self.is_mixed = True
        """Whether the experts of others take part."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., outputs] of inputs [..., inputs]."""
        layer = self.layer
        found: Tensor = layer.base_layer(x, *args, **kwargs)
        a, b, dropped = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_dropout["default"](x)
        if not self.is_mixed:
            low = functional.linear(dropped, a)
        else:
            gates = torch.softmax(self.router(x), dim=-1)
            low = functional.linear(dropped, torch.cat([a, *self.others_a]))
            low = low.reshape(*low.shape[:-1], -1, a.shape[0])  # [..., 1 or experts, r]
            low = (gates.unsqueeze(-1) * low).flatten(-2)  # [..., experts * r]: one product for all
            b = torch.cat([b, *self.others_b], dim=1)
        mixed: Tensor = found + functional.linear(low, b) * layer.scaling["default"]
        return mixed


class Experts:
    """The experts and the routers of a whole model.

    Args:
        root: transformers' model with adapters, bound to a flat buffer.
        layout: of what is trained: B of every adapted layer, and A unless it is frozen.
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
        layers = [name.removesuffix(LORA_B) for name in views[0] if name.endswith(LORA_B)]
        trains_a = len(layers) < len(views[0])
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
            Mixture(
                layer,
                [view[name + LORA_A] for view in views] if trains_a else [],
                [view[name + LORA_B] for view in views],
                router,
            )
            for name, layer, router in zip(layers, adapted, routers, strict=True)
        ]
        for mixture in self.mixtures:
            mixture.layer.forward = mixture.forward  # names of modules and parameters stay those of the layout

    def reset(self) -> None:
        """Routers as they are at the beginning."""
        with torch.no_grad():
            self.router.zero_()
            for router in self.routers:
                router.bias[1:] = OTHERS  # type: ignore[operator]

    def take(self, values: Mapping[str, Any]) -> None:
        """Replace the experts of others; numpy buffers [layout.size] by name."""
        for name, flat in self.others.items():
            flat.copy_(torch.from_numpy(np.array(values[name])))

    def mix(self, is_mixed: bool) -> None:
        """Let the experts of others take part, or compute with the bound adapter alone."""
        for mixture in self.mixtures:
            mixture.is_mixed = is_mixed
