"""The run folder: made for a new run, found again for an old one.

runs/NAME/
    config.yaml      the resolved configuration; it is made once, which claims the folder; its paths are absolute
    files/           copies of small files that the run goes by, such as its tokenizer.json
    run.lock         held by the process that drives the run
    summary.json     written at the end and on every clean stop
    status.json      the newest snapshot while the run lives
    audit/           one line per update accepted or refused, a file per inner node
    receipts/        signed pushes and verdicts of a border
    checkpoints/     one folder per node, and one for the recorder's incarnation
    tensorboard/
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from worldlm_ray.config.loading import load, save, to_yaml
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import ConfigError, RunError, WorldLMError
from worldlm_ray.plan import absolute, build, kept, tree
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.run_clock import seconds
from worldlm_ray.storage import checkpoint, filesystem
from worldlm_ray.storage.paths import pasted

CONFIG, STATUS, SUMMARY, LOCK, TENSORBOARD = "config.yaml", "status.json", "summary.json", "run.lock", "tensorboard"
SIMULATED = "# made by worldlm simulate: it cannot be continued\n"
"""First line of a simulation's config.yaml."""
CLAIM_TRIES = 100
_HELD: set[str] = set()
"""Folders whose lock this process has."""
_CLAIMED: dict[str, frozenset[str]] = {}
"""Folders that this process has claimed, and what of the user's lay there under names that a run writes to."""


def create(plan: Plan, *, simulated: bool = False) -> Plan:
    """Make the folder of a new run and write its configuration: both in one step, so that no two runs share a folder.

    A folder that the user did not name gets a number when the name is taken: `runs/quickstart-2`.

    Args:
        plan: the run.
        simulated: whether it is a simulation, which cannot be continued later.

    Returns:
        The plan with the folder it got, as an absolute path.

    Raises:
        RunError: the named folder already holds a run, or cannot be made.
        ConfigError: the weights that the run begins from are damaged, or a simulation's model exceeds the memory.
    """
    if simulated and plan.root.settings.simulation.train:
        build.check_memory(plan)
    build.check_initial(plan)
    settled, files = _settled(plan)
    for number in count(1):
        run_dir = plan.run_dir if number == 1 else plan.run_dir.with_name(f"{plan.run_dir.name}-{number}")
        made = replace(plan, config=replace(settled, run_dir=str(run_dir)))
        try:
            if _claimed(made, simulated=simulated):
                return _with_files(made, files)
        except OSError as error:
            why = error.strerror or str(error)
            raise RunError(f"cannot write the run folder {run_dir}: {why}; give another --run-dir") from error
        if plan.config.run_dir is not None:
            raise RunError(f"{run_dir} already holds {_taken(made)}, or give another --run-dir")
    raise AssertionError("there are always more numbers")


def _settled(plan: Plan) -> tuple[RunConfig, dict[str, bytes]]:
    """A configuration that means the same from any folder, and the files that the run is to keep copies of."""
    config = absolute.absolute(plan.config)
    tokenizer = absolute.absolute_path(plan.tokenizer)
    files = kept.collect(config, tokenizer)
    if tokenizer != "bytes" or config.model.initial_from is not None:
        config = absolute.without_tokenizers(config, tokenizer)
    config = replace(config, kept=kept.fingerprints(files))
    if config.model.initial_from is not None:
        config = replace(config, model=replace(config.model, context=plan.shape.context))
    return config, files


def _with_files(plan: Plan, files: dict[str, bytes]) -> Plan:
    """The plan of a run whose folder has just been claimed, once it holds the run's files."""
    try:
        kept.store(plan.run_dir, files)
        return make_plan(plan.config, check_data=False)
    except (OSError, WorldLMError):
        discard(plan, began=False)
        raise


def _claimed(plan: Plan, *, simulated: bool) -> bool:
    """Write config.yaml, which claims the folder; False if another run has it, or if files would be overwritten."""
    text = (SIMULATED if simulated else "") + to_yaml(plan.config)
    for _ in range(CLAIM_TRIES):
        with filesystem.refusals(plan.run_dir):
            if (plan.run_dir / CONFIG).exists() or kept.overwritten(plan.config):
                return False
            there = frozenset(name for name in (STATUS, TENSORBOARD) if (plan.run_dir / name).exists())
            filesystem.make_folder(plan.run_dir)
            try:
                filesystem.create_text(plan.run_dir / CONFIG, text)
            except FileExistsError:
                return False
            except FileNotFoundError:
                continue  # another process has just taken this folder back (`discard`)
            _CLAIMED[str(plan.run_dir)] = there
            return True
    raise OSError(errno.EAGAIN, "other processes make and remove it all the time")


def _taken(plan: Plan) -> str:
    run_dir = plan.run_dir
    if is_simulated(run_dir):
        return "a simulation, which is not continued; delete the folder"
    with suppress(OSError), filesystem.refusals(run_dir):
        if not (run_dir / CONFIG).exists() and (names := kept.overwritten(plan.config)):
            return f"{kept.FOLDER}/{names[0]}, which this run would write over; move that file away"
    return f"a run; continue it with `worldlm train --resume {pasted(run_dir)}`"


def is_simulated(run_dir: Path) -> bool:
    """Whether the run of a folder is a simulation, which is not continued."""
    if _mapping(run_dir / SUMMARY).get("backend") == "simulate":
        return True
    try:
        with filesystem.refusals(run_dir):
            return (run_dir / CONFIG).read_text(encoding="utf-8").startswith(SIMULATED)
    except (OSError, ValueError):
        return False


def discard(plan: Plan, *, began: bool | None = None) -> None:
    """Take back the folder of a run that could not begin, so that the same command can be given again.

    Only a folder that this process has claimed is taken back, and only what the run has made in it.

    Args:
        plan: the run.
        began: whether anything was trained; unless given, whether there is a status.json.
    """
    run_dir = plan.run_dir
    if str(run_dir) not in _CLAIMED or (began if began is not None else (run_dir / STATUS).exists()):
        return
    there = _CLAIMED.pop(str(run_dir))
    kept.remove(plan.config)
    if not filesystem.is_remote(run_dir):
        if TENSORBOARD not in there:
            filesystem.remove_tree(run_dir / TENSORBOARD)
        with suppress(OSError):  # it holds a file that this run did not make
            (run_dir / "audit").rmdir()
    if STATUS not in there:
        (run_dir / STATUS).unlink(missing_ok=True)
    if str(run_dir) in _HELD:
        (run_dir / LOCK).unlink(missing_ok=True)
    (run_dir / CONFIG).unlink(missing_ok=True)  # last: without it, another run may claim the folder
    if not filesystem.is_remote(run_dir):
        with suppress(OSError):
            run_dir.rmdir()


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Be the only process that drives the run of a folder, as long as the context is open.

    The lock is the operating system's: it ends with the process, however that ends. On a file system it lies in the
    folder; for an object store, which has no locks, it holds on this machine only. Within a process it is reentrant.

    Raises:
        RunError: another process drives the run.
    """
    if str(run_dir) in _HELD:
        yield
        return
    handle = _locked(run_dir)
    _HELD.add(str(run_dir))
    try:
        yield
    finally:
        _HELD.discard(str(run_dir))
        if handle is not None:
            with suppress(OSError):  # the next one may be unable to write its name over this one's
                os.truncate(handle, 0)
            os.close(handle)


@contextmanager
def held_anew(plan: Plan) -> Iterator[None]:
    """`held`, for a run that this process has just made: its folder is taken back if another process holds it.

    Raises:
        RunError: another process drives a run of this folder.
    """
    with ExitStack() as holding:
        try:
            holding.enter_context(held(plan.run_dir))
        except RunError:
            discard(plan, began=False)
            raise
        yield


def _locked(run_dir: Path) -> int | None:
    """A descriptor that holds the lock; None where the file system has no locks or cannot be written."""
    path = run_dir / LOCK
    if filesystem.is_remote(run_dir):
        mark = hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"worldlm-{os.getuid()}-{mark}.lock"
    while True:
        try:
            handle, writable = _lock_file(path)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino == path.stat().st_ino:
                if writable:
                    os.truncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        except BlockingIOError:
            who = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise RunError(
                f"{run_dir} is being run by {who}; watch it with `worldlm status {pasted(run_dir)} --watch`, "
                "or stop that process first"
            ) from None
        except FileNotFoundError:
            pass  # the folder was taken back between the two calls
        except OSError:
            os.close(handle)
            return None
        os.close(handle)  # the file was removed meanwhile: this lock would lock nothing


def _lock_file(path: Path) -> tuple[int, bool]:
    """A descriptor of the lock's file, and whether it can be written: another user's file can be locked all the same.

    Raises:
        OSError: there is no such file, and none can be made.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644), True
    except PermissionError:
        return os.open(path, os.O_RDONLY), False


def find(run: str) -> Path:
    """The folder of a run, given its path or its name under `runs/`.

    Raises:
        RunError: there is no such run.
    """
    for path in [filesystem.place(run)] if "://" in run else [filesystem.place(run), filesystem.place(f"runs/{run}")]:
        try:
            with filesystem.refusals(path):
                if (path / CONFIG).is_file():
                    return path
        except OSError as error:
            raise RunError(f"cannot read {path}: {error}; make it readable, or give another run") from error
    known = sorted(path.parent.name for path in Path("runs").glob(f"*/{CONFIG}"))
    there = f"runs/ holds {', '.join(known)}" if known else "runs/ holds none yet"
    raise RunError(f"there is no run {run!r}; give its folder or its name ({there})")


def reopen(run: str, overrides: list[str] | None = None, *, check_data: bool = True) -> Plan:
    """The plan of an existing run, wherever its folder lies now.

    Args:
        run: its folder, or its name under `runs/`.
        overrides: `key=value` changes, such as a larger budget.
        check_data: False where the run's text is not needed.
    """
    run_dir = find(run)
    for key in (text.partition("=")[0].strip() for text in overrides or []):
        if key in ("model", "model.initial_from", "kept", "data", "rules") or key.rsplit(".", 1)[-1] == "tokenizer":
            raise ConfigError(key, "belongs to what the run began with", "leave it out, or begin a new run")
    config = load(str(run_dir / CONFIG), overrides or [], run_dir=str(run_dir))
    return make_plan(absolute.absolute(config), check_data=check_data)


def renewed(plan: Plan) -> Plan:
    """The plan with the tree that the run's folder has now: nodes may have joined or left since it was made.

    The model and the tokenizer of a run do not change, so that neither is read again.

    Raises:
        RunError, ConfigError: the folder cannot be read.
    """
    config = absolute.absolute(load(str(find(str(plan.run_dir)) / CONFIG), run_dir=str(plan.run_dir)))
    data = replace(config.data, tokenizer=plan.root.settings.data.tokenizer)
    return replace(plan, config=config, root=tree.build(replace(config, data=data)))


def resume(run: str, overrides: list[str], *, check_data: bool = True) -> Plan:
    """The plan of a run that is to go on; changes are written to its config.yaml.

    Its summary.json stays until its nodes have started (`forget_end`).

    Args:
        run: its folder, or its name under `runs/`.
        overrides: `key=value` changes, such as a larger budget.
        check_data: False where the files need not be on this machine.

    Raises:
        RunError: the run has ended at its full budget, and the budget is not changed; or it is a simulation.
    """
    plan = reopen(run, overrides, check_data=check_data)
    summary = _mapping(plan.run_dir / SUMMARY)
    if is_simulated(plan.run_dir):
        raise RunError(f"{plan.run_dir} is a simulation, which is not continued; start it again")
    if not overrides and summary.get("status") == "finished" and _is_same(plan, summary.get("budget")):
        raise RunError(
            f"{plan.run_dir} has ended at its full budget; to train on, give a larger one, "
            "such as budget.tokens=... or budget.rounds=..."
        )
    if overrides:
        save(plan.config, plan.run_dir / CONFIG)
    return plan


def _is_same(plan: Plan, budget: Any) -> bool:
    """Whether a run has the budget that a summary speaks of; an earlier attempt to resume it may have changed it."""
    own = {unit: amount for unit, amount in asdict(plan.config.budget).items() if amount is not None}
    return not isinstance(budget, dict) or own.items() <= {unit: budget.get(unit) for unit in own}.items()


def forget_end(run_dir: Path) -> None:
    """Remove the summary of the part before: the nodes have started, so that the run is no longer at its end.

    Raises:
        RunError: the storage refuses.
    """
    try:
        with filesystem.refusals(run_dir):
            (run_dir / SUMMARY).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot remove {run_dir / SUMMARY}: {error}; free the storage, then resume the run") from error


def run_time_s(run_dir: Path) -> float:
    """Run time at which a run was last heard of: by its status, or by the world's checkpoint if that is newer.

    Both are written about as things happen: the run may have gone on for a little longer.

    Returns:
        Seconds; 0 for a run that has not begun.
    """
    status = seconds(_mapping(run_dir / STATUS).get("now_s"))
    return max(status, seconds(checkpoint.newest_meta(checkpoint.folder(run_dir, "world")).get("now_s")))


def _mapping(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is not there, or holds no mapping."""
    try:
        with filesystem.refusals(path):
            found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
