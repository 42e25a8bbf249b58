"""A name without a branch is refused: a rule that falls through in silence would compute another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from worldlm_ray.aggregation.attention import score
from worldlm_ray.aggregation.robust_fold import ROBUST_RULES
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer, default_lr, state_buffers
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config.federated import ServerOptimizerConfig, StalenessConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.compression import decode, encode, nbytes
from worldlm_ray.privacy.accounting import Spend, epsilon

ODD: Any = "polynomail"
FOUR = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("key", "use"),
    [
        ("aggregation.staleness.fn", lambda: discount(StalenessConfig(fn=ODD), 1)),
        ("aggregation.staleness.fn", lambda: discount(StalenessConfig(fn=ODD, a=0.5), 0)),
        ("aggregation.attention.score", lambda: score(ODD, FOUR, FOUR, FOUR)),
        ("aggregation.server_optimizer.name", lambda: default_lr(ServerOptimizerConfig(name=ODD))),
        ("aggregation.server_optimizer.name", lambda: state_buffers(ServerOptimizerConfig(name=ODD))),
        ("aggregation.server_optimizer.name", lambda: ServerOptimizer(ServerOptimizerConfig(name=ODD, lr=1.0), 4)),
        ("aggregation.robust.rule", lambda: ROBUST_RULES.get(ODD)),
        ("privacy.accountant", lambda: epsilon([Spend(1.0, 0.1, 1)], delta=1e-5, accountant=ODD)),
        ("exchange.codec", lambda: nbytes(ODD, 4)),
        ("exchange.codec", lambda: encode(ODD, FOUR)),
        ("exchange.codec", lambda: decode(ODD, np.zeros(16, np.uint8), 4)),
    ],
)
def test_an_unknown_name_is_refused_by_its_key(key: str, use: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="polynomail") as caught:
        use()
    assert caught.value.key == key


def test_the_nearest_name_is_the_cure() -> None:
    with pytest.raises(ConfigError, match="did you mean 'polynomial'"):
        discount(StalenessConfig(fn=ODD), 1)
