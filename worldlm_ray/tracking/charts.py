"""Which chart shows which quantity, and which nodes have a line in it.

TensorBoard's first page (TIME SERIES) sorts groups of tags by name and shows the first two of them open. So groups have
numbers, in the order in which a run is understood: loss by tokens, loss by time, staleness, versions, throughput, and
then what explains them. A tag exists once there is a value for it, so no chart is empty.

The page selects no run by default if there are more than 40, and it has seven colours. So a world has at most MAX_LINES
lines, each a TensorBoard run:

    up to MAX_LINES nodes    a line for every node
    more                     the world, the MAX_INNER - 1 federations nearest to it, and three lines for all clients:
                             their mean, the best and the worst of them. The loss of every client has a chart below.

metrics.jsonl has the values of all nodes (worldlm_ray/tracking/curves.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

MAX_LINES = 12
"""TensorBoard runs of a world: three worlds in one folder stay below the 40 that are selected by default."""
MAX_INNER = 8
"""Inner nodes with a line in a world with more than MAX_LINES nodes."""
SHARED_LINES = MEAN, BEST, WORST = "all-clients-mean", "all-clients-best", "all-clients-worst"
"""Lines of all clients together. Paths of nodes begin with `world`: no node has such a name."""
SHARED_POINTS = 16
"""Points per round of all clients, in the lines of all clients together."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-/]")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of TIME SERIES and, where it has a category, of CUSTOM SCALARS."""

    tag: str
    """Group and name. No brackets: CUSTOM SCALARS draws no line for a tag that has them (TensorBoard 2.21)."""
    by: Literal["tokens", "time"] = "time"
    """The step of its points: tokens trained, or whole seconds of run time."""
    category: str = ""
    title: str = ""
    """In CUSTOM SCALARS, whose charts have no group title."""


_BY_TOKENS, _BY_TIME = "1 loss in nats per byte, by tokens", "2 loss in nats per byte, by seconds"
_STALENESS, _VERSIONS, _THROUGHPUT = "3 staleness", "4 versions", "5 throughput"
_EXCHANGE, _MERGING, _LEARNING, _PRIVACY = "6 exchange", "7 merging", "8 learning", "9 privacy"
_BORDER = "6 exchange over a border"
_OWN, _INNER, _MEANS = (
    "1 clients, own models",
    "2 world, federations, own models",
    "3 mean of the clients below",
)
EACH = "each client, loss in nats per byte by tokens"
HISTOGRAM = "each edge, staleness/versions behind, all updates so far"

CATEGORIES = ("Learning", "Asynchrony", "Cost")
CHARTS: dict[tuple[str, str], tuple[Chart, ...]] = {
    ("loss", "client"): (
        Chart(
            tag=f"{_BY_TOKENS}/{_OWN}",
            by="tokens",
            category="Learning",
            title="Clients: loss of own models (nats/byte) by tokens",
        ),
        Chart(tag=f"{_BY_TIME}/{_OWN}", category="Learning", title="Clients: loss of own models by run time (s)"),
    ),
    ("loss", "inner"): (
        Chart(
            tag=f"{_BY_TOKENS}/{_INNER}",
            by="tokens",
            category="Learning",
            title="World, federations: loss of own models (nats/byte) by tokens",
        ),
        Chart(
            tag=f"{_BY_TIME}/{_INNER}",
            category="Learning",
            title="World, federations: loss of own models by run time (s)",
        ),
    ),
    ("clients_loss", "inner"): (
        Chart(
            tag=f"{_BY_TOKENS}/{_MEANS}",
            by="tokens",
            category="Learning",
            title="World, federations: mean loss of the clients below (nats/byte) by tokens",
        ),
        Chart(
            tag=f"{_BY_TIME}/{_MEANS}",
            category="Learning",
            title="World, federations: mean loss of the clients below by run time (s)",
        ),
    ),
    (EACH, "any"): (
        Chart(tag=EACH, by="tokens", category="Learning", title="Every client: loss of its own model by tokens"),
    ),
    ("tau", "any"): (
        Chart(
            tag=f"{_STALENESS}/1 versions behind, mean of new updates",
            category="Asynchrony",
            title="Staleness per edge (versions behind)",
        ),
    ),
    ("version", "inner"): (
        Chart(tag=f"{_VERSIONS}/1 aggregations so far", category="Asynchrony", title="Version by run time (s)"),
    ),
    ("version", "client"): (Chart(tag=f"{_VERSIONS}/2 clients, version of the parent that they have"),),
    ("tokens_per_s", "client"): (
        Chart(
            tag=f"{_THROUGHPUT}/1 clients, tokens per second",
            category="Asynchrony",
            title="Clients: training speed (tokens/s)",
        ),
    ),
    ("tokens_per_s", "inner"): (Chart(tag=f"{_THROUGHPUT}/2 world and federations, tokens per second"),),
    ("busy_fraction", "any"): (
        Chart(tag=f"{_THROUGHPUT}/3 busy share, 0 to 1", category="Asynchrony", title="Busy share of every node"),
    ),
    ("accepted", "any"): (
        Chart(tag=f"{_EXCHANGE}/1 updates accepted", category="Asynchrony", title="Updates accepted per edge"),
    ),
    ("refused", "any"): (
        Chart(tag=f"{_EXCHANGE}/2 updates refused", category="Asynchrony", title="Updates refused per edge and reason"),
    ),
    ("refused_strangers", "inner"): (
        Chart(tag=f"{_EXCHANGE}/3 refused strangers", category="Asynchrony", title="Refusals of strangers, by reason"),
    ),
    ("bytes_up", "any"): (
        Chart(tag=f"{_EXCHANGE}/4 bytes sent to the parent", category="Cost", title="Bytes sent up per edge"),
    ),
    ("bytes_down", "any"): (
        Chart(tag=f"{_EXCHANGE}/5 bytes taken from the parent", category="Cost", title="Bytes sent down per edge"),
    ),
    ("merge", "any"): (
        Chart(
            tag=f"{_MERGING}/1 how far a node followed its parent, 0 to 1",
            category="Asynchrony",
            title="How far a node followed its parent (0 to 1)",
        ),
    ),
    ("step_norm", "inner"): (Chart(tag=f"{_MERGING}/2 norm of an aggregation"),),
    ("perplexity", "client"): (
        Chart(
            tag=f"{_LEARNING}/1 perplexity per byte, clients, own models, by tokens",
            by="tokens",
            category="Cost",
            title="Clients: perplexity per byte by tokens",
        ),
    ),
    ("perplexity", "inner"): (
        Chart(tag=f"{_LEARNING}/2 perplexity per byte, world and federations, own models, by tokens", by="tokens"),
    ),
    ("train_loss", "client"): (Chart(tag=f"{_LEARNING}/3 training loss in nats per token, by tokens", by="tokens"),),
    ("learning_rate", "client"): (Chart(tag=f"{_LEARNING}/4 learning rate by tokens", by="tokens"),),
    **{
        (f"border_{name}", "any"): (Chart(tag=f"{_BORDER}/{number} {text}"),)
        for number, (name, text) in enumerate(
            {
                "mbit_up": "Mbit per s up, while updates move",
                "mbit_down": "Mbit per s down, while models move",
                "bytes_up": "bytes up",
                "bytes_down": "bytes down",
                "resumed": "parts sent again",
                "accepted": "updates accepted",
                "refused": "refusals",
                "tau": "versions behind, newest update",
                "every_s": "seconds between two updates",
                "offline_s": "seconds offline",
                "certificate_days": "days until the certificate ends",
            }.items(),
            1,
        )
    },
    ("epsilon", "any"): (Chart(tag=f"{_PRIVACY}/epsilon spent", category="Cost", title="Privacy spent (epsilon)"),),
}


def clean(text: str) -> str:
    """A user's name as part of a tag or folder: characters that TensorBoard might change become underscores."""
    return _UNSAFE.sub("_", text)


@lru_cache(maxsize=4096)
def charts_of(name: str, kind: str) -> tuple[Chart, ...]:
    """The charts that show a quantity.

    Args:
        name: of the quantity; `refused/REASON` has a tag for every reason, `EACH/NODE` one for every node.
        kind: of the node: `world`, `federation` or `client`.
    """
    base, _, part = name.partition("/")
    kind = "client" if kind == "client" else "inner"
    found = CHARTS.get((base, kind)) or CHARTS.get((base, "any")) or ()
    if not part:
        return found
    joint = "/" if base == EACH else ", "
    return tuple(replace(chart, tag=f"{chart.tag}{joint}{clean(part)}") for chart in found)


class Lines:
    """Which nodes have a separate line.

    Args:
        kinds: `world`, `federation` or `client` by path, parents first.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.are_shared = len(kinds) > MAX_LINES
        """Whether clients share three lines instead of one each."""
        shown: Iterable[str] = kinds
        if self.are_shared:
            inner = [path for path, kind in kinds.items() if kind != "client"]
            shown = sorted(inner, key=lambda path: path.count("/"))[:MAX_INNER]
        self._shown = set(shown)

    def add(self, path: str) -> None:
        """Add a node that has joined the world: it gets a line while fewer than MAX_LINES exist."""
        if not self.are_shared and len(self._shown) < MAX_LINES:
            self._shown.add(path)

    def __contains__(self, path: str) -> bool:
        return path in self._shown


class SharedLines:
    """The lines of all clients together: mean, best and worst."""

    def __init__(self, clients: int) -> None:
        self._every = max(clients // SHARED_POINTS, 1)
        self._heard = 0
        self._taus: list[int] = []

    def add_tau(self, tau: int) -> None:
        """Take in the staleness of an update that a client has sent."""
        self._taus.append(tau)

    def is_due(self) -> bool:
        """Count a finished round. Returns whether the next point is due."""
        self._heard += 1
        return self._heard % self._every == 0

    def point(self, losses: list[float], mean: float | None, speeds: list[float]) -> dict[str, dict[str, float | None]]:
        """Values by line.

        Args:
            losses: of the clients that report one, nats per byte.
            mean: of these losses, weighted by held-out bytes.
            speeds: tokens per second of clients that train.
        """
        losses = [loss for loss in losses if not math.isnan(loss)]
        taus, self._taus = self._taus, []
        return {
            MEAN: {
                "loss": mean,
                "tau": sum(taus) / len(taus) if taus else None,
                "tokens_per_s": sum(speeds) / len(speeds) if speeds else None,
            },
            BEST: {
                "loss": min(losses, default=None),
                "tau": min(taus, default=None),
                "tokens_per_s": max(speeds, default=None),
            },
            WORST: {
                "loss": max(losses, default=None),
                "tau": max(taus, default=None),
                "tokens_per_s": min(speeds, default=None),
            },
        }
