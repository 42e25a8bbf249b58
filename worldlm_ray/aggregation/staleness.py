"""How much an update still counts when its parent has moved on.

tau is the parent's version now minus the version that the update was computed from. Every function is 1 at
tau = 0 and falls from there. Names and defaults: FedAsync (Xie, Koyejo, Gupta, arXiv 1903.03934, section 5.2)
and FedBuff (Nguyen et al., AISTATS 2022: polynomial with a = 0.5).
"""

from __future__ import annotations

import math

from worldlm_ray.config.federated import StalenessConfig
from worldlm_ray.config.values import unknown_name

DEFAULT_A = {"constant": 0.0, "polynomial": 0.5, "hinge": 10.0, "exponential": 0.5, "harmonic": 1.0}


def discount(config: StalenessConfig, tau: int) -> float:
    """The factor s(tau) in (0, 1].

        constant      1
        polynomial    (tau + 1)^-a                          a = 0.5
        hinge         1 if tau <= b else 1/(a (tau-b) + 1)   a = 10, b = 4
        exponential   exp(-a tau)                            a = 0.5
        harmonic      1/(1 + a tau)                          a = 1

    Args:
        config: function and its parameters.
        tau: staleness in versions, not negative.

    Raises:
        ConfigError: there is no function of that name.
        ValueError: tau is negative.
    """
    if tau < 0:
        raise ValueError(f"staleness {tau} is negative")
    a = DEFAULT_A.get(config.fn, 0.0) if config.a is None else config.a
    if config.fn == "polynomial":
        return float((tau + 1) ** -a)
    if config.fn == "hinge":
        return 1.0 if tau <= config.b else 1.0 / (a * (tau - config.b) + 1.0)
    if config.fn == "exponential":
        return math.exp(-a * tau)
    if config.fn == "harmonic":
        return 1.0 / (1.0 + a * tau)
    if config.fn == "constant":
        return 1.0
    raise unknown_name("aggregation.staleness.fn", config.fn, DEFAULT_A)
