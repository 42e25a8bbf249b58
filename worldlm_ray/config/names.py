"""The registries of what a configuration chooses by name.

They stand below the modules that register, so that the schema can check names. Those modules are imported at the
first use of a registry: to import the schema costs neither them nor numpy. Their decorators give the types.
"""

from __future__ import annotations

from typing import Any

from worldlm_ray.config.registry import Registry

STALENESS: Registry[Any] = Registry(
    "staleness function", "aggregation.staleness.fn", "worldlm_ray.aggregation.staleness"
)
SCORES: Registry[Any] = Registry("score", "aggregation.attention.score", "worldlm_ray.aggregation.attention")
SERVER_OPTIMIZERS: Registry[Any] = Registry(
    "server optimizer", "aggregation.server_optimizer.name", "worldlm_ray.aggregation.server_optimizer"
)
ROBUST_RULES: Registry[Any] = Registry(
    "robust rule", "aggregation.robust.rule", "worldlm_ray.aggregation.robust_fold", off="none"
)
CODECS: Registry[Any] = Registry("codec", "exchange.codec", "worldlm_ray.exchange.compression")
AGGREGATION_RULES: Registry[Any] = Registry(
    "aggregation rule",
    "aggregation.rule",
    "worldlm_ray.aggregation.fold",
    "worldlm_ray.aggregation.capped_fold",
    "worldlm_ray.aggregation.robust_fold",
    "worldlm_ray.aggregation.ties_fold",
    "worldlm_ray.aggregation.sums_fold",
)
SINKS: Registry[Any] = Registry(
    "sink",
    "tracking.sinks",
    "worldlm_ray.tracking.tensorboard_charts",
    "worldlm_ray.tracking.curves",
    "worldlm_ray.tracking.csv_file",
    "worldlm_ray.tracking.wandb_run",
    "worldlm_ray.tracking.mlflow_run",
)
CORPORA: Registry[Any] = Registry("corpus", "data.corpus", "worldlm_ray.data.corpora")
