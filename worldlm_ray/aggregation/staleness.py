"""How much an update still counts when its parent has moved on.

tau is the parent's version now minus the version that the update was computed from. Every function is 1 at
tau = 0 and never rises. Names and defaults: FedAsync (Xie, Koyejo, Gupta, arXiv 1903.03934, section 5.2)
and FedBuff (Nguyen et al., AISTATS 2022: polynomial with a = 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from worldlm_ray.config import names
from worldlm_ray.config.federated import StalenessConfig
from worldlm_ray.config.registry import Registry

Function = Callable[[int, float, float], float]
"""From tau and the parameters a and b to s(tau)."""


@dataclass(frozen=True)
class Staleness:
    """A staleness function and its default."""

    function: Function
    a: float
    """The parameter a, where a configuration gives none."""


STALENESS: Registry[Staleness] = names.STALENESS


def staleness(name: str, *, a: float = 0.0) -> Callable[[Function], Function]:
    """Register a staleness function.

    Args:
        name: what `aggregation.staleness.fn` calls it.
        a: its parameter a, unless a configuration gives one.
    """

    def register(function: Function) -> Function:
        STALENESS.add(name, Staleness(function, a), function)
        return function

    return register


@staleness("constant")
def constant(tau: int, a: float, b: float) -> float:
    """1. Source: FedAsync, arXiv 1903.03934, section 5.2."""
    return 1.0


@staleness("polynomial", a=0.5)
def polynomial(tau: int, a: float, b: float) -> float:
    """(tau + 1)^-a, a = 0.5. Source: FedAsync, arXiv 1903.03934, section 5.2; FedBuff (AISTATS 2022) for a."""
    return float((tau + 1) ** -a)


@staleness("hinge", a=10.0)
def hinge(tau: int, a: float, b: float) -> float:
    """1 if tau <= b, else 1/(a (tau - b) + 1); a = 10, b = 4. Source: FedAsync, arXiv 1903.03934, section 5.2."""
    return 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0)


@staleness("exponential", a=0.5)
def exponential(tau: int, a: float, b: float) -> float:
    """exp(-a tau), a = 0.5. Source: FedAsync, arXiv 1903.03934."""
    return math.exp(-a * tau)


@staleness("harmonic", a=1.0)
def harmonic(tau: int, a: float, b: float) -> float:
    """1/(1 + a tau), a = 1. Source: FedAsync, arXiv 1903.03934."""
    return 1.0 / (1.0 + a * tau)


def discount(config: StalenessConfig, tau: int) -> float:
    """The factor s(tau) in (0, 1].

    Args:
        config: function and its parameters.
        tau: staleness in versions, not negative.

    Raises:
        ConfigError: there is no function of that name.
        ValueError: tau is negative.
    """
    if tau < 0:
        raise ValueError(f"staleness {tau} is negative")
    chosen = STALENESS.get(config.fn)
    return chosen.function(tau, chosen.a if config.a is None else config.a, config.b)
