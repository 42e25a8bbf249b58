"""A child's side of the link to its parent: every call is made again until the parent has heard it.

    join        find the parent, learn what it has, send again what it has lost
    push        send an update
    pull        get the parent's model
    done, left  the last message
    heartbeat   that the child lives

A parent may die at any moment and come back from a checkpoint, or the network between the two may fail. Whatever cut a
call off, the child joins again and goes on from what the parent then says it has.

The protocol is written once, as generators. They yield what is to be done (`Send`, `Sleep`). A driver does it, and
sends back the answer or throws `Lost`. Drivers are a thread, an event loop (actors/drivers.py) and a virtual clock
(worldlm_ray/simulation/network.py). What a method's arguments and answers are:

    join        name, incarnation, seq                                    Welcome
    push        name, incarnation, to, header, update                     Verdict
    pull        name, incarnation, to, started_tokens                     Packed
    done        name, incarnation, to                                     None
    left        name, incarnation, to                                     whether the child may end
    heartbeat   name, incarnation, to                                     None

`to` is the incarnation of the parent that the child has joined. A parent refuses by a MessageError, which the driver
throws as it is. All of these end with a SupersededError where the parent knows a newer life of the child, and with
`Stopped` where the driver throws it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from worldlm_ray.errors import MessageError, SupersededError
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.exchange.messages import Model, Packed, Pulled, Update, pack_header, unpack_model
from worldlm_ray.exchange.outbox import KeptUpdates
from worldlm_ray.exchange.replies import Verdict, Welcome, believed, checked_verdict
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.quotas import offered_residuals
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.records import LifeRecord, PullRecord, PushRecord, Record

AGAIN_S = 0.5
"""Between two attempts to find a parent that does not answer; later ones wait longer, up to ..."""
AGAIN_AT_MOST_S = 5.0
LOUD_AFTER = 4
"""Attempts after which an operator is told that the parent cannot be found."""
TRIES = 3
"""A model that cannot be read is asked for so often."""

T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """Call the parent. The answer is sent back into the generator, or `Lost` is thrown."""

    method: str
    arguments: tuple[Any, ...]
    nbytes: int = 0
    """Bytes on the wire: of an update; other calls count as nothing."""


@dataclass(frozen=True)
class Sleep:
    """Wait."""

    seconds: float


Steps = Generator[Any, Any, T]
"""What is being done, step by step: yields `Send` and `Sleep`, here."""


class Lost(Exception):
    """A call was not answered: the parent has died, has been restarted, or cannot be reached."""


class Stopped(Exception):
    """The child was told to stop while it waited."""


class Child(Protocol):
    """What a client and a federation have in common."""

    @property
    def incarnation(self) -> int:
        """How often the child has been started."""
        ...

    @property
    def seq(self) -> int:
        """Of the last update that the child knows it has made."""
        ...

    @property
    def outbox(self) -> KeptUpdates:
        """What the parent might still lose."""
        ...

    @property
    def started_tokens(self) -> int:
        """Tokens of all local rounds begun below."""
        ...

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again."""
        ...

    def answered(self, seq: int, verdict: Verdict) -> None:
        """The parent's verdict on the update with this number."""
        ...


class Uplink:
    """One child's link to its parent.

    Args:
        plan: the run.
        path: of the child.
        child: whose seq and outbox the link keeps in step with the parent.
        tell: takes records.
        now_s: gives the run time.
    """

    def __init__(
        self, plan: Plan, path: str, child: Child, *, tell: Callable[[Record], None], now_s: Callable[[], float]
    ) -> None:
        self._path, self._child, self._tell, self._now_s = path, child, tell, now_s
        self._name, self._layout, above = plan.node(path).name, plan.layout, parent_path(path)
        self._offered = 0 if above is None else offered_residuals(plan.node(above))
        """Residuals that the parent's model may bring."""
        self._has_rest = above is not None and plan.node(above).settings.aggregation.rule == "sums"
        """Whether it may bring what lies beyond the parent."""
        self._to = 0
        """Incarnation of the parent that has been joined; 0 while none is."""

    # ---- what a child says -------------------------------------------------------------------------------------

    def join(self) -> Steps[None]:
        """Find the parent, for as long as it takes, and send it what it does not have.

        Raises:
            SupersededError: the parent knows a newer life of the child. All other steps may end so, too.
        """
        attempt = 0
        while True:
            try:
                yield from self._join()
                if attempt >= LOUD_AFTER:
                    self._life("training", "its parent is back")
                return
            except Lost as error:
                attempt += 1
                if attempt == LOUD_AFTER:
                    self._life("waiting", f"its parent does not answer ({error})")
                yield Sleep(min(AGAIN_S * attempt, AGAIN_AT_MOST_S))

    def push(self, update: Update) -> Steps[None]:
        """Send an update that is in the outbox."""
        try:
            yield from self._push(update)
        except Lost:
            yield from self.join()  # which sends the outbox

    def pull(self) -> Steps[Pulled]:
        """The parent's model, or why none could be read, however often it was asked for."""
        tries = 0
        while True:
            try:
                model, size = self._read((yield from self._ask()))
                self._tell(PullRecord(node=self._path, now_s=self._now_s(), version=model.version, bytes=size))
                return model
            except MessageError as error:  # something on the way may have damaged it
                tries += 1
                if tries == TRIES:
                    return error
                yield Sleep(AGAIN_S)
            except Lost:
                yield from self.join()

    def done(self) -> Steps[None]:
        """The child will train no more."""
        yield from self._until_heard("done")

    def left(self) -> Steps[None]:
        """The child leaves the run, once its parent cannot lose any more what the child has pushed."""
        while not (yield from self._until_heard("left")):
            yield Sleep(AGAIN_S)

    def check(self) -> Steps[bool]:
        """Tell the parent that the child lives; returns whether the parent is the one that it has joined."""
        try:
            yield from self._call("heartbeat")
        except Lost:
            return False
        return True

    def heartbeat(self) -> Send | None:
        """A heartbeat to be sent without waiting for its answer; None while no parent is joined."""
        return Send("heartbeat", (self._name, self._child.incarnation, self._to)) if self._to else None

    # ---- calls ---------------------------------------------------------------------------------------------------

    def _until_heard(self, method: str) -> Steps[Any]:
        while True:
            try:
                return (yield from self._call(method))
            except Lost:
                yield from self.join()

    def _join(self) -> Steps[None]:
        self._to = 0
        found = yield from self._send(Send("join", (self._name, self._child.incarnation, self._child.seq)))
        try:
            welcome, doubt = believed(found, seq=self._child.seq)
        except MessageError as error:
            raise Lost(str(error)) from error
        if doubt:
            self._life("warning", f"its parent's welcome is not believed: {doubt}")
        self._welcomed(welcome)
        after = welcome.last_seq
        while updates := self._child.outbox.after(after):
            yield from self._push(updates[0])
            after = updates[0].seq

    def _push(self, update: Update) -> Steps[None]:
        header = pack_header(update, self._layout)
        size = self._size(header, update)
        self._tell(PushRecord(node=self._path, now_s=self._now_s(), bytes=size))
        while True:
            verdict = yield from self._verdict(header, update, size)
            if verdict.reason == "superseded":
                raise SupersededError(f"{self._path}: {verdict.detail}")
            self._child.answered(update.seq, verdict)
            if self._child.outbox.must_rejoin(update.seq, verdict):
                self._to = 0
                raise Lost(verdict.detail)
            if verdict.reason != "out_of_turn":
                return
            # Sent again after a restart, while the one before waits for its siblings': not before that is through.
            yield from self._ask()

    def _welcomed(self, welcome: Welcome) -> None:
        self._to = welcome.incarnation
        self._child.welcomed(welcome)

    def _size(self, header: bytes, update: Update) -> int:
        """Bytes of an update on the wire."""
        return len(header) + nbytes(update.codec, update.values.size)

    def _read(self, answer: Any) -> tuple[Model, int]:
        """The model in a pull's answer, and its bytes on the wire.

        Raises:
            MessageError: it is none.
        """
        if not isinstance(answer, Packed):
            text = f"the answer to a pull is no header and one buffer, but {type(answer).__name__}"
            raise MessageError("malformed", text)
        model = unpack_model(answer, self._layout, residuals=self._offered, has_rest=self._has_rest)
        return model, answer.nbytes

    def _verdict(self, header: bytes, update: Update, size: int) -> Steps[Verdict]:
        found = yield from self._call("push", header, update, nbytes=size)
        try:
            return checked_verdict(found)
        except MessageError as error:
            self._to = 0
            raise Lost(str(error)) from error

    def _ask(self) -> Steps[Any]:
        return (yield from self._call("pull", self._child.started_tokens))

    def _call(self, method: str, *arguments: Any, nbytes: int = 0) -> Steps[Any]:
        """A call that only the parent that was joined may take."""
        if not self._to:
            raise Lost("not joined")
        who = (self._name, self._child.incarnation, self._to)
        return (yield from self._send(Send(method, (*who, *arguments), nbytes)))

    def _send(self, send: Send) -> Steps[Any]:
        try:
            return (yield send)
        except MessageError as error:
            if error.reason == "superseded":
                raise SupersededError(f"{self._path}: {error.detail}") from error
            self._to = 0
            raise Lost(str(error.detail)) from error
        except Lost:
            self._to = 0
            raise

    def _life(self, event: str, detail: str) -> None:
        self._tell(LifeRecord(node=self._path, now_s=self._now_s(), event=event, detail=detail))
