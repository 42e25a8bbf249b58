"""What Gaussian noise on sums of clipped updates costs: exact, and without Opacus, which inner nodes need not load.

Source: Balle and Wang, arXiv 1805.06530, theorem 8; the composition of k Gaussian mechanisms with noise z is one with
noise z / sqrt(k) (Dong et al., arXiv 1905.02383, corollary 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from worldlm_ray.errors import PrivacyError

MOST = 1 << 20
"""Contributions that are counted at most."""
LARGEST_EPSILON = 1e6
"""Above, epsilon counts as infinite: it promises nothing, and its exponentials overflow."""
SMALLEST_NOISE = 1e-2
NEXT_TO_NONE = 1e-100
"""Noise whose square underflows."""


def gaussian_epsilon(noise: float, contributions: int, *, delta: float) -> float:
    """Epsilon at a delta for a client that contributed so often, each time under noise of that many clipping norms."""
    return composed_epsilon([noise] * contributions, delta=delta)


def composed_epsilon(noises: Sequence[float], *, delta: float) -> float:
    """Epsilon at a delta for a client that contributed once under each of these noises."""
    if not noises:
        return 0.0
    if min(noises) < NEXT_TO_NONE:
        return math.inf
    mu = math.sqrt(sum(noise**-2 for noise in noises))

    def delta_at(epsilon: float) -> float:
        exponent = epsilon + _log_phi(-mu / 2.0 - epsilon / mu)
        return _phi(mu / 2.0 - epsilon / mu) - math.exp(exponent)

    low, high = 0.0, 1.0
    if delta_at(0.0) <= delta:
        return 0.0
    while delta_at(high) > delta:
        high *= 2.0
        if high > LARGEST_EPSILON:
            return math.inf
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def most_contributions(noise: float, *, target_epsilon: float, delta: float, before: Sequence[float] = ()) -> int:
    """How often one may contribute under a noise, after contributions under others, before a budget would break."""
    if min([noise, *before]) < NEXT_TO_NONE:
        return 0
    spent = sum(other**-2 for other in before)

    def fits(count: int) -> bool:
        mu_squared = spent + count * noise**-2
        return mu_squared == 0.0 or composed_epsilon([mu_squared**-0.5], delta=delta) <= target_epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def gaussian_noise(contributions: int, *, target_epsilon: float, delta: float, key: str) -> float:
    """The smallest noise with which one may contribute so often within a budget.

    Raises:
        PrivacyError: no noise is enough, or any is.
    """
    high = 1.0
    while gaussian_epsilon(high, contributions, delta=delta) > target_epsilon:
        high *= 2.0
        if high > 1e6:
            raise PrivacyError(
                f"{key}.target_epsilon: no noise keeps {contributions} updates within {target_epsilon:g}"
            )
    low = 0.0
    while high - low > 1e-4 * high:
        middle = (low + high) / 2.0
        if middle < SMALLEST_NOISE:
            raise PrivacyError(no_noise(target_epsilon, high, key))
        fits = gaussian_epsilon(middle, contributions, delta=delta) <= target_epsilon
        low, high = (low, middle) if fits else (middle, high)
    return high


def no_noise(target_epsilon: float, noise: float, key: str) -> str:
    """What to say of a budget that next to no noise keeps."""
    return (
        f"{key}.target_epsilon: {target_epsilon:g} allows noise below {noise:.2g} clipping norms, which protects "
        "nothing; lower it, or remove the privacy section where no privacy is wanted"
    )


def _phi(x: float) -> float:
    """The normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _log_phi(x: float) -> float:
    """Its logarithm; far out, where it underflows, by its asymptotic."""
    value = _phi(x)
    if value > 0.0:
        return math.log(value)
    return -0.5 * x * x - math.log(-x) - 0.5 * math.log(2.0 * math.pi)
