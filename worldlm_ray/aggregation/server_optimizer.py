"""How an inner node applies the mean update of its children to its backbone.

The mean update points downhill already (it is where training went), so every rule adds it. Buffers are
updated in place, a cache-sized block at a time; nothing as large as the model is allocated per aggregation.

    name       rule, g the mean update                                       source
    sgd        theta += lr g                                lr 1              FedAvg, arXiv 1602.05629
    nesterov   m = mu m + g; theta += lr (g + mu m)         lr 0.7, mu 0.9    DiLoCo, arXiv 2311.08105
    delayed_nesterov, N = delay, t-th aggregation:          lr 0.2 N, mu 0.9  Async Local-SGD, arXiv 2401.09135
               d += g; theta += lr g / N, and                                 (c = 0); rates: HALoS (ICML 2025)
               if N divides t: m = mu m + d / N; d = 0; theta += lr mu m
    adam       m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;  lr 0.01           FedAdam, arXiv 2003.00295, alg. 2
               theta += lr m / (sqrt(v) + eps)              eps 1e-3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from worldlm_ray.config import names
from worldlm_ray.config.federated import ServerOptimizerConfig
from worldlm_ray.config.registry import Registry
from worldlm_ray.tensors.buffers import BLOCK, Flat, spread

Lr = Callable[[ServerOptimizerConfig], float]
"""From a configuration to the rate that a rule has if none was set."""


@dataclass(frozen=True)
class Block:
    """What a rule works on: a block of the backbone. All of it is changed in place."""

    g: Flat
    """The mean update; afterwards the step to take, before the rate."""
    state: dict[str, Flat]
    """The rule's buffers, by name."""
    temporary: Flat
    """Room for one more block; its contents do not matter."""
    is_last: bool
    """Whether this is the last of `delay` aggregations."""


Step = Callable[[Block, ServerOptimizerConfig], None]


@dataclass(frozen=True)
class ServerRule:
    """One way to apply a mean update."""

    step: Step
    lr: Lr
    buffers: tuple[str, ...]
    """Names of the backbone-sized buffers that the rule keeps; they begin as zeros and travel in checkpoints."""


SERVER_OPTIMIZERS: Registry[ServerRule] = names.SERVER_OPTIMIZERS


def server_optimizer(name: str, *, lr: float | Lr, buffers: tuple[str, ...] = ()) -> Callable[[Step], Step]:
    """Register a rule for the backbone.

    Args:
        name: what `aggregation.server_optimizer.name` calls it.
        lr: the rate where a configuration gives none.
        buffers: names of the backbone-sized buffers that it keeps.
    """

    def register(step: Step) -> Step:
        rate = lr if callable(lr) else lambda config: lr
        SERVER_OPTIMIZERS.add(name, ServerRule(step, rate, buffers), step)
        return step

    return register


@server_optimizer("sgd", lr=1.0)
def sgd(block: Block, config: ServerOptimizerConfig) -> None:
    """The step is g. Source: FedAvg, arXiv 1602.05629."""


@server_optimizer("nesterov", lr=0.7, buffers=("momentum",))
def nesterov(block: Block, config: ServerOptimizerConfig) -> None:
    """m = mu m + g; the step is g + mu m. Source: DiLoCo, arXiv 2311.08105."""
    g, momentum, mu = block.g, block.state["momentum"], np.float32(config.momentum)
    momentum *= mu
    momentum += g
    np.multiply(momentum, mu, out=block.temporary)
    g += block.temporary


@server_optimizer(
    "delayed_nesterov",
    lr=lambda config: 0.2 * config.delay,
    buffers=("momentum", "delayed"),
)
def delayed_nesterov(block: Block, config: ServerOptimizerConfig) -> None:
    """d += g; the step is g / N, and every N-th time mu m more, with m = mu m + d / N; d = 0.

    Source: Async Local-SGD, arXiv 2401.09135 (c = 0); rates: HALoS (ICML 2025).
    """
    g, momentum, delayed = block.g, block.state["momentum"], block.state["delayed"]
    mu, share = np.float32(config.momentum), np.float32(1.0 / config.delay)
    delayed += g
    g *= share
    if block.is_last:
        np.multiply(delayed, share, out=block.temporary)
        momentum *= mu
        momentum += block.temporary
        np.multiply(momentum, mu, out=block.temporary)
        g += block.temporary
        delayed.fill(0.0)


@server_optimizer("adam", lr=0.01, buffers=("momentum", "variance"))
def adam(block: Block, config: ServerOptimizerConfig) -> None:
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; the step is m / (sqrt(v) + eps).

    Source: FedAdam, arXiv 2003.00295, alg. 2.
    """
    g, temporary, momentum, variance = block.g, block.temporary, block.state["momentum"], block.state["variance"]
    beta1, beta2 = np.float32(config.betas[0]), np.float32(config.betas[1])
    np.multiply(g, g, out=temporary)
    temporary *= np.float32(1.0) - beta2
    variance *= beta2
    variance += temporary
    g *= np.float32(1.0) - beta1
    momentum *= beta1
    momentum += g
    np.sqrt(variance, out=temporary)
    temporary += np.float32(config.eps)
    np.divide(momentum, temporary, out=g)


def default_lr(config: ServerOptimizerConfig) -> float:
    """The rate of a rule whose rate was not set.

    Raises:
        ConfigError: there is no rule of that name.
    """
    return SERVER_OPTIMIZERS.get(config.name).lr(config)


def state_buffers(config: ServerOptimizerConfig) -> tuple[str, ...]:
    """Names of the backbone-sized buffers that a rule keeps.

    Raises:
        ConfigError: there is no rule of that name.
    """
    return SERVER_OPTIMIZERS.get(config.name).buffers


class ServerOptimizer:
    """One node's optimizer: its rule and the state that the rule needs.

    Args:
        config: which rule, and its numbers.
        size: elements of the backbone.
    """

    def __init__(self, config: ServerOptimizerConfig, size: int) -> None:
        self.config, self.rule = config, SERVER_OPTIMIZERS.get(config.name)
        self.lr = default_lr(config) if config.lr is None else config.lr
        self.steps = 0
        """Aggregations applied so far."""
        self.buffers: dict[str, Flat] = {name: np.zeros(size, np.float32) for name in state_buffers(config)}

    def apply(
        self,
        update: Flat,
        theta: Flat,
        *,
        scale: float = 1.0,
        first: tuple[Flat, float] | None = None,
    ) -> float:
        """Turn a mean update into the new backbone: afterwards `update` is theta's successor.

        Args:
            update: the sum of weighted updates; overwritten with the new values.
            theta: the values now; not changed.
            scale: makes the sum a mean: one over the undiscounted weight.
            first: the only update of the sum and its weight, instead of what is in `update`.

        Returns:
            L2 norm of the step taken, for the record: to five digits or so.
        """
        self.steps += 1
        is_last = self.steps % self.config.delay == 0
        """Of `delay` aggregations."""

        def work(parts: Iterable[slice]) -> list[float]:
            temporary, squared = np.empty(min(BLOCK, update.size), np.float32), []
            for part in parts:
                step = update[part]
                if first is None:
                    step *= np.float32(scale)
                else:
                    np.multiply(first[0][part], np.float32(first[1] * scale), out=step)
                state = {name: buffer[part] for name, buffer in self.buffers.items()}
                self.rule.step(Block(step, state, temporary[: part.stop - part.start], is_last), self.config)
                if self.lr != 1.0:
                    step *= np.float32(self.lr)
                squared.append(float(np.dot(step, step)))
                np.add(theta[part], step, out=step)
            return squared

        return math.sqrt(sum(chain.from_iterable(spread(update.size, work))))
