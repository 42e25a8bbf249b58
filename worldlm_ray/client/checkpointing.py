"""What of a client a checkpoint holds: plain values and flat buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worldlm_ray.client import best
from worldlm_ray.errors import CheckpointError, PrivacyError
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
    "progress",
    "learning_rate",
    "began",
    "start_over",
    "at_home",
)
"""Plain values of a client."""


def state_of(client: Client) -> tuple[dict[str, Any], dict[str, Flat]]:
    """Everything that a restart needs, down to the step within a round: of this moment, whatever comes next.

    Buffers that training or the next pull change in place are copied.
    """
    meta = {name: getattr(client, name) for name in _STATE}
    meta["layout"] = _hash(client)
    meta["charges"] = 0 if client.account is None else len(client.account.ledger.entries())
    meta["link"], arrays = client.link.state()
    arrays |= {name: arrays[name].copy() for name in ("anchor", "codec_error") if name in arrays}
    meta["whole"] = client.link.in_flight is not None and client.is_whole
    arrays["theta"] = client.trainer.read()
    meta["best"], kept = best.state_of(client.best)
    arrays |= kept
    if client.center is not None:
        arrays["center"] = client.center
    if client.own_model is not None:
        meta["own_model"], kept = client.own_model.state()
        arrays |= {f"own_model.{name}": values for name, values in kept.items()}
    if client.experts is not None:
        meta["experts"], kept = client.experts.state()
        arrays |= kept
    arrays |= {f"optimizer.{name}": values for name, values in client.trainer.optimizer_state().items()}
    return meta, arrays


def restore(client: Client, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
    """Make the client what `state_of` described.

    Raises:
        CheckpointError: the checkpoint is of another model.
        PrivacyError: the ledger has lost charges that the checkpoint knows, or cannot be written.
    """
    if meta["layout"] != _hash(client):
        of = "another model, another choice of key layers or another rank of adapters"
        raise CheckpointError(f"{client.spec.path}: the checkpoint is of {of}; set what has changed back")
    for name in _STATE:
        setattr(client, name, meta[name])
    if meta["whole"]:
        client.step = client.training.local_steps  # it waits for the exchange, to be pushed
    elif client.began:
        # A round may have been shortened by a change of local_steps: it ends with one more step.
        client.step = min(client.step, client.training.local_steps - 1)
    if client.account is not None:
        _pay_again(client, client.account, meta["charges"])
    client.link.restore(meta["link"], arrays, most_tokens=client.round_tokens)
    client.link.anchor[:] = arrays["anchor"]
    client.center = arrays.get("center")
    client.trainer.write(arrays["theta"])
    client.best = best.restored(meta["best"], arrays)
    if client.own_model is not None and "own_model" in meta:
        client.own_model.restore(meta["own_model"], _of(arrays, "own_model."))
    if client.experts is not None:
        client.experts.restore(meta["experts"], arrays)
    client.trainer.load_optimizer_state(_of(arrays, "optimizer."))


def _hash(client: Client) -> str:
    """Of the layout of what the client trains, and so of its moments."""
    return client.plan.model_of(client.spec)[1].hash


def _of(arrays: dict[str, Flat], prefix: str) -> dict[str, Flat]:
    """The buffers whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def _pay_again(client: Client, account: Account, charges: int) -> None:
    """Pay for the rest of the round: the life before, or another one from this checkpoint, may have trained it."""
    found = len(account.ledger.entries())
    if found < charges:
        raise PrivacyError(
            f"{account.ledger.path}: holds {found} of the {charges} charges that {client.spec.path} has made; "
            "restore the file from a copy: without it the spending is unknown"
        )
    left = client.training.local_steps - client.step
    if client.began and left and not account.charge(client.round + 1, steps=left):
        client.began, client.step = False, 0
