"""Epsilon of a history of noisy steps, and the noise that a budget allows. The accountants are Opacus's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, get_args

from worldlm_ray.config.schema import SMALLEST_PRV_NOISE, AccountantName
from worldlm_ray.config.values import unknown_name
from worldlm_ray.errors import PrivacyError
from worldlm_ray.privacy.gaussian import no_noise

LARGEST_NOISE = 1e4
SMALLEST_NOISE: dict[AccountantName, float] = {"rdp": 0.01, "prv": SMALLEST_PRV_NOISE}
"""The search ends there: epsilon is in the hundreds by then, which promises nothing."""
PRECISION = 1e-3
"""Of the noise that is searched for, relative."""


class Spend(NamedTuple):
    """Steps of DP-SGD that were alike."""

    noise: float
    """Noise multiplier: standard deviation over clipping norm."""
    rate: float
    """Probability with which a step takes any one record."""
    steps: int


def merged(history: Sequence[Spend]) -> tuple[Spend, ...]:
    """The history with like steps added up: their order does not matter."""
    totals: dict[tuple[float, float], int] = {}
    for spend in history:
        totals[spend.noise, spend.rate] = totals.get((spend.noise, spend.rate), 0) + spend.steps
    return tuple(Spend(noise, rate, steps) for (noise, rate), steps in totals.items() if steps)


def epsilon(history: Sequence[Spend], *, delta: float, accountant: AccountantName) -> float:
    """The epsilon that a history costs at a delta; infinite where a step had no noise.

    Source: `rdp` Mironov et al., arXiv 1908.10530; `prv` Gopi et al., arXiv 2106.02848; both as in Opacus.
    """
    alike = merged(history)
    if not alike:
        return 0.0
    if any(spend.noise == 0.0 for spend in alike):
        return math.inf
    return _epsilon(alike, delta, accountant)


@lru_cache(maxsize=256)
def _epsilon(history: tuple[Spend, ...], delta: float, accountant: AccountantName) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    if accountant not in get_args(AccountantName):
        raise unknown_name("privacy.accountant", accountant, get_args(AccountantName))
    found = PRVAccountant() if accountant == "prv" else RDPAccountant()
    found.history = [tuple(spend) for spend in history]
    with warnings.catch_warnings():
        # Opacus warns that its largest order was the best one: the bound holds, a better one may exist.
        warnings.simplefilter("ignore")
        try:
            return float(found.get_epsilon(delta))
        except (ValueError, ArithmeticError, RuntimeError) as error:
            detail = " ".join(str(error).split())[:120]
            raise PrivacyError(
                f"privacy.accountant: {accountant} cannot count at delta {delta:g} ({detail}); "
                "use accountant rdp, or a delta from 1e-10 to below 1 / records"
            ) from error


def noise_for(
    target_epsilon: float,
    *,
    spent: Sequence[Spend],
    rate: float,
    steps: int,
    delta: float,
    accountant: AccountantName,
    key: str,
) -> float:
    """The smallest noise with which so many more steps stay within a budget.

    Args:
        target_epsilon: the budget.
        spent: what the same text has paid already.
        rate: probability with which a step takes any one record.
        steps: steps to come.
        delta: of the guarantee.
        accountant: `rdp` or `prv`.
        key: dotted key of the privacy section, for messages.

    Raises:
        PrivacyError: no noise is enough, or any is.
    """

    def fits(noise: float) -> bool:
        return epsilon([*spent, Spend(noise, rate, steps)], delta=delta, accountant=accountant) <= target_epsilon

    high = 1.0
    while not fits(high):
        high *= 2.0
        if high > LARGEST_NOISE:
            before = epsilon(spent, delta=delta, accountant=accountant)
            raise PrivacyError(
                f"{key}.target_epsilon: no noise keeps {steps} steps within {target_epsilon:g} at delta {delta:g} "
                f"({before:.3g} is spent already); raise it, or use accountant prv, fewer rounds or more text"
            )
    low = high / 2.0 if high > 1.0 else 0.0
    while high - low > PRECISION * high:
        middle = (low + high) / 2.0
        if middle < SMALLEST_NOISE[accountant]:
            raise PrivacyError(no_noise(target_epsilon, high, key))
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def rounds_left(
    history: Sequence[Spend],
    *,
    noise: float,
    rate: float,
    per_round: int,
    target_epsilon: float,
    delta: float,
    accountant: AccountantName,
) -> int:
    """Whole rounds of `per_round` steps that still fit into a budget."""

    def fits(rounds: int) -> bool:
        spend = Spend(noise, rate, rounds * per_round)
        return epsilon([*history, spend], delta=delta, accountant=accountant) <= target_epsilon

    if noise == 0.0 or not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 1 << 20:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
