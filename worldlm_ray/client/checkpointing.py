"""What of a client a checkpoint holds: plain values and flat buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from worldlm_ray.errors import CheckpointError, PrivacyError
from worldlm_ray.exchange.outbox import fields, limited, revived
from worldlm_ray.privacy.account import Account
from worldlm_ray.tensors.buffers import Flat

if TYPE_CHECKING:
    from worldlm_ray.client.client import Client

_STATE = (
    "round",
    "step",
    "steps",
    "tokens",
    "loss_sum",
    "seq",
    "base_version",
    "base_incarnation",
    "progress",
    "learning_rate",
    "began",
    "start_over",
)
"""Plain values of a client."""


def state_of(client: Client) -> tuple[dict[str, Any], dict[str, Flat]]:
    """Everything that a restart needs, down to the step within a round: of this moment, whatever comes next.

    Buffers that training or the next pull change in place are copied.
    """
    meta = {name: getattr(client, name) for name in _STATE}
    meta["layout"] = client.plan.layout.hash
    meta["followed"] = client.followed
    meta["charges"] = 0 if client.account is None else len(client.account.ledger.entries())
    arrays = {"theta": client.trainer.read(), "base": client.base.copy(), "parent_keys": client.parent_keys.copy()}
    if client.merger.heard is not None:
        arrays["heard"] = client.merger.heard
    if client.lost is not None:
        arrays["lost"] = client.lost.copy()
    arrays |= {f"optimizer.{name}": values for name, values in client.trainer.optimizer_state().items()}
    meta["outbox"], kept = client.outbox.state()
    arrays |= kept
    if client.in_flight is not None:
        meta["in_flight"], meta["whole"] = fields(client.in_flight), client.is_whole
        if all(values is not client.in_flight.values for values in kept.values()):
            arrays["in_flight"] = client.in_flight.values
    return meta, arrays


def restore(client: Client, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
    """Make the client what `state_of` described.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    if meta["layout"] != client.plan.layout.hash:
        raise CheckpointError(f"{client.spec.path}: the checkpoint is of another model or another choice of key layers")
    for name in _STATE:
        setattr(client, name, meta[name])
    client.followed = meta.get("followed")
    if meta.get("whole", False):
        client.step = client.training.local_steps  # it waits for the exchange, to be pushed
    elif client.began:
        # A round may have been shortened by a change of local_steps: it ends with one more step.
        client.step = min(client.step, client.training.local_steps - 1)
    if client.account is not None:
        _pay_again(client, client.account, meta["charges"])
    client.base, client.parent_keys = np.array(arrays["base"]), np.array(arrays["parent_keys"])
    if client.lost is not None and "lost" in arrays:
        client.lost[:] = arrays["lost"]
    if client.merger.heard is not None and "heard" in arrays:
        client.merger.heard = arrays["heard"]
    client.trainer.write(arrays["theta"])
    client.outbox.restore(meta["outbox"], arrays)
    client.outbox.limit_tokens(client.round_tokens)
    if "in_flight" in meta:
        kept = client.outbox.after(meta["in_flight"]["seq"] - 1)  # it is the newest, if it is there
        update = kept[0] if kept else revived(meta["in_flight"], arrays["in_flight"])
        client.in_flight = limited(update, client.round_tokens)
    prefix = "optimizer."
    client.trainer.load_optimizer_state({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})


def _pay_again(client: Client, account: Account, charges: int) -> None:
    """Pay for the rest of the round: the life before, or another one from this checkpoint, may have trained it."""
    found = len(account.ledger.entries())
    if found < charges:
        raise PrivacyError(
            f"{account.ledger.path}: holds {found} of the {charges} charges that {client.spec.path} has made; "
            "restore the file from a copy: without it nobody knows what was spent"
        )
    left = client.training.local_steps - client.step
    if client.began and left and not account.charge(client.round + 1, steps=left):
        client.began, client.step = False, 0
