"""Changes of a tree while its run goes on: clients join and nodes leave. What is resumed is the changed tree."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from worldlm_ray.config.loading import from_mapping, with_overrides
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan import absolute
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.plan.tree import NodeSpec


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
    if parent.remote:
        raise ConfigError("--under", f"{under} is in another cluster", "name a node of this one")
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
    added = with_overrides(entry, overrides)
    if isinstance(added.get("data"), dict):
        added["data"] = absolute.absolute_data(added["data"])
    return _changed(plan, under, lambda node: node["children"].append(added), what="--under")


def without(plan: Plan, path: str) -> Plan:
    """The plan without a node and all that is below it.

    Raises:
        ConfigError: there is no such node, it is the world, or its parent would have no children left.
    """
    spec = plan.node(path)
    if spec.remote:
        cure = "members leave by their own operator, or by `worldlm gateway revoke`"
        raise ConfigError("NODE", f"{path} is in another cluster", cure)
    if spec.path == plan.top.path:
        raise ConfigError("NODE", f"{path} is all of this cluster", "stop the run with Ctrl-C")
    under = path.rsplit("/", 1)[0]
    if len(plan.node(under).children) == 1:
        raise ConfigError("NODE", f"{path} is all that {under} has", f"let {under} leave instead")

    def remove(node: dict[str, Any]) -> None:
        node["children"] = [child for child in node["children"] if child.get(spec.kind) != spec.name]

    return _changed(plan, under, remove, of=spec, what="NODE")


def _changed(plan: Plan, under: str, change: Any, *, what: str, of: NodeSpec | None = None) -> Plan:
    """The plan after a change of one node's entry; one copy among others gets an entry of its own first."""
    mapping = deepcopy(plan.to_mapping())
    node = mapping["world"]
    for name in under.split("/")[plan.top.path.count("/") + 1 :]:
        found = [child for child in node["children"] if child.get("federation") == name and "copies" not in child]
        if not found:
            raise ConfigError(what, f"{under} is, or is below, one of several copies", "change the configuration")
        [node] = found
    if of is not None and not any(child.get(of.kind) == of.name for child in node["children"]):
        if of.kind != "client":
            raise ConfigError(what, f"{of.path} is one of several copies", "change the configuration")
        node["children"] = [one for child in node["children"] for one in _one_by_one(child, plan.node(under), of.key)]
    change(node)
    return make_plan(from_mapping(mapping, resolved=True), check_data=False)


def _one_by_one(entry: dict[str, Any], parent: NodeSpec, key: str) -> list[dict[str, Any]]:
    """The copies that an entry stands for, if it is the one with this key: each with its part of the text."""
    copies = [child for child in parent.children if child.key == key]
    if entry.get("copies") is None or copies[0].name.rsplit("-", 1)[0] != entry.get("client"):
        return [entry]
    plain = {name: value for name, value in entry.items() if name != "copies"}
    return [
        plain | {"client": one.name, "data": {**(entry.get("data") or {}), "shard": one.settings.data.shard}}
        for one in copies
    ]
