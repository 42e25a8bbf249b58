"""Settings of trackers, which show a run, and of log lines. Neither changes what is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from worldlm_ray.config.names import SINKS

SinkName = Annotated[str, SINKS]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """The tracker `wandb`. Its key comes from `wandb login` or the variable WANDB_API_KEY, never from here."""

    project: str = "worldlm"
    entity: str | None = None
    """User or team; the account's default unless given."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to the run folder, for `wandb sync` later."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """The tracker `mlflow`. A server's password comes from MLFLOW_TRACKING_USERNAME and _PASSWORD, never from here."""

    uri: str | None = None
    """Of the server, such as http://host:5000; MLFLOW_TRACKING_URI, or what MLflow takes then, unless given."""
    experiment: str = "worldlm"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Which trackers a run is drawn to: see docs/trackers.md."""

    sinks: list[SinkName] = field(default_factory=list)
    """Names, such as [tensorboard, jsonl, wandb]. Unless given: tensorboard, jsonl, and those that `rules` add."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Log lines of every process of a run, with the path of its node: see docs/python.md."""

    level: LogLevel = "warning"
    """`info` tells of rounds and aggregations, `debug` of every record."""
