"""Server optimizers against two steps worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from worldlm_ray.aggregation import server_optimizer
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer, state_buffers
from worldlm_ray.config.federated import ServerOptimizerConfig
from worldlm_ray.tensors import buffers
from worldlm_ray.tensors.buffers import BLOCK, Flat

RULES = ("sgd", "nesterov", "adam")


def walk(config: ServerOptimizerConfig, updates: Sequence[float], *, theta: float = 0.0) -> list[float]:
    """The values of a one-element model after each update."""
    optimizer, now, found = ServerOptimizer(config, 1), np.array([theta], np.float32), []
    for update in updates:
        successor = np.array([update], np.float32)
        optimizer.apply(successor, now)
        now = successor
        found.append(float(now[0]))
    return found


def test_sgd_adds_the_mean_update() -> None:
    # 1 + 0.5 = 1.5; 1.5 - 0.25 = 1.25
    assert walk(ServerOptimizerConfig(name="sgd"), [0.5, -0.25], theta=1.0) == [1.5, 1.25]


def test_sgd_with_a_rate() -> None:
    # 0 + 0.5 * 2 = 1; 1 + 0.5 * -3 = -0.5
    assert walk(ServerOptimizerConfig(name="sgd", lr=0.5), [2.0, -3.0]) == [1.0, -0.5]


def test_nesterov_with_dilocos_defaults() -> None:
    # m = 1;                  step = 0.7 (1 + 0.9 * 1)      =  1.33
    # m = 0.9 - 0.5 = 0.4;    step = 0.7 (-0.5 + 0.9 * 0.4) = -0.098
    assert walk(ServerOptimizerConfig(name="nesterov"), [1.0, -0.5]) == pytest.approx([1.33, 1.232], rel=1e-6)


def test_nesterov_with_its_own_numbers() -> None:
    # m = 2;                step = 0.5 (2 + 0.5 * 2) = 1.5
    # m = 1 + 4 = 5;        step = 0.5 (4 + 0.5 * 5) = 3.25
    config = ServerOptimizerConfig(name="nesterov", lr=0.5, momentum=0.5)
    assert walk(config, [2.0, 4.0]) == [1.5, 4.75]


def test_adam_with_its_defaults() -> None:
    # lr 0.01, betas 0.9 and 0.99, eps 1e-3, no bias correction (FedAdam, algorithm 2)
    # m = 0.1;               v = 0.01;                  step = 0.01 * 0.1 / (0.1 + 0.001)
    # m = 0.09 - 0.2;        v = 0.0099 + 0.04 = 0.0499 step = 0.01 * -0.11 / (sqrt 0.0499 + 0.001)
    first = 0.001 / 0.101
    second = first - 0.0011 / (0.0499**0.5 + 0.001)
    assert walk(ServerOptimizerConfig(name="adam"), [1.0, -2.0]) == pytest.approx([first, second], rel=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_scale_makes_the_sum_a_mean(name: str) -> None:
    config = ServerOptimizerConfig(name=name)
    theta = np.array([1.0, -2.0], np.float32)
    mean, total = np.array([0.25, 0.5], np.float32), np.array([1.0, 2.0], np.float32)
    ServerOptimizer(config, 2).apply(mean, theta)
    ServerOptimizer(config, 2).apply(total, theta, scale=0.25)
    np.testing.assert_array_equal(mean, total)


@pytest.mark.parametrize("name", RULES)
def test_theta_is_not_changed(name: str, rng: np.random.Generator) -> None:
    theta = rng.standard_normal(100).astype(np.float32)
    before = theta.tobytes()
    ServerOptimizer(ServerOptimizerConfig(name=name), 100).apply(rng.standard_normal(100).astype(np.float32), theta)
    assert theta.tobytes() == before


def test_the_norm_is_of_the_step_taken() -> None:
    update = np.array([3.0, 4.0], np.float32)
    norm = ServerOptimizer(ServerOptimizerConfig(lr=0.5), 2).apply(update, np.array([10, 10], np.float32), scale=2.0)
    assert norm == pytest.approx(5.0)
    np.testing.assert_array_equal(update, [13.0, 14.0])


@pytest.mark.parametrize("name", RULES)
def test_bits_do_not_depend_on_where_blocks_end(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = BLOCK + 3
    theta = rng.standard_normal(size).astype(np.float32)
    updates = [rng.standard_normal(size).astype(np.float32) for _ in range(2)]

    def run() -> list[Flat]:
        optimizer = ServerOptimizer(ServerOptimizerConfig(name=name), size)
        now, found = theta, []
        for update in updates:
            successor = update.copy()
            optimizer.apply(successor, now, scale=1 / 3)
            now = successor
            found += [successor, *(buffer.copy() for buffer in optimizer.buffers.values())]
        return found

    whole = run()
    for block in (1_000, BLOCK - 1):
        monkeypatch.setattr(buffers, "BLOCK", block)
        monkeypatch.setattr(server_optimizer, "BLOCK", block)
        for one, other in zip(whole, run(), strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("name", "buffers"), [("sgd", 0), ("nesterov", 1), ("adam", 2)])
def test_a_rule_keeps_no_more_buffers_than_it_needs(name: str, buffers: int) -> None:
    config = ServerOptimizerConfig(name=name)
    assert len(state_buffers(config)) == buffers
    assert [b.shape for b in ServerOptimizer(config, 5).buffers.values()] == [(5,)] * buffers


def test_delayed_nesterov_steps_its_momentum_once_in_n() -> None:
    # N = 2, lr = 1, mu = 0.5, updates 1, 3, 2, 2 (Async Local-SGD, arXiv 2401.09135, c = 0):
    #   t=1  theta = 1/2                                  d = 1
    #   t=2  d = 4, m = 4/2 = 2, theta += 3/2 + 0.5 * 2   -> 3
    #   t=3  theta += 2/2                                 -> 4,   d = 2
    #   t=4  d = 4, m = 0.5 * 2 + 4/2 = 3, theta += 2/2 + 0.5 * 3 -> 6.5
    rule = ServerOptimizer(ServerOptimizerConfig(name="delayed_nesterov", lr=1.0, momentum=0.5, delay=2), 1)
    theta, seen = np.zeros(1, np.float32), []
    for update in (1.0, 3.0, 2.0, 2.0):
        step = np.array([update], np.float32)
        rule.apply(step, theta)
        theta = step
        seen.append(float(theta[0]))
    assert seen == pytest.approx([0.5, 3.0, 4.0, 6.5])


def test_delayed_nesterov_with_a_delay_of_one_is_nesterov() -> None:
    rules = [
        ServerOptimizer(ServerOptimizerConfig(name=name, lr=0.7, momentum=0.9, delay=1), 3)
        for name in ("nesterov", "delayed_nesterov")
    ]
    thetas = [np.zeros(3, np.float32), np.zeros(3, np.float32)]
    for seed in range(5):
        update = np.random.default_rng(seed).standard_normal(3).astype(np.float32)
        for index, rule in enumerate(rules):
            step = update.copy()
            rule.apply(step, thetas[index])
            thetas[index] = step
    np.testing.assert_allclose(thetas[0], thetas[1], rtol=1e-6)
