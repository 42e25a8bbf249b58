"""Paths in a configuration, written so that they mean the same from any folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from worldlm_ray.config.rule_files import is_file
from worldlm_ray.config.schema import RunConfig


def absolute(config: RunConfig) -> RunConfig:
    """A configuration with absolute paths of rules, data, tokenizers, a model to begin from, keys and profiles.

    They are taken from the folder where the command was given. `~` stays: on another machine it is another folder.
    """
    model, data = config.model, config.data
    if model.initial_from is not None:
        model = replace(model, initial_from=absolute_path(model.initial_from))
    changed = absolute_data(
        {"files": data.files, "tokenizer": data.tokenizer, "cache_dir": data.cache_dir, "pool": data.pool}
    )
    rules = [absolute_path(rule) if is_file(rule) else rule for rule in config.rules]
    gateway, joins = config.gateway, config.joins
    if gateway.listen is not None:
        staging = gateway.staging_dir
        staging = None if staging is None else absolute_path(staging)
        gateway = replace(gateway, dir=absolute_path(gateway.dir), staging_dir=staging)
    if joins is not None:
        joins = absolute_path(joins)
    return replace(
        config,
        rules=rules,
        model=model,
        data=replace(data, **changed),
        gateway=gateway,
        joins=joins,
        world=_each(config.world, absolute_data),
    )


def absolute_data(section: dict[str, Any]) -> dict[str, Any]:
    """A data section, or some of its keys, with absolute paths."""
    found = dict(section)
    if isinstance(found.get("files"), list):
        found["files"] = [absolute_path(str(entry)) for entry in found["files"]]
    for name in ("tokenizer", "cache_dir"):
        if isinstance(found.get(name), str):
            found[name] = absolute_path(found[name])
    if isinstance(found.get("pool"), list):
        found["pool"] = [absolute_data(member) if isinstance(member, dict) else member for member in found["pool"]]
    return found


def absolute_path(text: str) -> str:
    """One path. `bytes` is no path but the name of a tokenizer, and an address of an object store is whole as it is."""
    if text == "bytes" or "://" in text or text.startswith("~"):
        return text
    return str(Path(text).absolute())


def without_tokenizers(config: RunConfig, tokenizer: str) -> RunConfig:
    """A configuration that names the tokenizer of its world once, at the top."""

    def strip(section: dict[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in section.items() if name != "tokenizer"}
        if isinstance(found.get("pool"), list):
            found["pool"] = [strip(member) if isinstance(member, dict) else member for member in found["pool"]]
        return found

    data = replace(config.data, tokenizer=tokenizer, pool=strip({"pool": config.data.pool})["pool"])
    return replace(config, data=data, world=_each(config.world, strip))


def _each(node: Any, change: Any) -> Any:
    """A tree of the configuration with every data section changed."""
    if not isinstance(node, dict):
        return node
    found = dict(node)
    if isinstance(found.get("data"), dict):
        found["data"] = change(found["data"])
    if isinstance(found.get("children"), list):
        found["children"] = [_each(child, change) for child in found["children"]]
    return found
