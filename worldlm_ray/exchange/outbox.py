"""Updates that a child keeps for the case that its parent dies.

A parent tells with every answer up to which `seq` its checkpoints cover what it has accepted. What lies above is in the
parent's memory alone: the child keeps it, and sends it again to a parent that comes back without it. So an accepted
update is never lost, and since the parent drops what it has seen, never applied twice; and no update is written to a
log (see docs/faults.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from worldlm_ray.exchange.messages import Update
from worldlm_ray.exchange.replies import ACCEPTED, Verdict
from worldlm_ray.tensors.buffers import Flat

_ARRAY = "outbox."
TRIES = 10
"""An update that arrives malformed more often than this is given up."""
_AGAIN = ("restarted", "out_of_turn", "malformed")
"""Refusals of the moment: the update may be sent again."""


class KeptUpdates(Protocol):
    """What may be asked of an outbox. None of it changes anything."""

    def __contains__(self, seq: int) -> bool: ...

    def after(self, seq: int) -> list[Update]:
        """See `Outbox.after`."""

    def must_rejoin(self, seq: int, verdict: Verdict) -> bool:
        """See `Outbox.must_rejoin`."""


class Outbox:
    """The updates of one child that its parent might still lose, oldest first."""

    def __init__(self) -> None:
        self._updates: dict[int, Update] = {}
        self._damaged: Counter[int] = Counter()
        """How often an update has arrived malformed."""

    def __len__(self) -> int:
        return len(self._updates)

    def __contains__(self, seq: int) -> bool:
        return seq in self._updates

    def add(self, update: Update) -> None:
        """Keep an update, until it is durable or refused."""
        self._updates[update.seq] = update

    def durable(self, seq: int) -> None:
        """Let go of what the parent's checkpoints cover."""
        self._updates = {number: update for number, update in self._updates.items() if number > seq}

    def after(self, seq: int) -> list[Update]:
        """What a parent that has accepted up to `seq` has not got, in the order in which it was made."""
        return [self._updates[number] for number in sorted(self._updates) if number > seq]

    def apply(self, seq: int, verdict: Verdict) -> None:
        """Drop what the parent will never take, what it cannot lose, and what arrives damaged too often.

        Args:
            seq: of the update that was sent. The verdict on a damaged one may name another.
            verdict: the parent's.
        """
        self.durable(verdict.durable_seq)
        if verdict.reason not in (ACCEPTED, "duplicate", *_AGAIN):
            self._updates.pop(verdict.seq, None)
        if verdict.reason == "malformed":  # it was whole when it left: something on the way has damaged it
            self._damaged[seq] += 1
            if self._is_given_up(seq):
                self._updates.pop(seq, None)

    def must_rejoin(self, seq: int, verdict: Verdict) -> bool:
        """Whether the child has to join its parent again and send an update again, once its verdict is applied."""
        return verdict.reason == "restarted" or (verdict.reason == "malformed" and not self._is_given_up(seq))

    def _is_given_up(self, seq: int) -> bool:
        return self._damaged[seq] > TRIES

    def use_shared_copy(self, shared: Update) -> None:
        """Keep this copy of an update, of which a buffer lies in shared memory, in place of the one that was added."""
        if shared.seq in self._updates:
            self._updates[shared.seq] = shared

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Flat]]:
        """For a checkpoint: plain values, and buffers."""
        entries = [fields(update) for update in self._updates.values()]
        arrays: dict[str, Flat] = {}
        for seq, update in self._updates.items():
            arrays |= buffers(update, f"{_ARRAY}{seq}")
        return entries, arrays

    def restore(self, entries: list[dict[str, Any]], arrays: dict[str, Flat]) -> None:
        """Become what `state` described."""
        self._updates = {entry["seq"]: revived(entry, arrays, f"{_ARRAY}{entry['seq']}") for entry in entries}

    def limit_tokens(self, most: int) -> None:
        """Let no kept update claim more than this: its round may be of a run that was configured otherwise."""
        self._updates = {seq: limited(update, most) for seq, update in self._updates.items()}


def limited(update: Update, most: int) -> Update:
    """An update that claims no more tokens than its receiver takes."""
    return replace(update, tokens=min(update.tokens, most))


def revived(entry: dict[str, Any], arrays: Mapping[str, Flat], name: str) -> Update:
    """The update that `fields` and `buffers` wrote down; what an earlier version wrote in addition is left out."""
    plain = {key: value for key, value in entry.items() if key in _FIELDS}
    return Update(**plain, values=arrays[name], low=arrays.get(f"{_LOW}{name}"))


def buffers(update: Update, name: str) -> dict[str, Flat]:
    """The buffers of an update for a checkpoint: its values under this name."""
    return {name: update.values} if update.low is None else {name: update.values, f"{_LOW}{name}": update.low}


_LOW = "low."
_BUFFERS = ("values", "encoded", "residuals", "low")
_FIELDS = frozenset(Update.__dataclass_fields__).difference(_BUFFERS)


def fields(update: Update) -> dict[str, Any]:
    """An update without its buffers. Residuals are an extra: one that is sent again after a crash goes without."""
    return {key: value for key, value in vars(update).items() if key not in _BUFFERS}
