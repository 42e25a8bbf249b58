"""Reading and writing a configuration.

`load` turns a preset's name or a YAML file, plus `key=value` overrides, into a `RunConfig`. OmegaConf applies the
overrides and resolves ${...}; `config/values.py` checks every value against the schema. Whatever is wrong raises one
`ConfigError` that names the dotted key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldlm_ray.config.checks import check_run
from worldlm_ray.config.rule_files import is_file
from worldlm_ray.config.rule_files import load as load_rules
from worldlm_ray.config.schema import INHERITED, BudgetConfig, DataConfig, NodeSettings, RunConfig
from worldlm_ray.config.values import Problems, converted, hints_of, merged, one_of
from worldlm_ray.config.yaml_text import Document, value_of
from worldlm_ray.errors import ConfigError
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.filesystem import expanded

T = TypeVar("T")


def presets() -> dict[str, Path]:
    """Name and file of every configuration that ships with the package."""
    folder = Path(str(resources.files("worldlm_ray.conf"))) if _installed_conf() else _source_conf()
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _source_conf() -> Path:
    return Path(__file__).resolve().parents[2] / "conf"


def _installed_conf() -> bool:
    # In a source checkout conf/ lies beside the package; in a wheel it is the package worldlm_ray.conf.
    return not (_source_conf() / "quickstart.yaml").is_file()


def find(conf: str) -> Path:
    """The file behind a preset's name or a path.

    Raises:
        ConfigError: there is neither a file nor a preset of that name.
    """
    path = filesystem.place(conf) if "://" in conf else expanded(conf)
    if path.suffix in (".yaml", ".yml"):
        with filesystem.refusals(path):
            if path.is_file():
                return path
        raise ConfigError("CONF", f"there is no file {conf!r}", "give the path of a YAML file or a preset's name")
    known = presets()
    if conf in known:
        return known[conf]
    raise ConfigError("CONF", f"there is no preset {conf!r}", one_of(conf, list(known)))


def load(
    conf: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RunConfig:
    """Read a configuration and apply `key=value` overrides.

    Args:
        conf: a preset's name (`quickstart`), the path of a YAML file, or what such a file holds.
        overrides: such as `training.lr=1e-3` or `world.children[0].training.local_steps=20`.
        run_dir: folder of the run, taken as it is: a path is neither YAML nor an interpolation.
        say: told what an override replaces without naming it.

    Raises:
        ConfigError: one problem, by its dotted key.
    """
    raw = OmegaConf.create(_mapping_of(read(conf), conf) if isinstance(conf, str) else dict(conf))
    if isinstance(conf, str) and "name" not in raw:
        raw["name"] = find(conf).stem
    for text in overrides:
        override(raw, text)
    for note in _one_budget(raw, overrides):
        say(note)
    config = from_mapping(raw, run_dir=run_dir, beside=find(conf).parent if isinstance(conf, str) else None)
    return config if run_dir is None else replace(config, run_dir=run_dir)


def read(conf: str) -> Document:
    """The YAML document behind a preset's name or a path, with the lines of its entries.

    Raises:
        ConfigError: there is none, or it is no YAML.
    """
    path = find(conf)
    try:
        with filesystem.refusals(path):
            return Document(path.read_text(encoding="utf-8"), RunConfig, hint_of)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).replace("<unicode string>", "it").split())
        raise ConfigError(str(path), f"is not valid YAML ({detail})", "mend the file") from error


def _mapping_of(document: Document, conf: str) -> dict[str, Any]:
    found = {} if document.value is None else document.value
    if not isinstance(found, dict):
        raise ConfigError(str(find(conf)), "is not a mapping of keys", "start from conf/quickstart.yaml")
    return found


def _one_budget(raw: DictConfig, overrides: Sequence[str]) -> list[str]:
    """A budget of another kind on the command line takes the place of the file's; returns what to say about it."""
    given = [text.partition("=")[0].strip() for text in overrides]
    kinds = [f.name for f in fields(BudgetConfig)]
    budget = raw.get("budget")
    chosen = [kind for kind in kinds if f"budget.{kind}" in given and budget.get(kind) is not None]
    if len(chosen) != 1:
        return []
    replaced = [kind for kind in kinds if f"budget.{kind}" not in given and budget.get(kind) is not None]
    for kind in replaced:
        budget[kind] = None
    return [f"budget.{chosen[0]} on the command line takes the place of budget.{kind}" for kind in replaced]


def from_mapping(
    raw: DictConfig | dict[str, Any], *, resolved: bool = False, run_dir: str | None = None, beside: Path | None = None
) -> RunConfig:
    """Check a mapping against the schema and return the configuration.

    Args:
        raw: the mapping.
        resolved: whether ${...} in it is text, as in what `to_mapping` returns, and no reference to another key.
        run_dir: folder of an existing run, which may have moved; the mapping's unless given.
        beside: folder of the file that the mapping comes from: files of `rules` may lie there.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value, by its dotted key.
        ConfigErrors: several of them.
    """
    mapping = raw if resolved and isinstance(raw, dict) else _resolved(raw)
    problems = Problems()
    with problems.kept():
        mapping = _with_rules(mapping, run_dir, beside)
    config = merged(RunConfig(), mapping, prefix="", problems=problems)
    check_run(config, problems)
    problems.check()
    return config


def _with_rules(mapping: dict[str, Any], run_dir: str | None, beside: Path | None) -> dict[str, Any]:
    """Import the rules that a mapping names, before names are checked; returns the mapping with their paths."""
    if not mapping.get("rules"):
        return mapping
    rules: list[str] = converted(mapping["rules"], list[str], "rules")
    if beside is not None:
        there = [rule for rule in rules if is_file(rule) and (beside / rule).is_file()]
        rules = [str(beside / rule) if rule in there else rule for rule in rules]
    kept = mapping.get("kept")
    load_rules(rules, kept if isinstance(kept, dict) else {}, run_dir or mapping.get("run_dir"))
    return mapping | {"rules": rules}


def _resolved(raw: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """Plain containers with every ${...} replaced by what it refers to."""
    found = raw if isinstance(raw, DictConfig) else OmegaConf.create(raw)
    for name in found:
        if OmegaConf.is_missing(found, name):
            key = str(name)
            raise ConfigError(key, "has no value", f"give it one, such as {key}=... on the command line")
    try:
        container = OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "config")
        message = str(getattr(error, "msg", None) or error).splitlines()[0].strip()
        raise ConfigError(key, message, "set that key") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def merge_into(settings: T, overrides: Any, *, prefix: str) -> T:
    """Merge a mapping into a frozen dataclass, checking keys and types.

    Args:
        settings: the dataclass instance that gives keys, types and defaults.
        overrides: a mapping with some of its keys.
        prefix: dotted key of the mapping itself, for messages.

    Raises:
        ConfigError: names `prefix` and the key.
    """
    problems = Problems()
    found = merged(settings, overrides, prefix=prefix, problems=problems)
    problems.check()
    return found


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain containers, ready for YAML, JSON or another process."""
    return asdict(config)


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML: the whole file or nothing."""
    filesystem.replace_text(path, to_yaml(config))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_mapping(config))))


def _escaped(value: Any) -> Any:
    """Text with ${ in it, written so that it is read as text again."""
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """An entry of the tree with `key=value` overrides applied.

    Raises:
        ConfigError: an override is none.
    """
    found = OmegaConf.create(_escaped(raw))
    for text in overrides:
        override(found, text, Node)
    return _resolved(found)


def override(raw: DictConfig, text: str, hint: Any = RunConfig) -> None:
    """Apply one `key=value` override in place.

    Args:
        raw: the mapping.
        text: the override.
        hint: what the mapping is: a RunConfig, or a Node of its tree.

    Raises:
        ConfigError: the text is no override, or the key is not there.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(text, "is not an override", "write key=value, such as training.lr=1e-3")
    try:
        for part in re.findall(r"[^.\[\]]+", key):
            hint = hint_of(hint, int(part) if part.isdigit() else part)
        OmegaConf.update(raw, key, value_of(value, hint, hint_of), merge=True, force_add=True)
    except Exception as error:
        detail = " ".join(str(error).split("\n    full_key")[0].split()) if str(error) else type(error).__name__
        raise ConfigError(key, f"cannot be overridden ({detail})", "check the key with `worldlm show CONF`") from error


class Node:
    """An entry of the tree as YAML has it: the types of its keys. Only they are used."""

    world: str
    federation: str
    client: str
    member: str
    required: bool
    update_tokens: int
    children: list[Node]
    copies: int
    min_clients: int
    max_clients: int


def hint_of(hint: Any, key: str | int) -> Any:
    """Type of an entry of the configuration.

    Args:
        hint: type of the container.
        key: of the entry, or its index.
    """
    if isinstance(key, int):
        return get_args(hint)[0] if get_origin(hint) is list else Any
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    if hint is RunConfig and key == "world":
        return Node
    if hint is DataConfig and key == "pool":
        return list[DataConfig]
    if hint is Node and key in INHERITED:
        return hints_of(NodeSettings)[key]
    found = hints_of(hint).get(key, Any) if hint is Node or is_dataclass(hint) else Any
    words = get_origin(found) in (Literal, Annotated) or found == str | None
    return str if words else found
