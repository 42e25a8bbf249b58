"""A run that has a folder, living or ended: its results, its curves and its models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldlm_ray.config.loading import to_mapping
from worldlm_ray.errors import RunError
from worldlm_ray.plan import rundir
from worldlm_ray.reports.notebook import as_html
from worldlm_ray.reports.tables import final_table, live_table
from worldlm_ray.tracking import curves
from worldlm_ray.tracking.status import read_status

if TYPE_CHECKING:
    import torch


class Run:
    """A run, by its folder. Everything is read from there when it is asked for.

        run = worldlm_ray.load("quickstart")
        run.summary["nodes"]["world"]["loss"]
        run.metrics(node="world", name="loss").plot(x="tokens", y="value")
        run.model("world/europe")

    Args:
        folder: of the run.
        samples: texts that the clients' models wrote at its end, by path.
    """

    def __init__(self, folder: Path, samples: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.samples = samples or {}

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration, with all defaults."""
        return to_mapping(rundir.reopen(str(self.folder), check_data=False).config)

    @property
    def nodes(self) -> list[str]:
        """Paths of all nodes, parents first."""
        return list(rundir.reopen(str(self.folder), check_data=False).kinds)

    @property
    def status(self) -> dict[str, Any]:
        """The newest snapshot, the content of status.json.

        Raises:
            RunError: the run has not begun.
        """
        return read_status(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """The result of the run, the content of summary.json: losses in nats per byte under `nodes`.

        Raises:
            RunError: the run has not ended, or the file cannot be read.
        """
        path = self.folder / rundir.SUMMARY
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{path} does not exist: the run has not ended; read `status` instead") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); resume the run to write it again") from error
        if not isinstance(found, dict):
            raise RunError(f"{path} holds a {type(found).__name__}, not a mapping; resume the run to write it again")
        return found

    def metrics(self, *, node: str | None = None, name: str | None = None) -> Any:
        """The curves of the run, one row per value.

        Columns: `now_s` (run time in seconds), `tokens` (trained so far), `node`, `name` (such as `loss`, in nats per
        byte), `value`.

        Args:
            node: only of this node, by its path.
            name: only of this quantity.

        Returns:
            A pandas DataFrame, or a list of dicts where pandas is not installed.
        """
        return as_table(
            line
            for line in curves.read(self.folder)
            if (node is None or line.get("node") == node) and (name is None or line.get("name") == name)
        )

    def model(self, node: str = "world") -> torch.nn.Module:
        """A node's model, from its newest checkpoint.

        Args:
            node: its path, or the end of it, such as `europe`.

        Returns:
            transformers' model for a run with `model.backend: transformers`; otherwise a module that gives
            logits [B, T, V] from token ids [B, T]. It is in evaluation mode, in fp32.

        Raises:
            ConfigError: there is no such node.
            CheckpointError: it has no whole checkpoint.
        """
        from worldlm_ray.experiments.evaluate import model

        return model(str(self.folder), node)

    def sample(
        self, node: str = "world", *, prompt: str = "", tokens: int = 200, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """Text that a node's model writes after a prompt.

        Raises:
            ConfigError: there is no such node.
            CheckpointError: it has no whole checkpoint.
        """
        from worldlm_ray.experiments.evaluate import sample

        return sample(str(self.folder), node, prompt=prompt, tokens=tokens, temperature=temperature, seed=seed)

    def evaluate(self, *, tokens: int = 65_536) -> dict[str, dict[str, float | None]]:
        """Held-out quality of every node's model by path, under the names of summary.json.

        Args:
            tokens: held-out tokens per client, at most.

        Raises:
            CheckpointError: a node has no whole checkpoint.
        """
        from worldlm_ray.experiments.evaluate import evaluate, values

        return values(evaluate(str(self.folder), tokens=tokens))

    def export(self, folder: str | PathLike[str], node: str = "world", *, merge: bool = False) -> Path:
        """Write a node's model as a Hugging Face folder, with its tokenizer and a model card.

        Args:
            folder: made if missing.
            node: its path, or the end of it.
            merge: of a run that trains adapters: whole weights instead of a PEFT adapter.

        Raises:
            ConfigError: there is no such node.
            CheckpointError: it has no whole checkpoint, or has diverged.
            DataError: the folder cannot be written.
        """
        from worldlm_ray.experiments.export import export

        export(str(self.folder), node, Path(fspath(folder)), merge=merge)
        return Path(fspath(folder))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """The table of the nodes, as a notebook shows it."""
        try:
            if (self.folder / rundir.SUMMARY).is_file():
                return as_html(final_table(self.summary, self.samples))
            return as_html(live_table(self.status | {"run": self.name}))
        except RunError as error:
            return as_html(str(error))


def as_table(rows: Iterable[dict[str, Any]]) -> Any:
    """Rows as a pandas DataFrame, or as a list where pandas is not installed."""
    listed = list(rows)
    try:
        import pandas
    except ImportError:
        return listed
    return pandas.DataFrame(listed)


def load(run: str | PathLike[str]) -> Run:
    """A run that exists.

        worldlm_ray.load("runs/quickstart").model("world/code")

    Args:
        run: its folder, or its name under `runs/`.

    Raises:
        RunError: there is no such run.
    """
    return Run(rundir.find(fspath(run)))
