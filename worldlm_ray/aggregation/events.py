"""What can happen to an inner node, and what it may ask of its backend.

event                                  what may come back
Joined(child, seq)                     Admit(welcome), Save, Serve, Exchange, Refresh
Push(sender, packed)                   Charge, Answer(verdict), Save, Exchange, Serve, Wake
Pull(child, started_tokens)            Serve(child), now or once the child may go on
ParentModel(model)                     Serve, Exchange, Finish
Done(child), Left(child)               Serve, Exchange, Finish; Save where a child leaves, which waits for that
Heartbeat(child)                       nothing, or as Push if the child had been given up
Clock                                  as Push

Started(incarnation)                   Charge, Exchange or Refresh, Wake: what was due before
UpdateDue                              Send(update)
UpdateSent, Welcomed, Answered,
Saving, Saved, Shared                  nothing

A Note(record) may come with any of the first, and with Started.

The first are of the children, of the parent's model and of time. The others are of the backend itself: each is what it
has done with a command, or what the parent has answered.

Events from children carry two incarnations: the child's own, and `to`, that of the node which the child has joined. A
node that has been restarted answers `restarted` until a child has joined again, since only then does it know what the
child still keeps for it; an earlier life of a child is answered `superseded`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from worldlm_ray.exchange.messages import Model, Packed, Pulled, Update
from worldlm_ray.exchange.quota import Quota
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.records import Record
from worldlm_ray.tensors.buffers import Flat


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
    quota: Quota | None = None
    """What it may claim, of a child that has come since the node's plan was made."""
    admission: int = 1
    """How often a border has let the child in. When it rises, incarnations begin anew: a thief of the child's key may
    have raised them."""


@dataclass(frozen=True, kw_only=True)
class ParentModel:
    """The parent's model arrived: the end of an exchange, or of a refresh."""

    model: Pulled
    """Where none could be read, the node goes on with its own."""
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Time has passed: asked for by a Wake command."""

    now_s: float


@dataclass(frozen=True, kw_only=True)
class Started:
    """The node begins, or goes on from what it has restored."""

    incarnation: int = 1
    """How often it has been started."""


@dataclass(frozen=True, kw_only=True)
class UpdateDue:
    """The update that an Exchange command has asked for is to be made now.

    It holds all work since the last one. After a restart that lost the parent's answer it is the same update again.
    """


@dataclass(frozen=True, kw_only=True)
class UpdateSent:
    """The update in flight is sent now. The node keeps it until the parent cannot lose it any more."""


@dataclass(frozen=True, kw_only=True)
class Welcomed:
    """The parent is there, perhaps again."""

    welcome: Welcome


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The parent has judged an update of this node."""

    seq: int
    """The update's. The verdict on one that was damaged on the way may name another."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Covered:
    """What of a node a checkpoint knows."""

    seqs: Mapping[str, int]
    """Highest accepted seq of every child."""
    left: Collection[str] = ()
    """Children that have left."""
    seq: int = 0
    """The node's own: its newest update for its parent."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A checkpoint is written while events go on: what `Node.state` gives now keeps its values.

    This does not hold for the buffers that `node_checkpoint.changes` names.
    """


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is on disk: children need not keep what it covers, and those that left may end."""

    covered: Covered


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """The published model, or the update in flight, lies in shared memory: the node need not hold a second copy."""

    own: Flat
    """The node's buffer."""
    copy: Flat
    """The same values in shared memory; the node uses it from now on."""


ChildEvent = Push | Pull | ParentModel | Done | Left | Joined | Heartbeat | Clock
BackendEvent = Started | UpdateDue | UpdateSent | Welcomed | Answered | Saving | Saved | Shared
Event = ChildEvent | BackendEvent


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Tell the child that pushed what became of its update."""

    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Admit:
    """Tell the child that has joined what it must know."""

    welcome: Welcome


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Send this model to a child that pulled."""

    child: str
    model: Model


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Exchange with the parent: an UpdateDue event gives the update; push it, pull, and bring the model (ParentModel).

    The update is not in the command: a backend may move the published model to shared memory first, so that the two
    never stand in private memory together.
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Send:
    """Push this update to the parent, once a checkpoint knows it (`Node.may_send`); UpdateSent says that it goes."""

    update: Update


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Join the parent, pull, and bring its model as a ParentModel: the first child has come."""


@dataclass(frozen=True, kw_only=True)
class Wake:
    """Send a Clock event at this time."""

    at_s: float


@dataclass(frozen=True, kw_only=True)
class Save:
    """Write a checkpoint: a child keeps many updates in case this node dies, or has lost those that it kept, or
    has left and waits until that is known."""


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


Command = Answer | Admit | Serve | Send | Exchange | Refresh | Wake | Save | Finish | Note | Charge
