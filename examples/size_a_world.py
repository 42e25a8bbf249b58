"""What a world of any size needs, from what was measured and this machine's memory.

    python examples/size_a_world.py --clients 1e6 --parameters 125e6 --round-s 600 --push-every 32

    t_update = FIXED_S + COPIES * model bytes / copy bandwidth        an aggregator's work per child's update
    busy     = updates per second * t_update + exchanges with the parent per second * t_exchange

The two constants are printed by `python -m benchmarks exchange` and `python -m benchmarks scale`; what they leave out
is the network, which is bytes by bandwidth. An aggregator that is busy for more than `FULL` of the time makes children
wait.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from worldlm_ray.aggregation.node_memory import node_bytes
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.config.values import one_of
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.compression import CODECS, nbytes
from worldlm_ray.reports.tables import amount, duration
from worldlm_ray.reports.terminal import Column, FittingTable

COPIES = 5.6
"""Pull, push, checks, fold, aggregation and publishing, in copies of the model (`exchange`, asynchronous)."""
FIXED_S = 5e-3
"""The same for a model of no size: calls between processes (`scale`)."""
EXCHANGE_COPIES = 6.0
"""A federation's exchange with its parent: difference, share and merge, two passes over three buffers (counted)."""
CLIENT_BYTES = 20
"""Bytes per parameter of a plain client."""
FULL = 0.7
"""Share of the time that an aggregator may be busy."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine of the cluster can do."""

    copy_bytes_per_s: float
    """Bytes of a buffer that are copied in a second."""
    link_bytes_per_s: float
    """Of its network."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The world to be sized."""

    clients: int
    parameters: int
    fan_out: int
    """Children of an aggregator, at most."""
    round_s: float
    """Seconds of training between two exchanges of a client."""
    push_every: int = 1
    """Aggregations between two exchanges of a federation."""
    codec: str = "fp32"

    @property
    def moved_bytes(self) -> float:
        """Bytes of one exchange, up and down."""
        return nbytes(self.codec, self.parameters) + 4 * self.parameters


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Nodes of one depth."""

    name: str
    nodes: int
    children: float
    updates_per_s: float
    """That reach each of them."""
    busy: float
    """Share of the time that each is busy; of a client, that its training waits for the exchange."""
    link: float
    """Share of its network that each uses."""
    memory_bytes: int


def measure_copy() -> float:
    """Bytes of a buffer that this machine copies in a second; takes about one."""
    source, target = np.ones(64_000_000, np.float32), np.ones(64_000_000, np.float32)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return source.nbytes / sorted(times)[len(times) // 2]


def tiers(wish: Wish, machine: Machine) -> list[Tier]:
    """Every depth of the tree, the world first.

    Raises:
        ConfigError: a number is not positive, or an aggregator would have fewer than two children.
    """
    for name in ("clients", "parameters", "round_s", "push_every"):
        if getattr(wish, name) <= 0:
            raise ConfigError(name, f"got {getattr(wish, name)}", "give a number above 0")
    if wish.codec not in CODECS:
        raise ConfigError("codec", f"got {wish.codec!r}", one_of(wish.codec, CODECS.names()))
    if wish.fan_out < 2:
        raise ConfigError("fan_out", f"got {wish.fan_out}", "an aggregator has 2 children or more")
    model = 4 * wish.parameters
    copy_s, moved_s = model / machine.copy_bytes_per_s, wish.moved_bytes / machine.link_bytes_per_s
    found = [
        Tier(
            name="clients",
            nodes=wish.clients,
            children=0.0,
            updates_per_s=0.0,
            busy=(moved_s + FIXED_S + 2 * copy_s) / wish.round_s,
            link=moved_s / wish.round_s,
            memory_bytes=CLIENT_BYTES * wish.parameters,
        )
    ]
    below, rate = wish.clients, 1.0 / (wish.round_s + moved_s)
    """Nodes of the tier below, and how often each of them pushes."""
    while below > 1 or len(found) == 1:
        nodes = math.ceil(below / wish.fan_out)
        children, is_world = below / nodes, nodes == 1
        updates = children * rate
        exchange_s = FIXED_S + EXCHANGE_COPIES * copy_s
        # One exchange at a time: what comes meanwhile goes with the next.
        pushes = 0.0 if is_world else min(updates / wish.push_every, 1.0 / (exchange_s + moved_s))
        found.append(
            Tier(
                name="world" if is_world else f"federations {len(found)} up",
                nodes=nodes,
                children=children,
                updates_per_s=updates,
                busy=updates * update_s(wish, machine) + pushes * exchange_s,
                link=(updates + pushes) * moved_s,
                memory_bytes=node_bytes(
                    AggregationConfig(),
                    backbone=wish.parameters,
                    keys=0,
                    children=math.ceil(children),
                    is_world=is_world,
                    codec=wish.codec,
                ),
            )
        )
        below, rate = nodes, pushes
    return found[::-1]


def update_s(wish: Wish, machine: Machine) -> float:
    """An aggregator's seconds per update."""
    return FIXED_S + COPIES * 4 * wish.parameters / machine.copy_bytes_per_s


def most_children(wish: Wish, machine: Machine) -> tuple[int, str]:
    """Clients that one federation serves when it is busy for `FULL` of the time, and what limits them."""
    moved_s = wish.moved_bytes / machine.link_bytes_per_s
    exchange_s = FIXED_S + EXCHANGE_COPIES * 4 * wish.parameters / machine.copy_bytes_per_s
    by_memory = FULL / (update_s(wish, machine) + exchange_s / wish.push_every)
    by_link = FULL / (moved_s * (1.0 + 1.0 / wish.push_every))
    limit = "its network" if by_link < by_memory else "its memory's speed"
    return int(min(by_memory, by_link) * (wish.round_s + moved_s)), limit


def table(wish: Wish, machine: Machine, found: Sequence[Tier]) -> FittingTable:
    """The tiers for the terminal."""
    title = f"{wish.clients:,} clients, {amount(wish.parameters)} parameters, an exchange per {duration(wish.round_s)}"
    numbers = map(Column, ("nodes", "children", "updates/s", "busy", "network", "memory each"))
    shown = FittingTable(title, [Column("", is_number=False), *numbers])
    for tier in found:
        above = "bold red" if max(tier.busy, tier.link) > 1.0 else ""
        shown.add_row(
            tier.name,
            f"{tier.nodes:,}",
            f"{tier.children:.0f}" if tier.children else "",
            f"{tier.updates_per_s:.3g}" if tier.children else "",
            f"{tier.busy:.1%}",
            f"{tier.link:.1%}",
            f"{amount(tier.memory_bytes)}B",
            style=above,
        )
    most, limit = most_children(wish, machine)
    shown.caption = (
        f"a copy {machine.copy_bytes_per_s / 1e9:.1f} GB/s, a link {8e-9 * machine.link_bytes_per_s:g} Gbit/s, "
        f"{wish.codec} upwards; one federation serves {most:,} such clients, limited by {limit}"
    )
    return shown


def main() -> None:
    """Print the tiers of a world: nodes, how busy they are, network and memory."""
    parser = argparse.ArgumentParser(description="Estimate what a world of any size needs, from measured constants.")
    parser.add_argument("--clients", type=float, required=True, help="of the whole world, such as 1e6")
    parser.add_argument("--parameters", type=float, required=True, help="of the model, such as 70e9")
    parser.add_argument("--fan-out", type=int, default=32, help="children of an aggregator, at most")
    parser.add_argument("--round-s", type=float, default=600.0, help="seconds between two exchanges of a client")
    parser.add_argument("--push-every", type=int, default=1, help="aggregations between a federation's exchanges")
    parser.add_argument("--codec", default="fp32", help="of updates: fp32, bf16, int8 or int4")
    parser.add_argument("--link-gbit", type=float, default=10.0, help="network of every machine, Gbit/s")
    parser.add_argument("--copy-gb-per-s", type=float, help="memory speed; without it this machine's")
    asked = parser.parse_args()
    wish = Wish(
        clients=int(asked.clients),
        parameters=int(asked.parameters),
        fan_out=asked.fan_out,
        round_s=asked.round_s,
        push_every=asked.push_every,
        codec=asked.codec,
    )
    copied = measure_copy() if asked.copy_gb_per_s is None else 1e9 * asked.copy_gb_per_s
    machine = Machine(copy_bytes_per_s=copied, link_bytes_per_s=1e9 / 8 * asked.link_gbit)
    found = tiers(wish, machine)
    console = Console()
    console.print(table(wish, machine, found))
    for tier in found:
        if max(tier.busy, tier.link) > 1.0:
            what = "is busier than it can be" if tier.busy > tier.link else "needs more network than it has"
            console.print(f"{tier.name} {what}: exchange less often, have fewer children, or push less", style="yellow")


if __name__ == "__main__":
    main()
