"""Tie a model's trainable parameters and gradients to flat buffers.

After `bind`, the optimizer sees one tensor, a push is one subtraction and a pull is one copy.
"""

from __future__ import annotations

from torch import Tensor, nn

from worldlm_ray.tensors.layout import Layout


def bind(model: nn.Module, layout: Layout, flat: Tensor, gradient: Tensor | None = None) -> None:
    """Make the model's parameters views of `flat`, and their gradients views of `gradient`.

    Args:
        model: the names of its trainable parameters must be the layout's. Frozen ones stay as they are.
        layout: where each parameter lies.
        flat: fp32 [layout.size]; its values become the model's.
        gradient: same size. Backward passes accumulate into it. None: gradients are not bound.
    """
    parameters, names = dict(model.named_parameters()), _names(model)
    for entry in layout.entries:
        part = slice(entry.offset, entry.offset + entry.size)
        replaced = parameters.pop(entry.name)
        bound = nn.Parameter(flat[part].view(entry.shape), requires_grad=replaced.requires_grad)
        if gradient is not None:
            bound.grad = gradient[part].view(entry.shape)
        for name in names[replaced]:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, bound)
    trained = sorted(name for name, parameter in parameters.items() if parameter.requires_grad)
    if trained:
        raise KeyError(f"the layout lacks {trained}")


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of every parameter: a tied one has several."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def decayed(model: nn.Module) -> list[Tensor]:
    """The trainable parameters that weight decay applies to: matrices, not norms."""
    return [parameter.data for parameter in model.parameters() if parameter.ndim > 1 and parameter.requires_grad]
