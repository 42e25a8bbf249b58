"""Clipped per-record gradients: the part of DP-SGD that looks at text.

One forward pass keeps every layer's input and output. One backward pass, with respect to the *outputs*, gives what
flows into every layer; with the inputs that is each record's gradient. Its norm gives the record's coefficient
min(1, C / norm), and the weighted sum of all records' gradients is computed from the same two tensors, either by way of
every record's own gradient (`hooks`: quick, but as many gradients in memory as records) or without (`ghost`).

Source: Abadi et al., arXiv 1607.00133, algorithm 1; Li et al., arXiv 2110.05679, section 4 (ghost clipping); Bu et al.,
arXiv 2210.00038 (one backward pass). Per-layer rules are Opacus's.

Shapes: B records, T tokens of a record.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from worldlm_ray.errors import PrivacyError
from worldlm_ray.model.decoder import Decoder, cross_entropy
from worldlm_ray.model.pretrained_shape import Architecture, PretrainedShape

Mode = Literal["ghost", "hooks"]
MARGIN_BF16 = 0.995
"""Records are clipped to this much of the norm in bf16, whose rounding would carry some beyond it."""
TOLERANCE = 1e-4
"""Of the self-test: relative difference of a norm from brute force."""
_SAMPLERS = GradSampleModule.GRAD_SAMPLERS
_NORMS = GradSampleModuleFastGradientClipping.NORM_SAMPLERS


@dataclass
class _Call:
    """One layer's part in a forward pass."""

    layer: nn.Module
    input: Tensor
    output: Tensor | None
    """None once what flows into it is known."""


class RecordGradients:
    """Sums of clipped per-record gradients of a model.

    Args:
        model: token ids [B, T] to logits [B, T, V]; every parameter lies in a module with a rule.
        max_grad_norm: C, the norm to which each record's gradient is clipped.
        mode: `ghost` or `hooks`.
        bf16: whether the passes compute in bf16.

    Raises:
        PrivacyError: per-record gradients of this model cannot be computed.
    """

    def __init__(self, model: nn.Module, *, max_grad_norm: float, mode: Mode, bf16: bool = False) -> None:
        self.model, self.mode, self.bf16 = model, mode, bf16
        self.bound = max_grad_norm * (MARGIN_BF16 if bf16 else 1.0)
        self._layers = layers_with_rules(model)
        self._calls: list[_Call] = []
        self._recording = False
        self._hooks = [layer.register_forward_hook(self._record) for layer in self._layers]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def norms(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """L2 norm of every record's gradient [B], and every record's loss [B] (mean over its tokens)."""
        loss_B, calls, flows = self._flows(tokens_BT, targets_BT)
        with self._exactly():
            squared_B, _ = self._squared(calls, flows, keep=False)
        return squared_B.sqrt(), loss_B

    def add(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Add the clipped gradients of the records to the parameters' `.grad`, which must exist.

        A record whose gradient is not finite counts as a record without one.

        Returns:
            The records' losses [B], which are private.
        """
        loss_B, calls, flows = self._flows(tokens_BT, targets_BT)
        with self._exactly():
            squared_B, samples = self._squared(calls, flows, keep=True)
        finite_B = torch.isfinite(squared_B)
        if not bool(finite_B.all()):  # 0 * inf is nan: such a record must not come near the sum
            if bool(finite_B.any()):
                self.add(tokens_BT[finite_B], targets_BT[finite_B])
            return loss_B
        weight_B = (self.bound / (squared_B.sqrt() + 1e-6)).clamp(max=1.0)
        with self._exactly():
            for call, flow in zip(calls, flows, strict=True):
                self._add_layer(call, flow, weight_B, samples)
        return loss_B

    def _exactly(self) -> torch.autocast:
        """Norms and sums in fp32, also where the passes compute in bf16: a rounded norm would be clipped too little."""
        return torch.autocast(next(self.model.parameters()).device.type, enabled=False)

    def weights(self, norm_B: Tensor) -> Tensor:
        """The records' coefficients [B]: 0 for one whose gradient is not finite."""
        weight_B = (self.bound / (norm_B + 1e-6)).clamp(max=1.0)
        return torch.where(torch.isfinite(norm_B), weight_B, torch.zeros_like(weight_B))

    def _flows(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, list[_Call], list[Tensor]]:
        with self._record_calls() as calls:
            logits_BTV = self.model(tokens_BT)
        loss_BT = cross_entropy(logits_BTV, targets_BT, reduction="none").view(targets_BT.shape)
        # Over all T positions. An ignored target adds 0, so that the number of a record's targets is no scale.
        loss_B = loss_BT.mean(dim=1)
        # Layer outputs only, never parameters: their own gradients would not be clipped.
        outputs = [call.output for call in calls if call.output is not None]
        flows = list(torch.autograd.grad(loss_B.sum(), outputs, retain_graph=False))
        for call in calls:
            call.output = None
        return loss_B.detach(), calls, flows

    def _squared(
        self, calls: list[_Call], flows: list[Tensor], *, keep: bool
    ) -> tuple[Tensor, dict[int, dict[Any, Tensor]]]:
        """Squared norms of the records' gradients [B], and these gradients by layer if they are kept."""
        squared_B = torch.zeros(flows[0].shape[0], device=flows[0].device)
        samples: dict[int, dict[Any, Tensor]] = {}
        for index, call in enumerate(calls):
            flow = flows[index]
            # An embedding's gradient has a row for every token of the vocabulary: only to be kept is it worth making.
            by_norm = self.mode == "ghost" or (isinstance(call.layer, nn.Embedding) and not keep)
            rule = _NORMS.get(type(call.layer)) if by_norm else None
            flow = flow.float()  # of bf16, the norms must not be
            if rule is not None:
                for norm_B in rule(call.layer, [_upcast(call.input)], flow).values():
                    squared_B += norm_B.float().square()
                continue
            found = _SAMPLERS[type(call.layer)](call.layer, [_upcast(call.input)], flow)
            for gradient in found.values():
                squared_B += gradient.flatten(1).float().square().sum(dim=1)
            if keep:
                samples[id(call)] = found
                # The gradients are all that is needed of this layer: its input and flow are as large as they are.
                flows[index] = call.input = torch.empty(0, device=flow.device)
        return squared_B, samples

    def _add_layer(self, call: _Call, flow: Tensor, weight_B: Tensor, samples: dict[int, dict[Any, Tensor]]) -> None:
        found = samples.get(id(call))
        if found is not None:
            for parameter, gradient in found.items():
                parameter.grad.view(-1).addmv_(gradient.float().flatten(1).t(), weight_B)
            return
        flow = flow.float() * weight_B.view(-1, *[1] * (flow.dim() - 1))
        weight = call.layer.weight
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        if isinstance(call.layer, nn.Embedding):
            weight.grad.index_add_(0, call.input.flatten(), flow.flatten(0, -2))
        else:
            weight.grad.addmm_(flow.flatten(0, -2).t(), call.input.float().flatten(0, -2))
            bias = call.layer.bias
            if isinstance(bias, Tensor) and bias.grad is not None:
                bias.grad += flow.flatten(0, -2).sum(dim=0)

    @contextmanager
    def _record_calls(self) -> Iterator[list[_Call]]:
        self._calls, self._recording = [], True
        try:
            yield self._calls
        finally:
            calls, self._calls, self._recording = self._calls, [], False
        count = Counter(id(call.layer) for call in calls)
        if len(count) != len(self._layers) or max(count.values()) != 1:
            raise PrivacyError(
                "a layer is called more or less than once in a forward pass: per-record gradients need once"
            )

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._recording:
            if output.dim() != 3:
                raise PrivacyError(
                    f"{type(layer).__name__} gave {output.dim()} dimensions, expected [records, tokens, width]"
                )
            self._calls.append(_Call(layer, inputs[0].detach(), output))


def layers_with_rules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold trainable parameters. Frozen ones get no gradient, and need no rule.

    Raises:
        PrivacyError: a parameter is shared, or lies in a module for which there is no rule.
    """
    owners = Counter(id(p) for module in model.modules() for p in trained(module))
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for parameter, count in owners.items():
        if count > 1:
            raise PrivacyError(
                f"{names[parameter]} is shared by {count} modules: its per-record gradients are not known"
            )
    found = []
    for name, module in model.named_modules():
        if any(True for _ in trained(module)):
            if type(module) not in _SAMPLERS:
                raise PrivacyError(f"{name} ({type(module).__name__}) has no rule for per-record gradients")
            found.append(module)
    return found


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable parameters that a module holds itself."""
    return (parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad)


def check_architecture(shape: Architecture, *, mode: Mode, model: nn.Module) -> None:
    """The self-test on a small decoder of the same make; of a pre-trained model, on the model itself.

    Args:
        shape: of the model.
        mode: of `RecordGradients`.
        model: whole, not yet sharded. Its parameters are the same afterwards.

    Raises:
        PrivacyError: see `self_test`.
    """
    if isinstance(shape, PretrainedShape):
        with _made_up(model):
            self_test(model, vocab_size=shape.vocab_size, length=min(shape.context, 12), mode=mode)
        return
    small = replace(shape, hidden_size=4 * shape.heads, intermediate_size=16, layers=2, context=12, vocab_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = Decoder(small)
    self_test(decoder, vocab_size=small.vocab_size, length=small.context, mode=mode)


@contextmanager
def _made_up(model: nn.Module) -> Iterator[None]:
    """A model without dropout and with made-up adapters: while B is zero, A has no gradient to compare."""
    was_training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    kept = [parameter.detach().clone() for parameter in trainable]
    generator = torch.Generator().manual_seed(0)
    model.eval()
    with torch.no_grad():
        for parameter in trainable:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(trainable, kept, strict=True):
                parameter.copy_(values)
        model.train(was_training)


def self_test(model: nn.Module, *, vocab_size: int, length: int, mode: Mode) -> None:
    """Compare the norms of two records with those of their separate backward passes.

    This finds what no hook can see, such as a weight that is also used as a function's argument: the bound would be
    broken without a word.

    Args:
        model: of the architecture that will be trained.
        vocab_size: token ids are below this.
        length: tokens per record.
        mode: of `RecordGradients`.

    Raises:
        PrivacyError: they differ.
    """
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    records = torch.randint(vocab_size, (2, length + 1), generator=generator).to(device)
    tokens_BT, targets_BT = records[:, :-1].contiguous(), records[:, 1:].contiguous()
    gradients = RecordGradients(model, max_grad_norm=1.0, mode=mode)
    norms = gradients.norms(tokens_BT, targets_BT)[0]
    gradients.close()
    for index in range(2):
        own = slice(index, index + 1)
        loss = cross_entropy(model(tokens_BT[own]), targets_BT[own])
        own_gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        true = torch.sqrt(sum((g.square().sum() for g in own_gradients), torch.zeros((), device=device)))
        if abs(float(norms[index] - true)) > TOLERANCE * float(true):
            raise PrivacyError(
                f"per-record gradient norms of this model are wrong: {float(norms[index]):.6g} where brute force gives "
                f"{float(true):.6g}; a weight is used outside its module"
            )


def likely_cheaper(*, width: int, length: int) -> Mode:
    """The mode with less arithmetic, for layers of `width` by `width` on sequences of `length` tokens.

    Per record `ghost` takes two products of length x length x width, `hooks` one of length x width x width.
    """
    return "hooks" if 2 * length > width else "ghost"


def cheaper(candidates: dict[Mode, Callable[[], object]], *, repeats: int = 3) -> Mode:
    """The mode whose step takes less time here: the shorter of the best of a few."""
    times: dict[Mode, float] = {}
    for mode, step in candidates.items():
        step()
        best = float("inf")
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            best = min(best, time.perf_counter() - began)
        times[mode] = best
    return min(times, key=lambda mode: times[mode])


def _upcast(values: Tensor) -> Tensor:
    """Layer inputs in fp32; token ids as they are."""
    return values.float() if values.is_floating_point() else values
