"""Changes of a tree while its run goes on: clients join and nodes leave. What is resumed is the changed tree."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from worldlm_ray import config as configuration
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan import Plan, make_plan


def with_client(plan: Plan, under: str, name: str, *, files: list[str], overrides: list[str]) -> Plan:
    """The plan with one client more.

    Args:
        plan: the run.
        under: path of the federation, or `world`.
        name: of the client.
        files: its text; may be empty if an override gives it.
        overrides: `key=value` settings of the client, such as data.corpus=code.

    Raises:
        ConfigError: there is no such federation, the name is taken, no place is free, or a setting cannot be.
    """
    parent = plan.node(under)
    if parent.kind == "client":
        raise ConfigError("--under", f"{under} is a client", "name a federation, or world")
    if any(child.name == name for child in parent.children):
        raise ConfigError("--client", f"{under} has a child {name!r} already", "give another name")
    clients = sum(child.kind == "client" for child in parent.children)
    if parent.max_clients is not None and clients >= parent.max_clients:
        got = f"{under} has {clients} clients, and max_clients is {parent.max_clients}"
        raise ConfigError("--under", got, "let one leave first")
    if parent.settings.privacy.unit == "client":
        got = f"{under} promises its clients privacy by noise that was chosen for those it has"
        raise ConfigError("--under", got, "add the client to the configuration of a new run")
    entry: dict[str, Any] = {"client": name}
    if files:
        entry["data"] = {"files": files}
    return _changed(plan, under, lambda node: node["children"].append(configuration.with_overrides(entry, overrides)))


def without(plan: Plan, path: str) -> Plan:
    """The plan without a node and all that is below it.

    Raises:
        ConfigError: there is no such node, it is the world, or its parent would have no children left.
    """
    spec = plan.node(path)
    if spec.kind == "world":
        raise ConfigError("NODE", "the world cannot leave itself", "stop the run with Ctrl-C")
    under = path.rsplit("/", 1)[0]
    if len(plan.node(under).children) == 1:
        raise ConfigError("NODE", f"{path} is all that {under} has", f"let {under} leave instead")

    def remove(node: dict[str, Any]) -> None:
        node["children"] = [child for child in node["children"] if child.get(spec.kind) != spec.name]

    return _changed(plan, under, remove)


def _changed(plan: Plan, under: str, change: Any) -> Plan:
    mapping = deepcopy(plan.to_mapping())
    node = mapping["world"]
    for name in under.split("/")[1:]:
        node = next(child for child in node["children"] if child.get("federation") == name)
    change(node)
    return make_plan(configuration.from_mapping(mapping), check_data=False)
