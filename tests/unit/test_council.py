"""The mixture of predictions: its arithmetic, by numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from worldlm_ray.experiments import council
from worldlm_ray.experiments.council import CouncilRules

PLAIN = CouncilRules(eps=0.0)
FIRST, SECOND = [0.5, 0.5, 0.5], [0.5, 0.8, 0.1]
"""What two members give the three tokens of a text: 0.125 and 0.04 in all."""
LOG_P = np.log(np.array([FIRST, SECOND]).T)


def probabilities(log_K: np.ndarray) -> list[float]:
    return [float(value) for value in np.exp(log_K)]


def test_without_a_share_of_the_prior_the_text_has_the_mean_of_its_probabilities() -> None:
    reading = council.read(LOG_P, council.uniform(2), PLAIN)
    assert probabilities(reading.log_p_T) == pytest.approx([0.5, 0.65, 0.5 * 5 / 13 + 0.1 * 8 / 13])
    assert math.exp(reading.log_p_T.sum()) == pytest.approx((0.125 + 0.04) / 2)
    assert probabilities(reading.weights.now_K) == pytest.approx([0.125 / 0.165, 0.04 / 0.165])


def test_the_loss_is_at_most_log_k_above_the_best_members(rng: np.random.Generator) -> None:
    for members in (1, 2, 7):
        log_p_TK = np.log(rng.uniform(0.001, 1.0, (300, members)))
        reading = council.read(log_p_TK, council.uniform(members), PLAIN)
        best, ours = (-log_p_TK.sum(axis=0)).min(), -reading.log_p_T.sum()
        assert ours <= best + math.log(members) + 1e-9
        assert ours == pytest.approx(math.log(members) - np.logaddexp.reduce(log_p_TK.sum(axis=0)))


def test_the_bound_is_reached_where_one_member_alone_can_foretell_the_text() -> None:
    log_p_TK = np.array([[0.0, -50.0, -50.0, -50.0]] * 3)
    reading = council.read(log_p_TK, council.uniform(4), PLAIN)
    assert -reading.log_p_T.sum() == pytest.approx(math.log(4.0))


def test_a_share_of_the_prior_is_in_the_weights_after_every_token() -> None:
    rules = CouncilRules(eps=0.1)
    weights = council.follow(council.begin(np.log([0.75, 0.25])), np.log([0.2, 0.6]), rules)
    # Bayes: 0.15 and 0.15, so 1/2 each; then 0.9 of that and 0.1 of the prior.
    assert probabilities(weights.now_K) == pytest.approx([0.525, 0.475])
    weights = council.follow(weights, np.log([0.475, 0.525]), rules)
    assert probabilities(weights.now_K) == pytest.approx([0.45 + 0.075, 0.45 + 0.025])
    assert weights.seen == 2


def test_a_share_of_the_prior_lets_the_weights_follow_a_text_that_changes() -> None:
    one, other = [[-0.1, -5.0]] * 200, [[-5.0, -0.1]] * 200
    changed = np.array(one + other)
    fixed = council.read(changed, council.uniform(2), PLAIN)
    shared = council.read(changed, council.uniform(2), CouncilRules(eps=1e-3))
    assert -fixed.log_p_T.sum() > 1000.0, "the weight that was lost has to be earned again, token by token"
    assert -shared.log_p_T.sum() < 400 * 0.1 + 20.0
    assert probabilities(shared.weights.now_K)[1] > 0.99


def test_weights_of_long_texts_neither_overflow_nor_vanish() -> None:
    log_p_TK = np.array([[-0.5, -900.0]] * 2_000)
    reading = council.read(log_p_TK, council.uniform(2), CouncilRules())
    assert np.isfinite(reading.log_p_T).all()
    assert probabilities(reading.weights.now_K) == pytest.approx([0.9995, 0.0005])


def test_after_some_tokens_only_the_best_members_answer() -> None:
    log_p_TK = np.log(np.array([[0.1, 0.6, 0.3]] * 2 + [[0.9, 0.2, 0.5]]))
    rules = CouncilRules(eps=0.0, top=2, after=2)
    reading = council.read(log_p_TK, council.uniform(3), rules)
    # After two tokens the weights are as 1, 36 and 9: the last two stay, with 0.8 and 0.2.
    assert math.exp(reading.log_p_T[-1]) == pytest.approx(0.8 * 0.2 + 0.2 * 0.5)
    assert reading.passes == 3 + 3 + 2
    assert reading.weights.answers_K.tolist() == [False, True, True]
    assert probabilities(reading.weights.now_K) == pytest.approx([0.0, 0.16 / 0.26, 0.10 / 0.26])
    assert probabilities(reading.weights.prior_K) == pytest.approx([0.0, 0.5, 0.5])


def test_texts_may_be_read_side_by_side(rng: np.random.Generator) -> None:
    rules = CouncilRules(top=2, after=5)
    log_p_TDK = np.log(rng.uniform(0.01, 1.0, (12, 4, 3)))
    together = council.read(log_p_TDK, np.log([0.5, 0.3, 0.2]), rules)
    each = [council.read(log_p_TDK[:, text], np.log([0.5, 0.3, 0.2]), rules) for text in range(4)]
    assert together.log_p_T.T.tolist() == [alone.log_p_T.tolist() for alone in each]
    assert together.weights.now_K.tolist() == [alone.weights.now_K.tolist() for alone in each]
    assert len({tuple(alone.weights.answers_K) for alone in each}) > 1, "texts with other members at the end"
    assert together.passes == sum(alone.passes for alone in each) == 4 * (5 * 3 + 7 * 2)


def test_a_member_that_answers_no_more_is_not_read() -> None:
    weights = council.begin(council.uniform(2))
    weights = council.follow(weights, np.log([0.2, 0.8]), CouncilRules(top=1, after=1))
    unread_KV = np.array([[-np.inf, np.nan], np.log([0.25, 0.75])])
    assert probabilities(council.mixture(weights, unread_KV)) == pytest.approx([0.25, 0.75])
    assert probabilities(council.follow(weights, unread_KV[:, 1], CouncilRules()).now_K) == pytest.approx([0.0, 1.0])


def test_the_mixture_is_a_distribution() -> None:
    weights = council.begin(np.log([0.75, 0.25]))
    mixed_V = council.mixture(weights, np.log(np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])))
    assert probabilities(mixed_V) == pytest.approx([0.3, 0.3, 0.4])


def test_a_prior_is_normalised() -> None:
    assert probabilities(council.begin(np.log([3.0, 1.0])).now_K) == pytest.approx([0.75, 0.25])


def test_a_prior_is_fitted_by_expectation_maximisation() -> None:
    log_p_TK = np.log(np.array([[0.9, 0.1], [0.2, 0.2], [0.4, 0.6]]))
    # One pass from (1/2, 1/2): posteriors of the first member 0.9, 0.5 and 0.4.
    assert probabilities(council.fitted(log_p_TK, passes=1)) == pytest.approx([0.6, 0.4])
    # The second from (0.6, 0.4): 0.54 / 0.58, 0.6 and 0.24 / 0.48.
    second = (0.54 / 0.58 + 0.6 + 0.5) / 3
    assert probabilities(council.fitted(log_p_TK, passes=2)) == pytest.approx([second, 1.0 - second])


def test_a_fitted_prior_is_the_likeliest(rng: np.random.Generator) -> None:
    log_p_TK = np.log(rng.uniform(0.01, 1.0, (400, 2)))

    def loss(share: float) -> float:
        return -float(np.logaddexp.reduce(np.log([share, 1.0 - share]) + log_p_TK, axis=1).sum())

    found = probabilities(council.fitted(log_p_TK, passes=500))[0]
    assert 0.0 < found < 1.0
    assert loss(found) <= min(loss(share) for share in np.linspace(0.01, 0.99, 99)) + 1e-6


def test_a_council_without_members_is_none() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        council.uniform(0)
