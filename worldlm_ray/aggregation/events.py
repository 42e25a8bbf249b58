"""What can happen to an inner node, what it may ask of its backend, and what it decides about an update.

event                                  what may come back
Joined(child, seq)                     Save, Serve, Exchange
Push(sender, packed)                   Charge, Answer(verdict), Note(records), Save, Exchange, Serve, Wake
Pull(child, started_tokens)            Serve(child), now or once the child may go on
ParentModel(model)                     Serve, Exchange
Done(child), Left(child)               Serve, Exchange, Finish; Save where a child leaves, which waits for that
Heartbeat(child)                            nothing, or as Joined if the child had been given up
Clock                                  as Push

Events from children carry two incarnations: the child's own, and `to`, that of the node which the child has joined. A
node that has been restarted answers `restarted` until a child has joined again, since only then does it know what the
child still keeps for it; an earlier life of a child is answered `superseded`.
"""

from __future__ import annotations

from dataclasses import dataclass

from worldlm_ray.exchange.messages import Model, Packed
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.records import Record


@dataclass(frozen=True, kw_only=True)
class Push:
    """An update arrived from `sender`."""

    sender: str
    packed: Packed
    now_s: float
    incarnation: int = 1
    """The sender's: how often it has been started."""
    to: int = 1
    """Incarnation of the node that the sender has joined."""


@dataclass(frozen=True, kw_only=True)
class ChildMessage:
    """Something that a child says to the node that it has joined."""

    child: str
    now_s: float
    incarnation: int = 1
    """The child's."""
    to: int = 1
    """Incarnation of the node that the child has joined."""


@dataclass(frozen=True, kw_only=True)
class Pull(ChildMessage):
    """A child asks for the model; `started_tokens` counts its local rounds including the one it is about to begin."""

    started_tokens: int


@dataclass(frozen=True, kw_only=True)
class Done(ChildMessage):
    """A child will train no more in this run."""


@dataclass(frozen=True, kw_only=True)
class Left(ChildMessage):
    """A child is gone; what it had pushed stays."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat(ChildMessage):
    """A child lives."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A child is here: a new one, one that had left or was done, or one that one side of has been restarted."""

    child: str
    now_s: float
    incarnation: int = 1
    seq: int = 0
    """Of the last update that the child knows it has made: it keeps no later one."""


@dataclass(frozen=True, kw_only=True)
class ParentModel:
    """The parent's model arrived: the end of an exchange, or of a refresh."""

    model: Model | None
    """None where what came was no model: the node goes on with its own."""
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Time has passed: asked for by a Wake command."""

    now_s: float


Event = Push | Pull | ParentModel | Done | Left | Joined | Heartbeat | Clock


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Tell the child that pushed what became of its update."""

    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Send this model to a child that pulled."""

    child: str
    model: Model


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Push what `Node.begin_exchange` gives to the parent, then pull, and bring the model back as a ParentModel.

    A backend saves the node first, and sends (`Node.send`) what a checkpoint knows (`Node.may_send`).

    The update is not in the command: a backend may move the published model to shared memory first, so that the two
    never stand in private memory together.
    """


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Join the parent, pull, and bring its model as a ParentModel: the first child has come."""


@dataclass(frozen=True, kw_only=True)
class Wake:
    """Send a Clock event at this time."""

    at_s: float


@dataclass(frozen=True, kw_only=True)
class Save:
    """Write a checkpoint: a child keeps many updates in case this node dies, or has lost those that it kept."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Everything below has ended and nothing is left to pass on."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """For tracking."""

    record: Record


@dataclass(frozen=True, kw_only=True)
class Charge:
    """Write down, durably and before any later command is carried out, that a client's update was accepted."""

    child: str


Command = Answer | Serve | Exchange | Refresh | Wake | Save | Finish | Note | Charge
