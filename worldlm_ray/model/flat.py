"""Tie a decoder's parameters and gradients to flat buffers.

After `bind`, the optimizer sees one tensor, a push is one subtraction and a pull is one copy.
"""

from __future__ import annotations

from torch import Tensor, nn

from worldlm_ray.tensors.layout import Layout


def bind(model: nn.Module, layout: Layout, flat: Tensor, gradient: Tensor | None = None) -> None:
    """Make the model's parameters views of `flat`, and their gradients views of `gradient`.

    Args:
        model: its parameter names must be the layout's.
        layout: where each parameter lies.
        flat: fp32 [layout.size]; its values become the model's.
        gradient: same size. Backward passes accumulate into it. None: gradients are not bound.
    """
    parameters = dict(model.named_parameters())
    for entry in layout.entries:
        part = slice(entry.offset, entry.offset + entry.size)
        requires_grad = parameters.pop(entry.name).requires_grad
        bound = nn.Parameter(flat[part].view(entry.shape), requires_grad=requires_grad)
        if gradient is not None:
            bound.grad = gradient[part].view(entry.shape)
        module, _, leaf = entry.name.rpartition(".")
        setattr(model.get_submodule(module), leaf, bound)
    if parameters:
        raise KeyError(f"the layout lacks {sorted(parameters)}")


def decayed(model: nn.Module) -> list[Tensor]:
    """The parameters that weight decay applies to: matrices, not norms."""
    return [parameter.data for parameter in model.parameters() if parameter.ndim > 1]
