"""The privacy account of a client, by the plan and its text."""

from __future__ import annotations

from worldlm_ray.data import Dataset
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account, ledger_folder
from worldlm_ray.privacy.ledger import Ledger


def open_account(plan: Plan, spec: NodeSpec, dataset: Dataset) -> Account | None:
    """What a client may spend of its text's privacy; None of a client that makes no promise about records.

    Raises:
        ConfigError: the text has fewer records than a step takes.
        PrivacyError: no noise keeps the planned rounds within the budget, or the ledger is damaged.
    """
    privacy, training = spec.settings.privacy, spec.settings.training
    if privacy.unit != "record":
        return None
    records = dataset.records(context=plan.shape.context)
    if records < training.batch_size:
        got = f"{training.batch_size} of {records} records ({plan.shape.context + 1} tokens each)"
        raise ConfigError(f"{spec.key}.training.batch_size", got, "lower it, or give the client more text")
    return Account(
        privacy,
        Ledger(ledger_folder(privacy, plan.run_dir), unit=privacy.unit, text=dataset.fingerprint),
        rate=training.batch_size / records,
        steps=training.local_steps,
        rounds=plan.planned_rounds(spec),
        node=spec.path,
        run=plan.config.name,
        key=f"{spec.key}.privacy",
    )
