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
from collections.abc import Iterable
from itertools import chain

import numpy as np

from worldlm_ray.config.federated import ServerOptimizerConfig
from worldlm_ray.config.values import unknown_name
from worldlm_ray.errors import ConfigError
from worldlm_ray.tensors.buffers import BLOCK, Flat, spread

_BUFFERS = {
    "sgd": (),
    "nesterov": ("momentum",),
    "delayed_nesterov": ("momentum", "delayed"),
    "adam": ("momentum", "variance"),
}


def default_lr(config: ServerOptimizerConfig) -> float:
    """The rate of a rule whose rate was not set."""
    rates = {"sgd": 1.0, "nesterov": 0.7, "delayed_nesterov": 0.2 * config.delay, "adam": 0.01}
    if config.name not in rates:
        raise _unknown(config)
    return rates[config.name]


def state_buffers(config: ServerOptimizerConfig) -> tuple[str, ...]:
    """Names of the backbone-sized buffers that a rule keeps.

    Raises:
        ConfigError: there is no rule of that name.
    """
    if config.name not in _BUFFERS:
        raise _unknown(config)
    return _BUFFERS[config.name]


def _unknown(config: ServerOptimizerConfig) -> ConfigError:
    return unknown_name("aggregation.server_optimizer.name", config.name, _BUFFERS)


class ServerOptimizer:
    """One node's optimizer: its rule and the state that the rule needs.

    Args:
        config: which rule, and its numbers.
        size: elements of the backbone.
    """

    def __init__(self, config: ServerOptimizerConfig, size: int) -> None:
        self.config = config
        self.lr = default_lr(config) if config.lr is None else config.lr
        self.steps = 0
        """Aggregations applied so far."""
        self.buffers: dict[str, Flat] = {name: np.zeros(size, np.float32) for name in state_buffers(config)}

    @property
    def rate(self) -> float:
        """How far a mean update moves the backbone at once, in multiples of it; of adam there is no telling: 1."""
        config = self.config
        rates = {
            "sgd": self.lr,
            "nesterov": self.lr * (1.0 + config.momentum),
            "delayed_nesterov": self.lr / config.delay,
        }
        return rates.get(config.name, 1.0)

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
                self._step(step, state, temporary[: part.stop - part.start], is_last=is_last)
                squared.append(float(np.dot(step, step)))
                np.add(theta[part], step, out=step)
            return squared

        return math.sqrt(sum(chain.from_iterable(spread(update.size, work))))

    def _step(self, g: Flat, state: dict[str, Flat], temporary: Flat, *, is_last: bool) -> None:
        """Turn one block of the mean update into the step to take, in place."""
        lr, config = np.float32(self.lr), self.config
        if config.name == "nesterov":
            momentum, mu = state["momentum"], np.float32(config.momentum)
            momentum *= mu
            momentum += g
            np.multiply(momentum, mu, out=temporary)
            g += temporary
        elif config.name == "delayed_nesterov":
            self._delayed(g, state, temporary, is_last=is_last)
        elif config.name == "adam":
            momentum, variance = state["momentum"], state["variance"]
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
        elif config.name != "sgd":
            raise _unknown(config)
        if self.lr != 1.0:
            g *= lr

    def _delayed(self, g: Flat, state: dict[str, Flat], temporary: Flat, *, is_last: bool) -> None:
        momentum, delayed = state["momentum"], state["delayed"]
        mu, share = np.float32(self.config.momentum), np.float32(1.0 / self.config.delay)
        delayed += g
        g *= share
        if is_last:
            np.multiply(delayed, share, out=temporary)
            momentum *= mu
            momentum += temporary
            np.multiply(momentum, mu, out=temporary)
            g += temporary
            delayed.fill(0.0)
