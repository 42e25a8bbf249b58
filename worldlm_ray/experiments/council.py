"""The council: a mixture of several models' predictions, weighted by Bayes while a text goes on.

    p(x_t | past) = sum_k pi_{t,k} p_k(x_t | past)        pi_{t+1} = (1 - eps) Bayes(pi_t) + eps pi_0

Source: prediction with expert advice under log loss. The mixture is that of Vovk ("Aggregating strategies", COLT 1990),
the share of the prior is that of Herbster and Warmuth ("Tracking the best expert", Machine Learning 32, 1998).

For eps 0 the mixture gives a text the probability sum_k pi_{0,k} p_k(text). With a uniform prior its loss on a text is
at most ln K nats above that of the best of K members. The share eps of the prior lets the weights change again when the
text does: it costs at most -ln(1 - eps) nats per token more.

Shapes: T tokens of a text, K members, V vocabulary. All values are float64 and logarithms. Texts of one length may be
read side by side: their axes then stand between T and K, written `_T` and `_K` all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CouncilRules:
    """How a council weighs its members."""

    eps: float = 1e-3
    """Share of the prior in the weights after every token, in [0, 1)."""
    top: int | None = None
    """After `after` tokens of a text only so many members answer: those with the largest weights. None: all do."""
    after: int = 64
    """Tokens of a text that all members read."""


@dataclass(frozen=True, eq=False)
class Weights:
    """What a council has concluded from a text so far."""

    now_K: Floats
    """Log weight of each member for the next token; -inf of one that answers no more."""
    prior_K: Floats
    """Log of the prior, renormalised over the members that answer."""
    seen: int = 0
    """Tokens read."""

    @property
    def answers_K(self) -> npt.NDArray[np.bool_]:
        """Which members answer."""
        return ~np.isneginf(self.prior_K)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a council made of a text."""

    log_p_T: Floats
    """Log probability of each token."""
    weights: Weights
    """After the last token."""
    passes: int
    """Forward passes over a token that it took: members that answered, summed over tokens."""


def uniform(members: int) -> Floats:
    """The log of a uniform prior, [K].

    Raises:
        ValueError: there is no member.
    """
    if members < 1:
        raise ValueError("a council has at least one member")
    return np.full(members, -np.log(members))


def begin(prior_K: Floats) -> Weights:
    """The weights before the first token of a text.

    Args:
        prior_K: log prior; normalised here.
    """
    prior_K = prior_K - _log_sum(prior_K)
    return Weights(now_K=prior_K, prior_K=prior_K)


def mixture(weights: Weights, log_p_KV: Floats) -> Floats:
    """Log probabilities of the next token, [V].

    Args:
        weights: of the members.
        log_p_KV: log probabilities under each member. Rows of members that do not answer are not read.
    """
    answers_K = weights.answers_K
    return np.asarray(np.logaddexp.reduce(weights.now_K[answers_K, None] + log_p_KV[answers_K], axis=0))


def follow(weights: Weights, log_p_K: Floats, rules: CouncilRules) -> Weights:
    """The weights after one more token.

    Args:
        weights: before the token.
        log_p_K: log probability of the token that came, under each member.
        rules: of the council.
    """
    joint_K = _joint(weights, log_p_K)
    now_K = joint_K - _log_sum(joint_K)
    if rules.eps > 0.0:
        now_K = np.logaddexp(np.log1p(-rules.eps) + now_K, np.log(rules.eps) + weights.prior_K)
    found = Weights(now_K=now_K, prior_K=weights.prior_K, seen=weights.seen + 1)
    return _cut(found, rules.top) if rules.top is not None and found.seen == rules.after else found


def read(log_p_TK: Floats, prior_K: Floats, rules: CouncilRules) -> Reading:
    """Read a text.

    Args:
        log_p_TK: log probability of each token under each member, given the tokens before it.
        prior_K: log prior.
        rules: of the council.
    """
    weights, passes = begin(prior_K), 0
    log_p_T = np.empty(log_p_TK.shape[:-1])
    for index, log_p_K in enumerate(log_p_TK):
        log_p_T[index] = _log_sum(_joint(weights, log_p_K))[..., 0]
        passes += int(np.count_nonzero(np.broadcast_to(weights.answers_K, log_p_K.shape)))
        weights = follow(weights, log_p_K, rules)
    return Reading(log_p_T=log_p_T, weights=weights, passes=passes)


def fitted(log_p_TK: Floats, *, passes: int = 20) -> Floats:
    """The log prior [K] under which a text is likeliest, if every token is drawn from the mixture with these weights.

    Expectation maximisation from a uniform prior (Dempster, Laird and Rubin 1977; of language models: Jelinek and
    Mercer 1980): the new weight of a member is the mean of its posterior over the tokens. The text's loss never rises.

    Args:
        log_p_TK: log probability of each token of a validation text under each member.
        passes: over the text.
    """
    log_pi_K = uniform(log_p_TK.shape[1])
    for _ in range(passes):
        joint_TK = log_pi_K + log_p_TK
        posterior_TK = joint_TK - _log_sum(joint_TK)
        log_pi_K = np.logaddexp.reduce(posterior_TK, axis=0) - np.log(len(log_p_TK))
    return log_pi_K


def _joint(weights: Weights, log_p_K: Floats) -> Floats:
    """Log probability of a member and the token that came; -inf of one that does not answer."""
    answers_K = weights.answers_K
    return np.where(answers_K, weights.now_K + np.where(answers_K, log_p_K, 0.0), -np.inf)


def _log_sum(values_K: Floats) -> Floats:
    """The log of the sum of exponentials over the last axis, which stays, without overflow."""
    return np.asarray(np.logaddexp.reduce(values_K, axis=-1, keepdims=True))


def _cut(weights: Weights, top: int) -> Weights:
    """The weights once only the best members answer. Of equal ones the first stays."""
    best = np.argsort(-weights.now_K, axis=-1, kind="stable")[..., :top]
    keeps_K = np.zeros(weights.now_K.shape, dtype=bool)
    np.put_along_axis(keeps_K, best, values=True, axis=-1)

    def kept(values_K: Floats) -> Floats:
        chosen_K = np.where(keeps_K, values_K, -np.inf)
        return chosen_K - _log_sum(chosen_K)

    return Weights(now_K=kept(weights.now_K), prior_K=kept(weights.prior_K), seen=weights.seen)
