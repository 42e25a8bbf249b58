"""Attention scores against hand-computed numbers; the online softmax against a plain one."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from worldlm_ray.aggregation.attention import OnlineAttention, attend, score, with_prior
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config.federated import AttentionConfig, StalenessConfig
from worldlm_ray.errors import AggregationError
from worldlm_ray.tensors.layout import KeyLayer


def vec(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


ONE = (KeyLayer("only", 0, 2),)
ZERO = vec(0, 0)


def blend(
    candidates: list[tuple[str, npt.NDArray[np.float32], float]],
    *,
    query: npt.NDArray[np.float32],
    name: str = "uniform",
    temperature: float = 1.0,
    layers: tuple[KeyLayer, ...] = ONE,
) -> OnlineAttention:
    config = AttentionConfig(score=name, temperature=temperature)
    zero = np.zeros_like(query)
    return attend(config, layers, query, candidates, zero, out=np.zeros_like(query))


# ---- scores ------------------------------------------------------------------------------------------------


def test_cosine_is_of_displacements_from_the_origin() -> None:
    # q - q0 = (1, 1), k - q0 = (0, 2): cos = 2 / (sqrt 2 * 2) = 1/sqrt 2. On the raw vectors it would be 4/5.
    assert score("cosine", vec(2, 1), vec(1, 2), vec(1, 0)) == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(("candidate", "expected"), [((3, 4), 1.0), ((-3, -4), -1.0), ((4, -3), 0.0)])
def test_cosine_at_the_ends_and_in_the_middle(candidate: tuple[float, float], expected: float) -> None:
    assert score("cosine", vec(6, 8), vec(*candidate), ZERO) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("query", "candidate"),
    [((1, 2), (1, 2)), ((1, 2), (5, 5)), ((5, 5), (1, 2))],
    ids=["both", "query", "candidate"],
)
def test_cosine_is_zero_where_one_has_not_moved(query: tuple[float, float], candidate: tuple[float, float]) -> None:
    assert score("cosine", vec(*query), vec(*candidate), vec(1, 2)) == 0.0


def test_dot_is_scaled_by_the_square_root_of_the_size() -> None:
    # (1*5 + 2*6 + 3*7 + 4*8) / sqrt 4 = 70 / 2
    assert score("dot", vec(1, 2, 3, 4), vec(5, 6, 7, 8), vec(9, 9, 9, 9)) == pytest.approx(35.0)


def test_fedamp_is_the_negative_squared_distance_in_units_of_the_query() -> None:
    # |q|^2 = 25; |q - k|^2 = 16 + 4 = 20: -20/25
    assert score("fedamp", vec(3, 4), vec(-1, 2), ZERO) == pytest.approx(-0.8)


def test_fedatt_is_the_distance_in_units_of_the_query() -> None:
    # |q - k| / |q| = sqrt 20 / 5
    assert score("fedatt", vec(3, 4), vec(-1, 2), ZERO) == pytest.approx(math.sqrt(20) / 5)


def test_uniform_is_zero() -> None:
    assert score("uniform", vec(3, 4), vec(-1, 2), ZERO) == 0.0


def test_a_query_of_zeros_gives_finite_distances() -> None:
    assert score("fedamp", ZERO, vec(3, 4), ZERO) == -25.0
    assert score("fedatt", ZERO, vec(3, 4), ZERO) == 5.0


def test_fedamp_prefers_the_closer_and_fedatt_the_farther() -> None:
    near, far = vec(3, 3.5), vec(-3, 0)
    pair = [("near", near, 1.0), ("far", far, 1.0)]
    [[amp_near, amp_far]] = blend(pair, query=vec(3, 4), name="fedamp").weights()
    [[att_near, att_far]] = blend(pair, query=vec(3, 4), name="fedatt").weights()
    assert amp_near > amp_far
    assert att_near < att_far


def test_distances_do_not_underflow_or_saturate_on_a_large_layer() -> None:
    # exp(-d^2) of these raw distances is exactly 0 and a softmax of d is one-hot.
    size = 1_000_000
    query = np.full(size, 0.5, np.float32)
    layer = (KeyLayer("big", 0, size),)
    pair = [("near", query + np.float32(0.1), 1.0), ("far", query + np.float32(0.2), 1.0)]
    for name in ("fedamp", "fedatt"):
        [row] = blend(pair, query=query, name=name, layers=layer).weights()
        assert all(0.2 < weight < 0.8 for weight in row), name


# ---- temperature and prior ---------------------------------------------------------------------------------


def test_temperature_divides_the_score() -> None:
    # cosines 1 and 0 at temperature 0.5: softmax(2, 0) = e^2 / (e^2 + 1)
    pair = [("along", vec(1, 0), 1.0), ("across", vec(0, 1), 1.0)]
    [row] = blend(pair, query=vec(2, 0), name="cosine", temperature=0.5).weights()
    assert row == pytest.approx([math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)])


def test_tokens_two_to_one_give_weights_two_thirds_and_one_third() -> None:
    online = blend([("a", vec(3, 0), 200.0), ("b", vec(0, 3), 100.0)], query=vec(1, 1))
    assert online.weights() == [pytest.approx([2 / 3, 1 / 3])]
    np.testing.assert_allclose(online.result(), [2, 1], rtol=1e-6)


def test_staleness_is_part_of_the_prior() -> None:
    # 300 tokens at tau 3 count as 300 * 4^-0.5 = 150 fresh ones.
    stale = 300 * discount(StalenessConfig(fn="polynomial"), 3)
    [row] = blend([("stale", vec(1, 0), stale), ("fresh", vec(0, 1), 150.0)], query=vec(1, 1)).weights()
    assert row == pytest.approx([0.5, 0.5])


def test_score_and_prior_multiply() -> None:
    # Weights are proportional to tokens * exp(score): 100 e^1 and 300 e^0.
    pair = [("along", vec(1, 0), 100.0), ("across", vec(0, 1), 300.0)]
    [row] = blend(pair, query=vec(2, 0), name="cosine").weights()
    total = 100 * math.e + 300
    assert row == pytest.approx([100 * math.e / total, 300 / total])


def test_a_prior_of_zero_leaves_a_candidate_out() -> None:
    assert with_prior([0.5, 2.0], 0.0) == [-math.inf, -math.inf]
    online = blend([("none", vec(9, 9), 0.0), ("some", vec(1, 2), 5.0)], query=vec(1, 1))
    assert online.weights() == [[0.0, 1.0]]
    np.testing.assert_array_equal(online.result(), vec(1, 2))


# ---- the online softmax ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 17, 64])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_online_softmax_equals_a_plain_one_in_any_order(rng: np.random.Generator, count: int, spread: float) -> None:
    layers = (KeyLayer("first", 0, 5), KeyLayer("second", 5, 12))
    values = rng.standard_normal((count, 12)).astype(np.float32)
    logits = rng.standard_normal((count, 2)) * spread
    exp = np.exp(logits - logits.max(axis=0))
    weights = exp / exp.sum(axis=0)
    expected = np.empty(12)
    for index, layer in enumerate(layers):
        part = slice(layer.start, layer.stop)
        expected[part] = weights[:, index] @ values[:, part].astype(np.float64)
    for _ in range(5):
        order = rng.permutation(count)
        online = OnlineAttention(layers, np.zeros(12, np.float32))
        for i in order:
            online.fold(str(i), values[i], list(logits[i]))
        np.testing.assert_allclose(np.array(online.weights()), weights[order].T, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(online.result(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("logits", [(1e6, -1e6), (-1e6, 1e6), (1e300, 1e300 / 2), (-1e308, 1e308)])
def test_huge_logits_do_not_overflow(logits: tuple[float, float]) -> None:
    online = OnlineAttention(ONE, np.zeros(2, np.float32))
    online.fold("a", vec(1, 2), [logits[0]])
    online.fold("b", vec(3, 4), [logits[1]])
    [row] = online.weights()
    winner = int(logits[1] > logits[0])
    assert row == [float(winner == 0), float(winner == 1)]
    np.testing.assert_array_equal(online.result(), [vec(1, 2), vec(3, 4)][winner])


def test_minus_infinity_is_excluded_wherever_it_comes() -> None:
    for logits in ([-math.inf, 0.0, 0.0], [0.0, -math.inf, 0.0], [0.0, 0.0, -math.inf]):
        online = OnlineAttention(ONE, np.zeros(2, np.float32))
        for index, logit in enumerate(logits):
            values = vec(math.nan, math.nan) if logit == -math.inf else vec(index, 1)
            online.fold(str(index), values, [logit])
        [row] = online.weights()
        assert row == [0.0 if logit == -math.inf else 0.5 for logit in logits]
        assert np.isfinite(online.result()).all()


def test_a_candidate_may_be_left_out_of_one_layer_alone() -> None:
    layers = (KeyLayer("first", 0, 1), KeyLayer("second", 1, 2))
    online = OnlineAttention(layers, np.zeros(2, np.float32))
    online.fold("a", vec(1, 1), [-math.inf, 0.0])
    online.fold("b", vec(3, 3), [0.0, 0.0])
    np.testing.assert_array_equal(online.result(), vec(3, 2))


def test_weights_of_every_layer_sum_to_one(rng: np.random.Generator) -> None:
    layers = (KeyLayer("first", 0, 3), KeyLayer("second", 3, 8))
    candidates = [(str(i), rng.standard_normal(8).astype(np.float32), float(i + 1)) for i in range(9)]
    for name in ("cosine", "dot", "fedamp", "fedatt", "uniform"):
        query = rng.standard_normal(8).astype(np.float32)
        online = blend(candidates, query=query, name=name, temperature=0.1, layers=layers)
        assert [sum(row) for row in online.weights()] == pytest.approx([1.0, 1.0]), name
        assert online.names == [str(i) for i in range(9)]


def test_nobody_to_attend_to_is_an_error() -> None:
    with pytest.raises(AggregationError, match="only"):
        OnlineAttention(ONE, np.zeros(2, np.float32)).result()


def test_everybody_excluded_is_an_error() -> None:
    online = blend([("a", vec(1, 2), 0.0), ("b", vec(3, 4), 0.0)], query=vec(1, 1))
    with pytest.raises(AggregationError, match="only"):
        online.result()


def test_weights_of_nobody_are_an_error_of_ours_too() -> None:
    # Node and Client ask for the weights before the result.
    online = blend([("a", vec(1, 2), 0.0)], query=vec(1, 1))
    with pytest.raises(AggregationError):
        online.weights()


def test_candidates_and_query_stay_as_they_were(rng: np.random.Generator) -> None:
    values = [rng.standard_normal(2).astype(np.float32) for _ in range(3)]
    before = [value.tobytes() for value in values]
    blend([("a", values[1], 1.0), ("b", values[2], 2.0)], query=values[0], name="cosine").result()
    assert [value.tobytes() for value in values] == before
