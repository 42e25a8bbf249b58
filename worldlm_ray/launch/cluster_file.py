"""A cluster description, as `ray up` takes it, checked without starting anything.

Ray's own schema looks at the keys it knows. What it does not see, and what then costs an hour, is looked at here:
tokens, files to be copied, example addresses, machines that do not answer, labels that a world asks for.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from jsonschema.exceptions import ValidationError

from worldlm_ray.errors import ConfigError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.storage.filesystem import expanded

TOKEN = "~/.ray/auth_token"
TOKEN_MODE = "RAY_AUTH_MODE=token"
LABELS = "~/worldlm/labels"
"""Where onprem.yaml keeps the labels of its machines: a line each, ADDRESS KEY=VALUE[,KEY=VALUE...]."""
EXAMPLES = [ipaddress.ip_network(text) for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]
"""Addresses for documentation (RFC 5737): what is to be filled in."""
SSH_PORT = 22
ANSWER_S = 3.0
FILL_IN = ("your-project-id", "ami-0000000000000000", "fs-00000000")


def check(path: Path, plan: Plan | None = None, *, reach: bool = True) -> list[str]:
    """Check a cluster description.

    Args:
        path: of the YAML file.
        plan: a world that will run there; None if it does not matter.
        reach: whether machines that have addresses are asked for an answer.

    Returns:
        What was found to be right, in words: a line each.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    raw = _load(path)
    for step in (_check_schema, _check_filled_in, _check_token, _check_files):
        step(raw)
    machines = _addresses(raw)
    found = [f"{raw['provider']['type']}: the description is well-formed, and every file that it copies is there"]
    if machines and reach:
        _check_answers(machines)
        found.append(f"{len(machines)} machines answer on port {SSH_PORT}")
    carried = _labels(raw)
    if plan is not None:
        _check_world(plan, carried)
        wanted = {str(spec.settings.placement.labels) for spec in plan.root.walk() if spec.settings.placement.labels}
        found.append(f"the labels that {plan.config.name} asks for are there: {', '.join(sorted(wanted)) or 'none'}")
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("CLUSTER", f"cannot read {str(path)!r}: {error.strerror}", "give a cluster's YAML") from error
    except yaml.YAMLError as error:
        raise ConfigError("CLUSTER", f"{path} is not YAML: {' '.join(str(error).split())}", "mend it") from error
    if not isinstance(raw, dict) or "provider" not in raw:
        got = f"{path} describes no cluster of `ray up`: it has no provider"
        raise ConfigError("CLUSTER", got, "for Kubernetes: kubectl apply --dry-run=server -f FILE")
    return raw


def _check_schema(raw: dict[str, Any]) -> None:
    from worldlm_ray.launch.private import autoscaler  # takes a second to import

    try:
        autoscaler.validate(raw)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "the top"
        raise ConfigError(where, error.message, "see the files in cluster/") from error
    except Exception as error:  # Ray raises what it likes
        raise ConfigError("CLUSTER", f"Ray refuses it: {error}", "see the files in cluster/") from error


def _check_filled_in(raw: dict[str, Any]) -> None:
    for key, text in _texts(raw):
        for example in FILL_IN:
            if example in text:
                raise ConfigError(key, f"{example!r} is an example", "fill in your own")
    for key, address in _keyed_addresses(raw):
        try:
            invented = any(ipaddress.ip_address(address) in network for network in EXAMPLES)
        except ValueError:
            continue  # a name
        if invented:
            raise ConfigError(key, f"{address} is an example", "fill in the address of your machine")


def _check_token(raw: dict[str, Any]) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for index, command in enumerate(raw.get(key) or []):
            if "ray start" in command and TOKEN_MODE not in command:
                got = "starts Ray without token authentication: anyone who reaches the port may run code"
                raise ConfigError(f"{key}[{index}]", got, f"write `export {TOKEN_MODE};` before `ray start`")
    source = (raw.get("file_mounts") or {}).get(TOKEN)
    if source is None:
        raise ConfigError("file_mounts", "no machine gets the token", f"add {TOKEN}: {TOKEN}")
    token = expanded(source)
    if not token.is_file() or not token.read_text(encoding="utf-8").strip():
        make = f"make one: ray get-auth-token --generate && chmod 600 {TOKEN}"
        raise ConfigError(f"file_mounts.{TOKEN}", f"there is no token in {source}", make)
    if token.stat().st_mode & 0o077:
        raise ConfigError(f"file_mounts.{TOKEN}", f"others may read {source}", f"chmod 600 {source}")


def _check_files(raw: dict[str, Any]) -> None:
    for target, source in (raw.get("file_mounts") or {}).items():
        if not expanded(source).exists():
            got = f"there is no {source!r} (from {Path.cwd()})"
            raise ConfigError(f"file_mounts.{target}", got, "call it from the root of the repository, or mend the path")
    key = (raw.get("auth") or {}).get("ssh_private_key")
    if key is not None and not expanded(key).is_file():
        raise ConfigError("auth.ssh_private_key", f"there is no {key!r}", "name the key that opens the machines")


def _check_answers(machines: list[tuple[str, str]]) -> None:
    def problem(machine: tuple[str, str]) -> str | None:
        try:
            socket.create_connection((machine[1], SSH_PORT), timeout=ANSWER_S).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    with ThreadPoolExecutor(max_workers=32) as pool:
        for (key, address), why in zip(machines, pool.map(problem, machines), strict=True):
            if why is not None:
                got = f"{address} does not answer on port {SSH_PORT}: {why}"
                raise ConfigError(key, got, "is it on, and the address right?")


def _check_world(plan: Plan, carried: dict[str, dict[str, str]]) -> None:
    for spec in plan.root.walk():
        labels = spec.settings.placement.labels
        if labels and not any(labels.items() <= found.items() for found in carried.values()):
            wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
            there = "; ".join(
                f"{name}: {', '.join(f'{key}={value}' for key, value in found.items())}"
                for name, found in carried.items()
            )
            got = f"no machine of the cluster carries {wanted} ({there or 'none carries any'})"
            raise ConfigError(f"{spec.key}.placement.labels", got, "change one of the two")


def _labels(raw: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The labels that machines will carry, by the name of their type or by their address."""
    types = raw.get("available_node_types") or {}
    carried = {name: kind["labels"] for name, kind in types.items() if kind.get("labels")}
    source = (raw.get("file_mounts") or {}).get(LABELS)
    if source is None:
        return carried
    known = {address for _, address in _keyed_addresses(raw)}
    for number, line in enumerate(expanded(source).read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        place = f"{source}:{number}"
        if len(words) != 2 or not all("=" in pair for pair in words[1].split(",")):
            raise ConfigError(place, f"got {line.strip()!r}", "write ADDRESS KEY=VALUE[,KEY=VALUE...]")
        if words[0] not in known:
            raise ConfigError(
                place, f"{words[0]} is no machine of the cluster", "expected one of worker_ips or head_ip"
            )
        carried[words[0]] = dict(pair.split("=", 1) for pair in words[1].split(","))
    return carried


def _keyed_addresses(raw: dict[str, Any]) -> list[tuple[str, str]]:
    provider = raw["provider"]
    found = [("provider.head_ip", provider["head_ip"])] if provider.get("head_ip") else []
    return found + [(f"provider.worker_ips[{i}]", ip) for i, ip in enumerate(provider.get("worker_ips") or [])]


def _addresses(raw: dict[str, Any]) -> list[tuple[str, str]]:
    return _keyed_addresses(raw) if raw["provider"]["type"] == "local" else []


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a nested value, by its dotted key."""
    if isinstance(value, str):
        yield key, value
        return
    pairs: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        pairs = ((f"{key}.{name}" if key else str(name), inner) for name, inner in value.items())
    elif isinstance(value, list):
        pairs = ((f"{key}[{index}]", inner) for index, inner in enumerate(value))
    for name, inner in pairs:
        yield from _texts(inner, name)
