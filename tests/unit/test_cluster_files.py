"""The cluster descriptions that ship, against what Ray and the clouds accept; and wrong ones, answered in one line."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.worlds import client

from worldlm_ray.errors import ConfigError
from worldlm_ray.launch import cluster_file
from worldlm_ray.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes onprem.yaml, filled in, with one change."""
    monkeypatch.chdir(ROOT)
    token, key, labels = tmp_path / "token", tmp_path / "key", tmp_path / "labels"
    for file in (token, key):
        file.write_text("secret", encoding="utf-8")
        file.chmod(0o600)
    labels.write_text("# where machines are\n10.0.0.2 region=eu,disk=fast\n10.0.0.3 region=us\n", encoding="utf-8")

    def fill_in(change: Change = lambda _: None) -> Path:
        raw = yaml.safe_load((ROOT / "cluster/onprem.yaml").read_text(encoding="utf-8"))
        raw["provider"] |= {"head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
        raw["auth"]["ssh_private_key"] = str(key)
        raw["file_mounts"] |= {cluster_file.TOKEN: str(token), cluster_file.LABELS: str(labels)}
        change(raw)
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return path

    return fill_in


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["onprem", "member", "aws", "gcp"])
def test_ray_accepts_what_ships(name: str) -> None:
    [raw] = documents(f"{name}.yaml")
    cluster_file._check_schema(raw)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("ray start" in command and cluster_file.TOKEN_MODE in command for command in raw[key])


def test_a_member_has_the_border_s_packages_and_its_key_is_copied_nowhere() -> None:
    [member], [onprem] = documents("member.yaml"), documents("onprem.yaml")
    assert any("[cluster,gateway]" in command for command in member["setup_commands"])
    assert not any("profile" in f"{there} {here}" for there, here in member["file_mounts"].items())
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts"):
        assert member[key] == onprem[key]


def test_amazon_accepts_the_machines() -> None:
    session = pytest.importorskip("botocore.session").get_session()
    run = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    validator = pytest.importorskip("botocore.validate").ParamValidator()
    [raw] = documents("aws.yaml")
    for name, kind in raw["available_node_types"].items():
        problems = validator.validate(kind["node_config"] | {"MinCount": 1, "MaxCount": 1}, run)
        assert not problems.has_errors(), f"{name}: {problems.generate_report()}"


def test_google_accepts_the_machines() -> None:
    client = pytest.importorskip("googleapiclient")
    bundled = Path(client.__file__).parent / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(bundled.read_text(encoding="utf-8"))["schemas"]
    [raw] = documents("gcp.yaml")
    for name, kind in raw["available_node_types"].items():
        unknown = list(unknown_keys(kind["node_config"], "Instance", schemas, name))
        assert not unknown


def unknown_keys(value: Any, name: str, schemas: dict[str, Any], at: str) -> list[str]:
    """Keys and values that a schema of Google's discovery documents does not know."""
    found = []
    for key, inner in value.items():
        known = schemas[name]["properties"].get(key)
        if known is None:
            found.append(f"{at}.{key}")
            continue
        for item in inner if known.get("type") == "array" else [inner]:
            rule = known.get("items", known)
            if "$ref" in rule:
                found += unknown_keys(item, rule["$ref"], schemas, f"{at}.{key}")
            elif rule.get("properties"):
                found += [f"{at}.{key}.{k}" for k in item if k not in rule["properties"]]
            elif "enum" in rule and item not in rule["enum"]:
                found.append(f"{at}.{key}={item}")
    return found


def test_a_description_that_is_filled_in_passes(
    write: Callable[..., Path], tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    eu = client("a", tmp_path, 1, placement={"labels": {"region": "eu", "disk": "fast"}})
    found = cluster_file.check(write(), tiny([eu]), reach=False)
    assert len(found) == 2
    assert "region" in found[-1]


def set_ip(raw: dict[str, Any]) -> None:
    raw["provider"]["worker_ips"][0] = "192.0.2.11"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_ip, r"provider.worker_ips\[0\]: 192.0.2.11 is an example; fill in"),
        (lambda raw: raw.update(max_worker=3), r"the top: .*max_worker"),
        (lambda raw: raw["file_mounts"].pop(cluster_file.TOKEN), "file_mounts: no machine gets the token; add"),
        (
            lambda raw: raw["file_mounts"].update({cluster_file.TOKEN: "/nowhere/token"}),
            r"file_mounts.~/.ray/auth_token: there is no token in /nowhere/token; make one: ray get-auth-token",
        ),
        (
            lambda raw: raw.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
            r"worker_start_ray_commands\[0\]: starts Ray without token authentication",
        ),
        (lambda raw: raw["file_mounts"].update({"~/x": "missing"}), r"file_mounts.~/x: there is no 'missing'"),
        (lambda raw: raw["auth"].update(ssh_private_key="/no/key"), "auth.ssh_private_key: there is no '/no/key'"),
        (
            lambda raw: raw["provider"].update(worker_ips=["10.0.0.2"]),
            r"labels:3: 10.0.0.3 is no machine of the cluster",
        ),
    ],
)
def test_a_wrong_description_is_one_line(write: Callable[..., Path], change: Change, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        cluster_file.check(write(change), reach=False)
    assert "\n" not in str(caught.value)


def test_a_token_that_others_may_read_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(ConfigError, match=r"others may read .*token; chmod 600"):
        cluster_file.check(write(), reach=False)


def test_a_machine_that_does_not_answer_is_named(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(cluster_file, "SSH_PORT", server.getsockname()[1])

        def here(raw: dict[str, Any]) -> None:
            raw["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
            del raw["file_mounts"][cluster_file.LABELS]

        path = write(here)
        assert "1 machines answer" in cluster_file.check(path)[1]
    with pytest.raises(ConfigError, match=r"provider.head_ip: 127.0.0.1 does not answer on port .*; is it on"):
        cluster_file.check(path)


def test_a_label_that_no_machine_carries_is_named(
    write: Callable[..., Path], tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = tiny([client("a", tmp_path, 1, placement={"labels": {"region": "mars"}})])
    with pytest.raises(
        ConfigError, match=r"world.children\[0\].placement.labels: no machine .*region=mars .*region=us"
    ):
        cluster_file.check(write(), plan, reach=False)


def test_what_is_no_description_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, problem in (
        ("a: [", "is not YAML"),
        ("kind: RayCluster", "it has no provider; for Kubernetes"),
        ("3", "it has no provider"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=problem):
            cluster_file.check(path)
    with pytest.raises(ConfigError, match="cannot read"):
        cluster_file.check(tmp_path / "nowhere.yaml")


def test_every_folder_of_the_package_travels_in_the_wheel() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inits = [path for top in ("worldlm_ray", "actors") for path in (ROOT / top).rglob("__init__.py")]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert set(settings["packages"]) == folders | {"worldlm_ray.conf", "worldlm_ray.cluster"}
    shipped = {path.name for path in (ROOT / "cluster").iterdir() if path.is_file() and path.suffix != ".py"}
    patterns = settings["package-data"]["worldlm_ray.cluster"]
    assert all(any(Path(name).match(pattern) for pattern in patterns) for name in shipped)
