"""What a run says while it waits: which actors have died and of what, and which have not come up yet.

Ray starts an actor again as often as it dies, and does not say so. A thread asks Ray every few seconds.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worldlm_ray.launch.calls import Observer
from worldlm_ray.launch.private import state

LOOK_S = 3.0
"""How often Ray is asked who has died."""
WAITING_S = 15.0
"""Seconds between two lines that say what is being waited for."""
AGAIN_S = 60.0
"""Seconds between two warnings of the same kind."""
NAMED = 3
"""So many nodes of those that are being waited for are named."""
MEMORY = re.compile(r"was (?P<used>[\d.]+)GB used / (?P<limit>[\d.]+)GB limit \((?P<share>[\d.]+)\)")
THRESHOLD = re.compile(r"exceeded threshold of \d+B \((?P<percent>[\d.]+)%")
CURE = "train fewer or smaller clients on this machine, or free memory"


@dataclass
class Monitor:
    """Says who dies of what, and what a run that does not begin is waiting for.

    Args:
        observer: who is told.
        deaths: who has died so far, the oldest first.
        actors: what Ray knows of the actors of a namespace.
        clock: monotonic seconds.
    """

    observer: Observer
    deaths: Callable[[], Sequence[state.Death]] = state.deaths
    actors: Callable[[str], Mapping[str, state.ActorState]] = state.actors
    clock: Callable[[], float] = time.monotonic
    namespace: str = ""
    on_trouble: Callable[[str], None] = lambda _: None
    waiting: dict[str, str] = field(default_factory=dict)
    """Nodes that are not ready, with the names of their actors."""
    total: int = 0
    """How many nodes there are to wait for."""
    _known: int = 0
    """Deaths before this run."""
    _killed: int = 0
    _warned_at: float = float("-inf")
    _said_at: float = 0.0
    _troubled: bool = False

    def __enter__(self) -> Monitor:
        self._over = threading.Event()
        self._known, self._said_at = len(self.deaths()), self.clock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LOOK_S)

    def begin(self, namespace: str, waiting: Mapping[str, str], *, on_trouble: Callable[[str], None]) -> None:
        """Wait for the nodes of a run.

        Args:
            namespace: of its actors.
            waiting: names of the actors by the paths of the nodes.
            on_trouble: told a warning for the run's files, or an empty text once it is over.
        """
        self.namespace, self.on_trouble, self.total = namespace, on_trouble, len(waiting)
        self.waiting = dict(waiting)

    def is_ready(self, path: str) -> None:
        """A node need not be waited for any more."""
        self.waiting.pop(path, None)

    def _run(self) -> None:
        while not self._over.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """Ask Ray, and say what is new."""
        now, found = self.clock(), self.deaths()[self._known :]
        killed = [death for death in found if death.is_memory]
        if len(killed) > self._killed and now - self._warned_at >= AGAIN_S:
            self._killed, self._warned_at, self._troubled = len(killed), now, True
            text = memory_warning(killed)
            self.observer.on_warning(text)
            self.on_trouble(text)
        elif self._troubled and len(killed) == self._killed and now - self._warned_at >= 2 * AGAIN_S:
            self._troubled = False
            self.on_trouble("")
        if self.waiting and now - self._said_at >= WAITING_S:
            self._said_at = now
            known = self.actors(self.namespace)
            waiting = dict(self.waiting)  # only now: the run may have begun while Ray was asked
            if waiting:
                self.observer.on_phase(self._waits_for(waiting, known, found))

    def _waits_for(
        self, waiting: Mapping[str, str], known: Mapping[str, state.ActorState], found: Sequence[state.Death]
    ) -> str:
        named = [f"{path} ({_state(known.get(name))})" for path, name in list(waiting.items())[:NAMED]]
        more = f" and {len(waiting) - NAMED} more" if len(waiting) > NAMED else ""
        died = f"; the last process that died: {_first_sentence(found[-1].detail)}" if found else ""
        return f"waiting for {len(waiting)} of {self.total} nodes: {', '.join(named)}{more}{died}"


def memory_warning(killed: Sequence[state.Death]) -> str:
    """What Ray's memory monitor does, in one line."""
    detail, number = killed[-1].detail, len(killed)
    used, limit = MEMORY.search(detail), THRESHOLD.search(detail)
    where = _first_sentence(detail)
    if used is not None:
        where = f"{float(used['share']):.0%} of {float(used['limit']):.0f} GB used"
        where += f", threshold {float(limit['percent']):.0f}%" if limit is not None else ""
    return f"Ray ends actors for want of memory ({where}), {number} so far; {CURE}"


def _state(actor: state.ActorState | None) -> str:
    if actor is None:
        return "unknown to Ray"
    restarts = f", started again {actor.restarts} times" if actor.restarts else ""
    words = {
        "ALIVE": "gets ready: reads its text and its checkpoint",
        "PENDING_CREATION": "has no process yet",
        "RESTARTING": "is being started again",
        "DEPENDENCIES_UNREADY": "has no process yet",
        "DEAD": "is dead",
    }
    return words.get(actor.state, actor.state.lower()) + restarts


def _first_sentence(detail: str) -> str:
    text = " ".join(detail.split())
    return re.split(r"(?<=[a-z])\. ", text, maxsplit=1)[0].rstrip(".")
