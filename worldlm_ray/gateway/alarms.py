"""What looks as if a member's key were in two hands: the world's operator is told, and nothing is refused for it.

    one key, two addresses      both were heard of within HEARD_S; IPv4 and IPv6 apart, as one machine may have both
    an incarnation that jumps   a member's rises by one at each start; one that its owner did not start rises faster

A member whose machine has moved to another network looks alike for a moment. So each alarm is said once an hour.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from worldlm_ray.gateway.connections import Connection

HEARD_S = 5.0
"""Addresses from which bytes have come within so long are used at once."""
JUMP = 10
"""Starts of a member between two that its world hears of: more are an alarm."""
AGAIN_S = 3_600.0
CURE = "if its operator does not know of it, revoke and readmit it"


class Alarms:
    """Alarms about members.

    Args:
        warn: hears of a member's path and what looks wrong.
        clock: seconds that only rise.
    """

    def __init__(
        self, warn: Callable[[str, str], None] = lambda path, text: None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._warn, self._clock = warn, clock
        self._next_s: dict[tuple[str, str], float] = defaultdict(float)

    def look(self, connections: Iterable[Connection], path_of: Callable[[bytes], str], now_s: float) -> None:
        """Look at all connections.

        Args:
            connections: that are open.
            path_of: gives the path of a certificate's member.
            now_s: seconds of the event loop.
        """
        found: dict[tuple[bytes, bool], set[str]] = defaultdict(set)
        for each in connections:
            if each.certificate is not None and now_s - each.heard_s < HEARD_S:
                found[each.certificate, ":" in each.address].add(each.address)
        for (certificate, _), addresses in found.items():
            if len(addresses) > 1:
                path = path_of(certificate)
                places = " and ".join(sorted(addresses)[:3])
                self._tell(path, "addresses", f"the key of {path} is used from {places} at once; {CURE}")

    def joined(self, path: str, before: int | None, now: int) -> None:
        """A member has joined by an incarnation; before it was another, or is not known."""
        if before is not None and now - before > JUMP:
            self._tell(path, "incarnation", f"the incarnation of {path} went from {before} to {now}; {CURE}")

    def refused(self, path: str, reason: str, detail: str) -> None:
        """A member is refused."""
        if reason == "implausible_incarnation":
            self._tell(path, "incarnation", f"{detail}; {CURE}")

    def _tell(self, path: str, kind: str, text: str) -> None:
        now_s = self._clock()
        if now_s >= self._next_s[path, kind]:
            self._next_s[path, kind] = now_s + AGAIN_S
            self._warn(path, text)
