"""What a child knows of the link to its parent: what it has sent, and what its next update is measured from.

The change that an update carries, and what arrives of it, with the codec's error of earlier updates:

    backbone   theta - anchor + codec error
    keys       theta - parent's keys
"""

from __future__ import annotations

from typing import Any

import numpy as np

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.compression import encode_update, memory
from worldlm_ray.exchange.messages import Model, Pulled, Residual, Update
from worldlm_ray.exchange.outbox import Outbox, buffers, fields, limited, revived
from worldlm_ray.exchange.parent import Gate
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.records import LifeRecord
from worldlm_ray.tensors.buffers import Flat, difference, frozen
from worldlm_ray.tensors.layout import Layout


class ParentLink:
    """The link of one child, a client or an inner node, to its parent.

    What a child does with it, in this order:

        welcomed         the parent is there, perhaps again
        make_update      the work since the last update; `keep` when it may be sent
        use_shared_copy  the update's buffer lies in shared memory now
        answered         the parent's verdict
        look_at          a model has come: whether it is taken
        end_exchange     what was in flight comes back
        heard, refused   the model was taken, or not

    The child sets `in_flight` itself, where it works on during an exchange. It sets `anchor` itself: to the model that
    it has pushed and, at a merge, to what the parent's movement makes of that.

    Args:
        path: of the child.
        layout: the model's layout.
        codec: how updates travel.
        max_step: see `check_model`; None for any.
        anchor: the run's initial parameters [layout.size], or a copy that the child writes into.
    """

    def __init__(self, path: str, layout: Layout, *, codec: str, max_step: float | None, anchor: Flat) -> None:
        self.layout, self.codec = layout, codec
        self._name, self._split = path.rpartition("/")[2], layout.backbone_size
        self.anchor = anchor
        """Where the backbone's next update begins [layout.size]: the model as it was last pushed or, where nothing has
        been pushed since, as it was merged; moved with the parent since."""
        self.parent_keys = np.array(anchor[self._split :])
        """What an update's key layers are measured from: the parent's, as this child last heard them. Where its model
        has been refused since, the child's own, as they were last pushed. Changed in place."""
        self.codec_error = memory(codec, self._split)
        """What the codec has lost of the updates so far; None of one that loses nothing. Changed in place."""
        self.gate = Gate(path, layout, max_step=max_step)
        """Which models of the parent it takes."""
        self.seq = 0
        """Of the newest update that the child knows it has made."""
        self.base_version, self.base_incarnation = 0, 1
        """The parent's version at the last merge, and its incarnation then."""
        self.in_flight: Update | None = None
        """The update of an exchange that has not come back yet, if the child works on meanwhile."""
        self.outbox = Outbox()
        """What the parent has not made durable yet."""

    # ---- up --------------------------------------------------------------------------------------------------

    def make_update(
        self, theta: Flat, *, out: Flat, tokens: int, started_tokens: int, residuals: tuple[Residual, ...] = ()
    ) -> Update:
        """The next update.

        Args:
            theta: the child's model [layout.size].
            out: a buffer of the same size, which may be `theta`: overwritten, and the update's where no codec is used.
            tokens: that the update was trained on.
            started_tokens: of all local rounds begun below the child.
            residuals: what fitted no child below.
        """
        difference(theta[: self._split], self.anchor[: self._split], out=out[: self._split])
        np.subtract(theta[self._split :], self.parent_keys, out=out[self._split :])
        return self.update_of(out, tokens=tokens, started_tokens=started_tokens, residuals=residuals)

    def update_of(self, change: Flat, *, tokens: int, started_tokens: int, **more: Any) -> Update:
        """An update that holds a change [layout.size], which becomes the update's where no codec is used.

        Args:
            change: of the model.
            tokens: that it was trained on.
            started_tokens: of all local rounds begun below the child.
            more: further fields of the update.
        """
        encoded, values = encode_update(self.codec, change, self.codec_error)
        self.seq += 1
        return Update(
            sender=self._name,
            seq=self.seq,
            base_version=self.base_version,
            tokens=tokens,
            started_tokens=started_tokens,
            values=frozen(values),
            codec=self.codec,
            encoded=encoded,
            base_incarnation=self.base_incarnation,
            **more,
        )

    def unchanged(self) -> Flat:
        """A copy of the model [layout.size] whose update would hold no change."""
        return np.concatenate([self.anchor[: self._split], self.parent_keys])

    def keep(self, update: Update) -> None:
        """Keep an update, which is sent now, until the parent cannot lose it any more."""
        self.outbox.add(update)

    def use_shared_copy(self, shared: Update) -> None:
        """Keep this copy of an update, of which a buffer lies in shared memory, in place of the child's own."""
        self.outbox.use_shared_copy(shared)
        if self.in_flight is not None and self.in_flight.seq == shared.seq:
            self.in_flight = shared

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again."""
        self.outbox.durable(welcome.durable_seq)

    def answered(self, seq: int, verdict: Verdict) -> None:
        """The parent's verdict on the update with this number."""
        self.outbox.apply(seq, verdict)

    # ---- down ------------------------------------------------------------------------------------------------

    def look_at(self, model: Pulled, *, own: Flat | None, now_s: float) -> tuple[Model | None, list[LifeRecord]]:
        """The parent's model, unless it is refused, and a warning at the first refusal.

        Args:
            model: what a pull has brought.
            own: the child's whole model; None of a child that has nothing to compare with.
            now_s: run time.
        """
        warning = self.gate.refusal(model, seq=self.seq, own=own, now_s=now_s)
        taken = None if self.gate.shut or isinstance(model, MessageError) else model
        return taken, [] if warning is None else [warning]

    def end_exchange(self) -> Update | None:
        """An answer has come: nothing is in flight any more. Returns what was."""
        pushed, self.in_flight = self.in_flight, None
        return pushed

    def knows(self, model: Model) -> bool:
        """Whether this model has been taken already."""
        return (model.version, model.incarnation) == (self.base_version, self.base_incarnation)

    def heard(self, model: Model) -> None:
        """Remember what a model that was taken says."""
        self.parent_keys[:] = model.values[self._split :]
        self.base_version, self.base_incarnation = model.version, model.incarnation
        self.outbox.durable(model.durable_seq)
        self.seq = max(self.seq, model.last_seq)

    def refused(self) -> None:
        """Measure key layers from what was pushed: the next update must not carry the same change of them again."""
        self.parent_keys[:] = self.anchor[self._split :]

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """What a restart needs: plain values, and buffers.

        `codec_error` is the link's own, which the next update changes, and so is `anchor` where the child writes into
        it. A child that has `anchor` in its own state may leave it out.
        """
        meta: dict[str, Any] = {name: getattr(self, name) for name in _STATE}
        arrays = {"anchor": self.anchor, "parent_keys": self.parent_keys.copy()}
        if self.codec_error is not None:
            arrays["codec_error"] = self.codec_error
        meta["outbox"], kept = self.outbox.state()
        arrays |= kept
        if self.in_flight is not None:
            meta["in_flight"] = fields(self.in_flight)
            if all(values is not self.in_flight.values for values in kept.values()):
                arrays |= buffers(self.in_flight, "in_flight")
        return meta, arrays

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat], *, most_tokens: int | None) -> None:
        """Become what `state` described; `anchor` is the child's to set.

        Args:
            meta: plain values.
            arrays: buffers.
            most_tokens: that an update may claim: a kept one may be of a run that was configured otherwise. None for
                any number.
        """
        for name in _STATE:
            setattr(self, name, meta[name])
        self.parent_keys[:] = arrays["parent_keys"]
        if self.codec_error is not None and "codec_error" in arrays:
            self.codec_error[:] = arrays["codec_error"]
        self.in_flight = None
        self.outbox.restore(meta["outbox"], arrays)
        if "in_flight" in meta:
            kept = self.outbox.after(meta["in_flight"]["seq"] - 1)  # it is the newest, if it is there
            self.in_flight = kept[0] if kept else revived(meta["in_flight"], arrays, "in_flight")
        if most_tokens is not None:
            self.outbox.limit_tokens(most_tokens)
            self.in_flight = None if self.in_flight is None else limited(self.in_flight, most_tokens)


_STATE = ("seq", "base_version", "base_incarnation")
