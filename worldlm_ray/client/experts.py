"""A client of experts: its own adapter beside its federation's and the world's (model/experts.py).

The own adapter is trained on the client's text. At a pull it moves by `merge.client` to a mean f + m (w - f), where f
is the mean of the federation, w that of all clients, and m `merge.federation`. With `merge.client: 0` own adapters take
nothing from others. A pull replaces the other experts, each of which is the mean of others: the client's own part is
taken out of the sums above (aggregation/own_part.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from worldlm_ray.aggregation.own_part import OwnPart
from worldlm_ray.aggregation.sums import on_grid
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.model.expert_names import EXPERTS
from worldlm_ray.plan import build
from worldlm_ray.tensors.buffers import Flat, lerp

if TYPE_CHECKING:
    from worldlm_ray.client.client import Client


class ClientExperts:
    """The exchange of one client that mixes experts.

    Args:
        client: whose exchange it is.
        experts: `kin` or `rest`: see LoraConfig.experts.
    """

    def __init__(self, client: Client, experts: str) -> None:
        self._client, self.experts = client, experts
        self.own_part = OwnPart(client.plan.layout.size)
        self.weight = 0
        """Of this client in all sums: tokens of a round when it first pushed. Fixed: S is a sum of n_i B_i."""
        self.forgets = False
        """Whether it takes its part out of the sums when it leaves."""

    def forget(self) -> None:
        """Take its part out of the sums above when it leaves.

        Raises:
            ConfigError: it does not know all of its part.
        """
        if not self.own_part.is_known:
            got = f"{self._client.spec.path} has come back without a checkpoint of all that it had pushed"
            raise ConfigError("--forget", got, "leave the option out: its part stays")
        self.forgets = True

    def update(self, *, tokens: int, started_tokens: int) -> Update:
        """The change of the client's own adapter since the parent has last accepted it."""
        own = self._client.trainer.read()
        self.weight = self.weight or self._client.round_tokens
        return self._change(own, on_grid(own, self.weight), self.weight, tokens=tokens, started_tokens=started_tokens)

    def withdrawal(self) -> Update | None:
        """The update that takes the client's part out of the sums above; None where it has none, or leaves it there."""
        held, client = self.own_part.held, self._client
        if not self.forgets or not self.own_part.weight:
            return None
        out, nothing = np.empty(held.size, np.float32), np.zeros_like(held)
        update = self._change(out, nothing, 0, tokens=0, started_tokens=client.round * client.round_tokens)
        client.link.keep(update)
        return update

    def _change(self, out: Flat, target: Any, weight: int, *, tokens: int, started_tokens: int) -> Update:
        fields = self.own_part.change(target, weight, out=out)
        return self.own_part.sent(
            self._client.link.update_of(out, tokens=tokens, started_tokens=started_tokens, **fields)
        )

    def take(self, model: Model) -> Model:
        """Mix the parent's model in, at a pull.

        Returns:
            What the own adapter is to move to, as the parent's model. While no client has a part in any mean, the run's
            initial adapter.
        """
        self.mix(model)
        return replace(model, values=self._common(model))

    def mix(self, model: Model) -> None:
        """The experts of others, as the parent's model gives them. The own adapter stays as it is."""
        client = self._client
        others, _ = self.own_part.rest(model, beyond=self.experts == "rest")
        found = [others, model.rest] if self.experts == "kin" else [others]
        nothing = np.zeros(client.plan.layout.size, np.float32)
        names = EXPERTS[self.experts][1:]
        client.trainer.take_experts({n: nothing if v is None else v for n, v in zip(names, found, strict=True)})

    def _common(self, model: Model) -> Flat:
        m = self._client.spec.settings.merge.federation if model.weight else 1.0
        if model.rest is None or not model.rest_weight or not m:
            # A model that has aggregated nothing is the initial one already. One that all have left is zeros.
            return model.values if model.weight or not model.version else build.initial(self._client.plan)
        found = np.empty_like(model.values)
        lerp(model.values, model.rest, m * model.rest_weight / (model.weight + model.rest_weight), out=found)
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a restart needs; the experts themselves are the trainer's."""
        meta, arrays = self.own_part.state()
        return {"weight": self.weight, "own_part": meta}, arrays

    def restore(self, saved: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Become what `state` described."""
        self.weight = saved["weight"]
        self.own_part.restore(saved["own_part"], arrays)
