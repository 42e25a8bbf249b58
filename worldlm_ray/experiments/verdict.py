"""The result of a comparison in sentences: the best method, its lead, in how many seeds, and which clients gain.

Every sentence is computed from results.json. A difference is taken seed by seed, since both runs of a seed begin from
the same weights and read the same text in the same order. Its range over the seeds shows the effect of chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from worldlm_ray.experiments.comparison_numbers import (
    Run,
    against_local,
    alone,
    by_method,
    by_seed,
    headroom,
    is_alone,
    is_federated,
    is_pooled,
    mean_loss,
)

WHAT = {
    "own": "Clients' own models, each on its client's held-out text",
    "world": "The world's model, on the held-out texts of all clients",
}
"""The two losses of a comparison, as sentences name them."""


def verdict(runs: Sequence[Run]) -> list[str]:
    """Sentences for the top of a report.

    Args:
        runs: `runs` of results.json.
    """
    said = [_headroom(runs), *(_best(runs, which) for which in WHAT), _members(runs)]
    return [sentence for sentence in said if sentence]


def equal_work(runs: Sequence[Run]) -> str:
    """What is equal in all methods of a comparison: steps or tokens, weights, text."""
    same = "Runs of one seed begin from the same weights, and each client reads its text in the same order."
    apart = [run for run in runs if not is_pooled(run["method"])]
    steps = {client["steps"] for run in apart for client in run["clients"]}
    aside = " On pooled text, each step takes a batch of every client's text." if apart != list(runs) else ""
    flops = [run["flops"] / run["tokens"] for run in runs]
    if max(flops) > min(flops):
        aside += f" The FLOPs of a token differ between methods, by up to {max(flops) / min(flops):.2f} times."
    if len(steps) == 1:
        return f"Every client took {steps.pop():,} optimizer steps in every method. {same}{aside}"
    tokens = [run["tokens"] for run in runs]
    low, high = min(tokens), max(tokens)
    amount = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return (
        f"All clients together trained {amount} tokens in every run; rounds that were under way at the end were "
        f"finished. In an asynchronous method a fast client takes more of them. {same}{aside}"
    )


def _headroom(runs: Sequence[Run]) -> str:
    """How much there is to win in this world."""
    room = headroom(runs)
    if room is None:
        return "Headroom is not known: it needs the methods local and pooled+ft."
    what = f"pooled+ft has {room.oracle:.4f} nats/byte, training alone, stopped early ({room.method}), {room.alone:.4f}"
    found = f"Headroom H of this world: {room.share:+.1%} ({what})."
    return found if room.share > 0 else f"{found} With this budget there is nothing to win by federating here."


def _best(runs: Sequence[Run], which: str) -> str:
    """The best method for one of the two losses, and its distance to the next method."""
    methods = {method: mine for method, mine in by_method(runs).items() if not is_pooled(method)}
    if which == "world":
        methods = {method: mine for method, mine in methods.items() if not is_alone(method)}
    if not methods:
        return ""
    seeds = {method: by_seed(mine, which) for method, mine in methods.items()}
    means = {method: statistics.fmean(losses.values()) for method, losses in seeds.items()}
    diverged = sorted(method for method, mean in means.items() if not math.isfinite(mean))
    ranked = sorted((mean, method) for method, mean in means.items() if math.isfinite(mean))
    aside = f" Left out, since a loss is not finite: {', '.join(diverged)}." if diverged else ""
    if not ranked:
        return f"{WHAT[which]}: no method has a finite loss.{aside}"
    (best_loss, best), *others = ranked
    if not others:
        return f"{WHAT[which]}: {best} has {best_loss:.4f} nats/byte. It is the only method with a finite loss.{aside}"
    next_loss, runner_up = others[0]
    gap = next_loss - best_loss
    distance = f"{gap:.4f} ({gap / next_loss:.1%}) below {runner_up}"
    chance = _chance(best, runner_up, seeds[best], seeds[runner_up])
    return f"{WHAT[which]}: {best} is best with {best_loss:.4f} nats/byte, {distance}. {chance}{aside}"


def _chance(best: str, other: str, mine: dict[int, float], theirs: dict[int, float]) -> str:
    """How the difference of two methods varies over the seeds that both have."""
    gaps = [theirs[seed] - mine[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if len(gaps) < 2:
        return "There is one seed: how much of the difference is chance is not known (--seeds 3 tells)."
    worse = sum(gap <= 0 for gap in gaps)
    spread = f"Over {len(gaps)} seeds the difference is {min(gaps):.4f} to {max(gaps):.4f}"
    if worse:
        return f"{spread}, and in {worse} of them {best} is not ahead: the two are not told apart."
    return f"{spread}: {best} is ahead of {other} in each."


def _members(runs: Sequence[Run]) -> str:
    """Whether clients gain from the federation, under the method that is best for their own models."""
    local = alone(runs)
    methods = {method: mine for method, mine in by_method(runs).items() if is_federated(method)}
    if not methods:
        return ""
    if not local:
        return "Whether clients gain by taking part is not known: the method local was not run."
    changes = {method: against_local(mine, local) for method, mine in methods.items()}
    known = {
        method: change for method, change in changes.items() if change and all(map(math.isfinite, change.values()))
    }
    if not known:
        return "Whether clients gain by taking part is not known: losses are not finite."
    means = {method: statistics.fmean(change.values()) for method, change in known.items()}
    best = min(means, key=lambda method: means[method])
    change = known[best]
    worst = max(change, key=lambda client: change[client])
    gaining = sum(value < 0 for value in change.values())
    room = headroom(runs)
    gain = 1.0 - mean_loss(methods[best], "own") / mean_loss(local, "own")
    share = f" It has {gain / room.share:.2f} of the headroom." if room is not None and room.share > 0 else ""
    return (
        f"Against training alone ({local[0]['method']}), {gaining} of {len(change)} clients gain under {best}, "
        f"by a mean change in loss of {means[best]:+.1%}; the worst off is {worst} with {change[worst]:+.1%}.{share}"
    )
