"""Modules and files of a user that add to the registries: `rules` of a configuration.

    rules: [my_package.my_module, my_rule.py]

A module is imported as Python finds it, so that it must be installed on every machine. A file, whose name ends in .py,
is copied into the folder of a new run. Every process of the run reads that copy and checks its fingerprint, so that a
resumed run computes what it computed before. Either is code that runs with the rights of the process: docs/trust.md.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from worldlm_ray.config.values import Problems
from worldlm_ray.errors import ConfigError
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.filesystem import expanded

FOLDER = "files"
"""Folder in a run's folder that holds its copies."""
PREFIX = "worldlm_rules_"
"""Of the names under which files are imported."""
_EXECUTED = dict[str, str]()
"""Fingerprint of what this process has executed, by the file's name."""


def is_file(rule: str) -> bool:
    """Whether an entry of `rules` is a file and no module."""
    return rule.endswith(".py")


def file_name(rule: str) -> str:
    """The name of the copy of a file."""
    return rule.replace("\\", "/").rsplit("/", 1)[-1]


def fingerprint(contents: bytes) -> str:
    """Of a file's contents."""
    return hashlib.blake2b(contents, digest_size=16).hexdigest()


def read(rule: str) -> bytes:
    """The contents of a file that `rules` names.

    Raises:
        OSError: it cannot be read.
    """
    path = filesystem.place(rule) if "://" in rule else expanded(rule)
    with filesystem.refusals(path):
        return path.read_bytes()


def load(rules: Sequence[str], kept: Mapping[str, str], run_dir: str | None) -> None:
    """Import every module and file, each once in a process unless its contents have changed.

    Args:
        rules: as the configuration names them.
        kept: fingerprints of the run's copies, by file name; empty before a run is made.
        run_dir: the run's folder.

    Raises:
        ConfigError: one of them cannot be imported.
        ConfigErrors: several of them.
    """
    problems, names = Problems(), [file_name(rule) for rule in rules if is_file(rule)]
    for place, rule in enumerate(rules):
        key = f"rules[{place}]"
        with problems.kept():
            if not is_file(rule):
                _import(rule, key)
            elif names.count(file_name(rule)) > 1:
                raise ConfigError(key, f"{rule!r} has the name of another file", "rename one of them")
            else:
                _execute(rule, kept.get(file_name(rule)), run_dir, key)
    problems.check()


def _import(rule: str, key: str) -> None:
    try:
        import_module(rule)
    except Exception as error:
        cure = "install it on every machine of the run, or give the path of one .py file"
        raise ConfigError(key, f"{rule!r} cannot be imported ({_detail(error)})", cure) from error


def _execute(rule: str, expected: str | None, run_dir: str | None, key: str) -> None:
    name = file_name(rule)
    if expected is not None and run_dir is not None:
        rule = str(filesystem.place(run_dir) / FOLDER / name)
    try:
        contents = read(rule)
    except OSError as error:
        got, cure = f"{rule!r} cannot be read ({error.strerror or error})", "give the path of a Python file"
        raise ConfigError(key, got, cure if expected is None else "restore the file of this run") from error
    found = fingerprint(contents)
    if expected not in (None, found):
        raise ConfigError(key, f"{rule!r} has changed since the run was made", "restore the file of this run")
    if _EXECUTED.get(name) == found or _is_program(contents):
        return
    module = ModuleType(PREFIX + Path(name).stem)
    module.__file__ = rule
    sys.modules[module.__name__] = module  # dataclasses of the file look themselves up there
    try:
        exec(compile(contents, rule, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise ConfigError(key, f"{rule!r} cannot be imported ({_detail(error)})", "mend the file") from error
    _EXECUTED[name] = found


def _is_program(contents: bytes) -> bool:
    """Whether the program that runs is the file itself, whose rules are registered already."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    return program is not None and Path(program).is_file() and Path(program).read_bytes() == contents


def _detail(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
