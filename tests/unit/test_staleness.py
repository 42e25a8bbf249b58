"""Staleness functions against numbers computed by hand from their published formulas."""

from __future__ import annotations

import math

import pytest

from worldlm_ray.aggregation.staleness import STALENESS, discount
from worldlm_ray.config.federated import StalenessConfig


def s(fn: str, tau: int, *, a: float | None = None, b: float = 4.0) -> float:
    return discount(StalenessConfig(fn=fn, a=a, b=b), tau)


@pytest.mark.parametrize(
    ("fn", "tau", "expected"),
    [
        ("constant", 0, 1.0),
        ("constant", 1, 1.0),
        ("constant", 3, 1.0),
        ("polynomial", 0, 1.0),
        ("polynomial", 1, 0.7071067811865476),  # 2^-0.5
        ("polynomial", 3, 0.5),  # 4^-0.5
        ("hinge", 0, 1.0),
        ("hinge", 1, 1.0),
        ("hinge", 3, 1.0),
        ("hinge", 4, 1.0),  # tau = b still costs nothing
        ("hinge", 5, 1 / 11),  # 1 / (10 (5-4) + 1)
        ("hinge", 7, 1 / 31),  # 1 / (10 (7-4) + 1)
        ("exponential", 0, 1.0),
        ("exponential", 1, 0.6065306597126334),  # e^-0.5
        ("exponential", 3, 0.22313016014842982),  # e^-1.5
        ("harmonic", 0, 1.0),
        ("harmonic", 1, 0.5),
        ("harmonic", 3, 0.25),
    ],
)
def test_defaults_give_the_published_numbers(fn: str, tau: int, expected: float) -> None:
    assert s(fn, tau) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("fn", "a", "b", "tau", "expected"),
    [
        ("polynomial", 1.0, 4.0, 3, 0.25),  # FedML's 1/(1+tau)
        ("polynomial", 2.0, 4.0, 1, 0.25),
        ("hinge", 4.0, 2.0, 2, 1.0),
        ("hinge", 4.0, 2.0, 3, 0.2),  # 1 / (4 (3-2) + 1)
        ("exponential", 1.0, 4.0, 1, 0.36787944117144233),
        ("harmonic", 2.0, 4.0, 3, 1 / 7),
    ],
)
def test_parameters_replace_the_defaults(fn: str, a: float, b: float, tau: int, expected: float) -> None:
    assert s(fn, tau, a=a, b=b) == pytest.approx(expected, rel=1e-12)


def test_polynomial_is_not_nvflares_formula() -> None:
    # NVFlare weights by 1/(1 + tau^0.5), which is 0.5 at tau = 1; FedBuff's is 1/sqrt(1 + tau).
    nvflare = 1 / (1 + 1**0.5)
    assert s("polynomial", 1) == pytest.approx(1 / math.sqrt(2))
    assert abs(s("polynomial", 1) - nvflare) > 0.2


def test_asking_again_gives_the_same_number() -> None:
    # Plato's FedAsync multiplies its mixing rate in place until it is zero.
    config = StalenessConfig(fn="polynomial")
    assert [discount(config, 3) for _ in range(5)] == [0.5] * 5


@pytest.mark.parametrize("fn", STALENESS.names())
def test_every_function_is_one_when_fresh_and_never_rises(fn: str) -> None:
    values = [s(fn, tau) for tau in range(50)]
    assert values[0] == 1.0
    assert all(later <= earlier for earlier, later in zip(values, values[1:], strict=False))
    assert all(value > 0.0 for value in values)


@pytest.mark.parametrize("fn", STALENESS.names())
def test_negative_staleness_raises(fn: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        s(fn, -1)
