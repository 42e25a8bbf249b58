"""A client's text, the model that is trained on it, and what that model is worth."""

from __future__ import annotations

from collections.abc import Callable

from worldlm_ray.data import Dataset, prepare
from worldlm_ray.plan.accounts import open_account
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account, weak_delta
from worldlm_ray.records import Measure, OwnModelRecord, StartRecord, perplexity
from worldlm_ray.seeds import derive
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.making import trainer_of
from worldlm_ray.training.sampling import sample
from worldlm_ray.training.trainer import Trainer


class MeasuredModel:
    """The model of one client, measured on the client's held-out text.

    Args:
        plan: the run.
        spec: this client's node.
        dataset: its text; read and cached on this machine unless given.
        make_trainer: makes what trains the model, given the client's account; one in this process unless given.
    """

    def __init__(
        self,
        plan: Plan,
        spec: NodeSpec,
        *,
        dataset: Dataset | None = None,
        make_trainer: Callable[[Account | None], Trainer] | None = None,
    ) -> None:
        self.plan, self.spec, self.training = plan, spec, spec.settings.training
        self.context = plan.shape.context
        self.dataset = dataset or prepare(
            spec.settings.data, context=self.context, key=f"{spec.key}.data", order=spec.path
        )
        self.account = open_account(plan, spec, self.dataset)
        """What the client may spend of its text's privacy; None without such a promise."""
        self.warning = ""
        """What an operator should know before the client begins; empty if nothing."""
        if self.account is not None:
            records = self.dataset.records(context=self.context)
            self.warning = weak_delta(spec.settings.privacy, records, named=self.reports)
        self.trainer = make_trainer(self.account) if make_trainer else self._make_trainer()

    def _make_trainer(self) -> Trainer:
        noise = None if self.account is None else self.account.noise
        return trainer_of(self.plan.shape, self.plan.layout, self.spec.settings, noise=noise)

    @property
    def reports(self) -> bool:
        """Whether losses on its text may leave the client: epsilon does not cover them."""
        privacy = self.spec.settings.privacy
        return privacy.unit == "none" or privacy.report_metrics

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of its text is not read or not kept. Of clients that share a text out, the first says it."""
        is_first = self.spec.settings.data.shard is None or self.spec.settings.data.shard.startswith("1/")
        return self.dataset.left_out if self.reports and is_first else ()

    def measure(self, tokens: int, *, parameters: Flat | None = None) -> Measure:
        """Held-out loss of the client's own model, or of the given parameters.

        Args:
            tokens: held-out tokens to predict, at most.
            parameters: another model, such as the world's.
        """
        windows = self.dataset.heldout_windows(tokens, context=self.context, batch_size=self.training.batch_size)
        nats, count = self.trainer.evaluate(windows, parameters=parameters)
        per_token, is_bytes = nats / count, self.spec.settings.data.tokenizer == "bytes"
        return Measure(
            loss=per_token / self.dataset.heldout_bytes_per_token(),
            heldout_bytes=self.dataset.heldout_bytes,
            perplexity_per_token=None if is_bytes else perplexity(per_token),
        )

    @property
    def has_validation(self) -> bool:
        """Whether a part of its text is there to choose on."""
        return self.dataset.validation_bytes > 0

    def validate(self, tokens: int, *, parameters: Flat | None = None) -> float:
        """Loss on the client's validation text, which everything is chosen on. It needs not leave the client.

        Args:
            tokens: validation tokens to predict, at most.
            parameters: another model than the client's own.

        Returns:
            Nats per byte.

        Raises:
            DataError: the client has no validation text.
        """
        windows = self.dataset.validation_windows(tokens, context=self.context, batch_size=self.training.batch_size)
        nats, count = self.trainer.evaluate(windows, parameters=parameters)
        return nats / count / self.dataset.validation_bytes_per_token()

    def report(self, tokens: int, *, parameters: Flat | None = None) -> Measure | None:
        """What `measure` gives, if that may leave the client."""
        return self.measure(tokens, parameters=parameters) if self.reports else None

    def measure_above(self, path: str, values: Flat, *, version: int, now_s: float) -> OwnModelRecord | None:
        """Measure the model of a node above on this client's held-out text; None of a client that reports no losses.

        Args:
            path: of the node.
            values: its published model.
            version: of the model.
            now_s: run time.
        """
        measure = self.report(self.plan.config.evaluation.tokens, parameters=values)
        if measure is None:
            return None
        return OwnModelRecord(
            node=path,
            now_s=now_s,
            by=self.spec.path,
            version=version,
            loss=measure.loss,
            perplexity_per_token=measure.perplexity_per_token,
            heldout_bytes=measure.heldout_bytes,
        )

    def start_record(self, *, now_s: float) -> StartRecord:
        """Measure the model before the first round."""
        measure = self.report(self.plan.config.evaluation.tokens)
        if measure is None:
            return StartRecord(
                node=self.spec.path, now_s=now_s, loss=None, perplexity_per_token=None, heldout_bytes=0, private=True
            )
        return StartRecord(
            node=self.spec.path,
            now_s=now_s,
            loss=measure.loss,
            perplexity_per_token=measure.perplexity_per_token,
            heldout_bytes=measure.heldout_bytes,
        )

    def sample(self, *, prompt: str = "", tokens: int = 80, temperature: float = 0.8) -> str:
        """Text from the client's model, or the continuation of a prompt; none where no noise covers the model."""
        if self.spec.settings.privacy.unit == "client" and not self.reports:
            return ""
        seed = derive(self.plan.config.seed, self.spec.path, "sample")
        return sample(
            self.trainer,
            self.dataset.tokenizer,
            prompt,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            opening=self.dataset.heldout[:1],
        )
