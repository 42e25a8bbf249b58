"""`worldlm evaluate --lm-eval`: EleutherAI's lm-evaluation-harness on the model of a node, or on an exported folder.

A node's model is exported for it into a temporary folder, with adapters added to the weights.
"""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldlm_ray.errors import ConfigError, DataError, RunError, WorldLMError
from worldlm_ray.experiments import harness_results
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.experiments.export import write_model
from worldlm_ray.huggingface.card import TaskResult
from worldlm_ray.huggingface.pretrained_export import ADAPTER_CONFIG
from worldlm_ray.huggingface.side_files import byte_tokenizer
from worldlm_ray.plan import rundir
from worldlm_ray.plan.kept import MODEL_CONFIG, TOKENIZER
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.tensors.buffers import params_sha256

KEY = "--lm-eval"
EXTRA = "pip install 'worldlm_ray[eval]'"
BATCH = 8
"""Sequences that are evaluated together."""
_NO_NETWORK = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError")
"""Names of errors of the libraries that fetch data."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one call."""

    node: str
    """Path of the node, or the folder."""
    rows: list[TaskResult]
    file: Path
    """Where they were written."""


def evaluate_tasks(
    place: str, tasks: str, *, node: str = "world", limit: int | None = None, on_phase: Callable[[str], None]
) -> Evaluation:
    """Measure a model on tasks of lm-evaluation-harness, and write the result to lm_eval.json.

    Args:
        place: a run's folder or name, or a folder that `worldlm export` has written.
        tasks: names with commas; one that ends in .yaml or holds a `/` is a file of tasks, or a folder of such files.
        node: path of the node, or its end; without use for an exported folder.
        limit: examples of each task, at most.
        on_phase: called with what begins.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, a task is unknown, or the model reads bytes.
        DataError: the data of a task cannot be fetched.
        RunError: there is no such run, or lm-evaluation-harness failed.
        CheckpointError: the node has no whole checkpoint, or has diverged.
    """
    with _model(place, node) as model:
        on_phase("reading the tasks")
        names, manager = _tasks(tasks)
        on_phase(f"evaluating {model.node} on {', '.join(names)}")
        results = _run(model.folder, names, manager, limit)
    rows = harness_results.rows_of(results)
    version = str(results.get("lm_eval_version", ""))
    harness_results.write(model.home, model.node, model.sha, rows, version=version)
    return Evaluation(node=model.node, rows=rows, file=model.home / harness_results.FILE)


@dataclass(frozen=True, kw_only=True)
class _Exported:
    """A model in a folder."""

    folder: Path
    node: str
    sha: str | None
    home: Path
    """Folder for lm_eval.json."""


@contextmanager
def _model(place: str, node: str) -> Iterator[_Exported]:
    folder = expanded(place)
    if not (folder / rundir.CONFIG).is_file() and any((folder / n).is_file() for n in (MODEL_CONFIG, ADAPTER_CONFIG)):
        if not (folder / MODEL_CONFIG).is_file():
            got = f"{folder} holds an adapter without its base model"
            raise ConfigError("RUN", got, "give the run, or a folder that `worldlm export --merge` has written")
        tokenizer = folder / TOKENIZER
        if not tokenizer.is_file() or tokenizer.read_bytes() == byte_tokenizer():
            raise _bytes_refused()
        yield _Exported(folder=folder, node=folder.name, sha=None, home=folder)
        return
    plan = rundir.reopen(place, check_data=False)
    spec = plan.find(node)
    if plan.tokenizer == "bytes":
        raise _bytes_refused()
    found = sound_theta(plan, spec)
    with tempfile.TemporaryDirectory(prefix="worldlm-lm-eval-") as temporary:
        made = Path(temporary)
        write_model(plan, spec, found, made, merge=plan.shape.has_adapters)
        yield _Exported(folder=made, node=spec.path, sha=params_sha256(found), home=plan.run_dir)


def _bytes_refused() -> ConfigError:
    got = "the model reads bytes, and that tokenizer has no token that begins or ends a text"
    return ConfigError(KEY, got, "train with a tokenizer.json (data.tokenizer)")


def _tasks(given: str) -> tuple[list[str], Any]:
    """Names of tasks, and lm-evaluation-harness's index of them."""
    manager_of = _task_manager()
    parts = [part for part in map(str.strip, given.split(",")) if part]
    if not parts:
        raise ConfigError(KEY, "names no task", "give names with commas between them, or a YAML of tasks")
    is_path = {part: part.endswith((".yaml", ".yml")) or "/" in part for part in parts}
    paths = {part: expanded(part).absolute() for part in parts if is_path[part]}
    folders = [path if path.is_dir() else path.parent for path in paths.values()]
    # To read lm-evaluation-harness's thousands of tasks takes half a minute.
    manager = manager_of(include_path=list(map(str, folders)), include_defaults=not all(is_path.values()))
    names = list[str]()
    for part in parts:
        names += _of_path(paths[part], manager_of) if is_path[part] else _named(part, manager)
    return list(dict.fromkeys(names)), manager


def _task_manager() -> Any:
    from worldlm_ray.model.pretrained import import_transformers

    import_transformers()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(KEY, "lm-evaluation-harness is not installed", EXTRA) from error
    return TaskManager


def _of_path(path: Path, manager_of: Any) -> list[str]:
    """Names of the tasks that a file, or the files of a folder, define."""
    if not path.exists():
        raise ConfigError(KEY, f"there is no {path}", "give a YAML of tasks, or a folder of such files")
    index = manager_of(include_path=str(path if path.is_dir() else path.parent), include_defaults=False)
    if path.is_dir():
        names = list(index.all_subtasks)
    else:
        entries = index.task_index.items()
        names = [name for name, entry in entries if entry.yaml_path and entry.yaml_path.resolve() == path.resolve()]
    if not names:
        raise ConfigError(KEY, f"{path} defines no task", "give a file in lm-evaluation-harness's form of a task")
    return names


def _named(name: str, manager: Any) -> list[str]:
    found = list(manager.match_tasks([name]))
    if not found:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        cure = f"near to it are {', '.join(near)}" if near else "`lm_eval ls tasks` lists them"
        raise ConfigError(KEY, f"lm-evaluation-harness has no task {name!r}", cure)
    return found


def _run(folder: Path, names: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
    import lm_eval
    import torch

    arguments = {"pretrained": str(folder), "dtype": "float32"}
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the result
            found: dict[str, Any] = lm_eval.simple_evaluate(
                model="hf",
                model_args=arguments,
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                batch_size=BATCH,
                device="cuda" if torch.cuda.is_available() else "cpu",
                log_samples=False,
            )
    except Exception as error:  # tasks, their data and their metrics raise errors of many kinds
        raise _failure(error, names) from error
    return found


def _failure(error: BaseException, names: Sequence[str]) -> WorldLMError:
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError) or type(cause).__name__ in _NO_NETWORK:
            cure = "try with a network, or give a YAML of tasks on local files"
            return DataError(f"{KEY}: the data of {', '.join(names)} cannot be fetched ({detail}); {cure}")
        cause = cause.__cause__ or cause.__context__
    return RunError(f"{KEY}: lm-evaluation-harness failed ({detail}); change the tasks")
