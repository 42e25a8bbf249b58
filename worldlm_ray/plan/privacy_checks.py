"""Rules of privacy: what a promise needs, what may stand below it, and what its noise does not cover."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from worldlm_ray.config.schema import SMALLEST_PRV_NOISE, PrivacyConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.storage.filesystem import expanded

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan
    from worldlm_ray.plan.tree import NodeSpec


# ---- the settings of one node ------------------------------------------------------------------------------------


def absolute_ledger(plan: Plan) -> Iterable[ConfigError]:
    """A ledger adds up what all runs on a text have spent: each of them must find the same folder."""
    for at, settings in plan.settings_in_force:
        folder = settings.privacy.ledger_dir
        if folder is not None and not expanded(folder).is_absolute():
            got = f"{folder!r} would be another folder, and an empty ledger, for a run that starts elsewhere"
            yield ConfigError(f"{at}privacy.ledger_dir", got, "give an absolute path")


def counted_updates(plan: Plan) -> Iterable[ConfigError]:
    """Only client-level noise is spent by the update; DP-SGD spends by the step."""
    for at, settings in plan.settings_in_force:
        if settings.privacy.max_updates is not None and settings.privacy.unit != "client":
            got = f"is set, but privacy.unit is {settings.privacy.unit}"
            yield ConfigError(f"{at}privacy.max_updates", got, "only unit client counts updates: remove it")


def prv_noise(plan: Plan) -> Iterable[ConfigError]:
    """The prv accountant's grid grows as the noise shrinks: minutes and gigabytes below SMALLEST_PRV_NOISE."""
    for at, settings in plan.settings_in_force:
        privacy = settings.privacy
        noise, used = privacy.noise_multiplier, (privacy.unit, privacy.accountant) == ("record", "prv")
        if noise is not None and noise < SMALLEST_PRV_NOISE and used:
            got = f"got {noise:g}, for which accountant prv takes minutes and gigabytes"
            cure = f"give {SMALLEST_PRV_NOISE:g} or more, or use accountant rdp"
            yield ConfigError(f"{at}privacy.noise_multiplier", got, cure)


def pausing_clients(plan: Plan) -> Iterable[ConfigError]:
    """Only the owner of a budget can stop spending it and go on."""
    for at, settings in plan.settings_in_force:
        if settings.privacy.on_exhausted == "pause" and settings.privacy.unit != "record":
            got = (
                f"pause, but privacy.unit is {settings.privacy.unit}: only a client that keeps its own budget can pause"
            )
            yield ConfigError(f"{at}privacy.on_exhausted", got, "remove it, or set privacy.unit to record")


def promise_with_noise(plan: Plan) -> Iterable[ConfigError]:
    """A promise follows from its noise, or its noise from the epsilon that is promised: one must be given."""
    for at, settings in plan.settings_in_force:
        privacy = settings.privacy
        chosen = privacy.target_epsilon is not None or privacy.noise_multiplier is not None
        if privacy.unit != "none" and not chosen:
            got = "neither target_epsilon nor noise_multiplier is set"
            yield ConfigError(f"{at}privacy", got, "set one of them, or both")
        if privacy.unit == "none" and chosen:
            name = "target_epsilon" if privacy.target_epsilon is not None else "noise_multiplier"
            cure = "set privacy.unit to record or client"
            yield ConfigError(f"{at}privacy.{name}", "is set, but privacy.unit is none", cure)


# ---- what is promised above --------------------------------------------------------------------------------------


def stricter_below(plan: Plan) -> Iterable[ConfigError]:
    """A node below one that promises privacy may promise more, never less."""
    for node in plan.distinct:
        parent, own = plan.parent(node), node.settings.privacy
        above = plan.config.privacy if parent is None else parent.settings.privacy
        for name in weaker(own, above):
            got = f"{getattr(own, name)} weakens the promise of the node above, {getattr(above, name)}"
            yield ConfigError(f"{node.key}.privacy.{name}", got, "remove it")


def weaker(child: PrivacyConfig, parent: PrivacyConfig) -> list[str]:
    """Names of the values of a node that would weaken its parent's promise."""
    if parent.unit == "none":
        return []
    found = {
        "unit": child.unit != parent.unit,
        "target_epsilon": parent.target_epsilon is not None
        and (child.target_epsilon is None or child.target_epsilon > parent.target_epsilon),
        "noise_multiplier": parent.noise_multiplier is not None
        and (child.noise_multiplier is None or child.noise_multiplier < parent.noise_multiplier),
        "delta": child.delta > parent.delta,
        "max_updates": parent.max_updates is not None
        and (child.max_updates is None or child.max_updates > parent.max_updates),
        "report_metrics": child.report_metrics and not parent.report_metrics,
        "ledger_dir": child.ledger_dir != parent.ledger_dir,
    }
    return [name for name, is_weaker in found.items() if is_weaker]


def kept_by_an_aggregator(plan: Plan) -> Iterable[ConfigError]:
    """Privacy of whole clients is kept by the aggregator above them: a client cannot promise it to itself."""
    for parent, client in plan.distinct_clients:
        above = parent.settings.privacy
        if client.settings.privacy.unit == "client" and above.unit != "client":
            got = f"client, but nothing above keeps it: {parent.path} promises {above.unit}"
            yield ConfigError(f"{client.key}.privacy.unit", got, f"set the privacy section at {parent.key}")


def one_promise_per_aggregator(plan: Plan) -> Iterable[ConfigError]:
    """One clipping bound and one noise are made for the sum over all clients of an aggregator."""
    for parent, client in plan.distinct_clients:
        own, above = client.settings.privacy, parent.settings.privacy
        if own.unit == above.unit == "client" and own != above:
            got = f"differs from that of {parent.path}, which clips and counts for all of its clients alike"
            yield ConfigError(f"{client.key}.privacy", got, f"set it at {parent.key}, or give the client a federation")


# ---- what noise on whole updates does not cover ------------------------------------------------------------------


def _client_level(plan: Plan) -> Iterable[NodeSpec]:
    return [node for node in plan.distinct_inner if node.settings.privacy.unit == "client"]


def no_refusal_by_norm(plan: Plan) -> Iterable[ConfigError]:
    """Whether an update is refused would be one bit about its norm, outside of the noise."""
    for node in _client_level(plan):
        if node.settings.aggregation.max_update_norm is not None:
            got = "whether an update is refused would tell its norm, which no noise covers"
            cure = "remove it: updates are clipped anyway"
            yield ConfigError(f"{node.key}.aggregation.max_update_norm", got, cure)


def no_residuals_of_private_clients(plan: Plan) -> Iterable[ConfigError]:
    """A residual is a single client's key layer, and not a sum with noise."""
    for node in _client_level(plan):
        if node.settings.aggregation.residuals.per_round:
            got = "residuals are single clients' key layers, which no noise covers"
            cure = "set it to 0 under client-level privacy"
            yield ConfigError(f"{node.key}.aggregation.residuals.per_round", got, cure)


def noise_is_for_a_sum(plan: Plan) -> Iterable[ConfigError]:
    """The noise is scaled to what one client changes in a sum; a median has another sensitivity."""
    for node in _client_level(plan):
        rule = node.settings.aggregation.robust.rule
        if rule != "none":
            cure = "set it to none under client-level privacy"
            yield ConfigError(
                f"{node.key}.aggregation.robust.rule", f"{rule} is no sum, for which the noise is made", cure
            )


def planned_updates(plan: Plan) -> Iterable[ConfigError]:
    """Noise follows from epsilon and the number of updates, which a budget of seconds does not give."""
    for node in _client_level(plan):
        privacy = node.settings.privacy
        if privacy.noise_multiplier is None and privacy.max_updates is None and plan.config.budget.seconds is not None:
            got = "is not set, and a budget of seconds does not say how many updates there will be"
            yield ConfigError(f"{node.key}.privacy.noise_multiplier", got, "set it, or privacy.max_updates")


# ---- what DP-SGD cannot be combined with -------------------------------------------------------------------------


def _record_level(plan: Plan) -> Iterable[NodeSpec]:
    return [client for _, client in plan.distinct_clients if client.settings.privacy.unit == "record"]


def planned_steps(plan: Plan) -> Iterable[ConfigError]:
    """Noise follows from epsilon and the number of steps, which a budget of seconds does not give."""
    for client in _record_level(plan):
        if client.settings.privacy.noise_multiplier is None and plan.config.budget.seconds is not None:
            got = "is not set, and a budget of seconds does not say how many steps there will be"
            cure = "set it, or give the budget in rounds or tokens"
            yield ConfigError(f"{client.key}.privacy.noise_multiplier", got, cure)


def one_private_text(plan: Plan) -> Iterable[ConfigError]:
    """A ledger belongs to one text; a step on a pool spends from several."""
    for client in _record_level(plan):
        if client.settings.data.pool:
            got = "a pool draws from several texts in every step, whose ledgers differ"
            yield ConfigError(f"{client.key}.data.pool", got, "give a private client one text")


def gradients_per_record(plan: Plan) -> Iterable[ConfigError]:
    """Checkpointed activations are computed in a second pass, where no per-record gradient can be taken."""
    for client in _record_level(plan):
        if client.settings.training.activation_checkpointing:
            got = "true: layers that are computed twice hide their per-record gradients"
            key = f"{client.key}.training.activation_checkpointing"
            yield ConfigError(key, got, "switch it off for private clients")


def lockable_ledger(plan: Plan) -> Iterable[ConfigError]:
    """Two writers of a ledger would each miss what the other has spent; object stores have no locks."""
    if "://" not in (plan.config.run_dir or ""):
        return
    for node in plan.distinct:
        if node.settings.privacy.unit != "none" and node.settings.privacy.ledger_dir is None:
            got = "an object store cannot lock a ledger against a second writer"
            yield ConfigError(f"{node.key}.privacy.ledger_dir", got, "give a folder on a file system")


def privacy_of_trained_clients(plan: Plan) -> Iterable[ConfigError]:
    """The cost model reads no text, so that nothing is spent."""
    for node in plan.distinct:
        unit = node.settings.privacy.unit
        if not node.settings.simulation.train and unit != "none":
            got = f"{unit}, but simulation.train is false: without text and updates nothing is spent"
            yield ConfigError(f"{node.key}.privacy.unit", got, "leave privacy out of a simulation without training")


RULES = (
    absolute_ledger,
    counted_updates,
    prv_noise,
    pausing_clients,
    promise_with_noise,
    stricter_below,
    no_refusal_by_norm,
    no_residuals_of_private_clients,
    noise_is_for_a_sum,
    planned_updates,
    kept_by_an_aggregator,
    one_promise_per_aggregator,
    planned_steps,
    one_private_text,
    gradients_per_record,
    lockable_ledger,
    privacy_of_trained_clients,
)
