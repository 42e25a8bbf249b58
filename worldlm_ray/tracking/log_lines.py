"""Log lines of a process, by Python's `logging`, with the path of the node in each.

    2026-11-27 10:02:11 INFO world/europe/italy: RoundRecord at 12.5 s round=3 steps=150 tokens=38400 loss=2.31

Every process of a run writes them to stderr, and to RUN_DIR/logs/PATH.log where that is a local folder. Ray keeps the
stderr of its processes in its own log folder. What a node records is a line of its process.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import TextIO

from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import AggregationRecord, FinalRecord, LifeRecord, Record, RoundRecord, StartRecord
from worldlm_ray.storage import filesystem

LOG = logging.getLogger(__name__)
FORMAT = "%(asctime)s %(levelname)s %(node)s: %(message)s"
FOLDER = "logs"
LOGGERS = ("worldlm_ray", "actors")
"""What is ours; other packages' lines stay where they are."""
STEPS = (StartRecord, RoundRecord, AggregationRecord, LifeRecord, FinalRecord)
"""Records that `info` shows."""


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is now: a display on a terminal replaces it for a while."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """What stderr was when the handler was made."""


class _NodeFile(logging.FileHandler):
    """A file that is made with its folder at the first line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)

    def _open(self) -> TextIO:  # type: ignore[override]
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs log lines, nothing else."""


def set_up(level: str, node: str, run_dir: Path | None = None, *, stderr: bool = True) -> None:
    """Write this process's log lines from now on, in place of what an earlier call has set.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        node: path of the node, or what else the process is; a line about another node names that.
        run_dir: folder of the run; None writes no file.
        stderr: whether to write to stderr, too.
    """
    handlers: list[logging.Handler] = [_Stderr()] if stderr else [logging.NullHandler()]
    if run_dir is not None and not filesystem.is_remote(run_dir):
        handlers.append(_NodeFile(run_dir / FOLDER / f"{node}.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%Y-%m-%d %H:%M:%S", defaults={"node": node}))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for old in [old for old in logger.handlers if isinstance(old, _Stderr | _NodeFile | logging.NullHandler)]:
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(level.upper())


def of_node(plan: Plan, path: str) -> None:
    """Write the log lines of a node's process, at the level of its run's configuration."""
    set_up(plan.config.logging.level, path, plan.run_dir)


def of_command(plan: Plan) -> None:
    """Write the log lines of the process that drives a run. Its terminal shows warnings already."""
    level = plan.config.logging.level
    set_up(level, "command", plan.run_dir, stderr=level in ("debug", "info"))


def note(record: Record) -> None:
    """Log a record: a warning as such, a step of the run at `info`, all else at `debug`."""
    is_warning = isinstance(record, LifeRecord) and record.event == "warning"
    level = logging.WARNING if is_warning else logging.INFO if isinstance(record, STEPS) else logging.DEBUG
    if LOG.isEnabledFor(level):
        known = [(each.name, getattr(record, each.name)) for each in fields(record)]
        said = [f"{name}={value}" for name, value in known if name not in ("node", "now_s") and value is not None]
        text = f"{type(record).__name__} at {record.now_s:.1f} s {' '.join(said)}"
        LOG.log(level, "%s", text, extra={"node": record.node})
