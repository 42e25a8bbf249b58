"""The manifests for Kubernetes, against what KubeRay requires, and against what the project promises of its pods."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CRDS = os.environ.get("WORLDLM_KUBERAY_CRDS")
NAMES = ["kuberay", "kuberay-world", "kuberay-member"]
every_manifest = pytest.mark.parametrize("name", NAMES)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")))


def spec_of(name: str) -> dict[str, Any]:
    [cluster] = [document for document in documents(name) if document["kind"] == "RayCluster"]
    assert cluster["apiVersion"] == "ray.io/v1"
    return dict(cluster["spec"])


def pods(name: str) -> Iterator[dict[str, Any]]:
    """What the pods of a cluster are made from, the head's first."""
    spec = spec_of(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def containers(name: str) -> Iterator[dict[str, Any]]:
    for pod in pods(name):
        yield from pod.get("initContainers", []) + pod["containers"]


def mounted(pod: dict[str, Any]) -> set[str]:
    """The places of all volumes in the container that runs Ray."""
    return {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


@pytest.mark.skipif(
    CRDS is None, reason="KubeRay's CRDs are on no package index: WORLDLM_KUBERAY_CRDS=FOLDER names them"
)
@every_manifest
def test_kuberay_accepts_the_manifests(name: str) -> None:
    for document in documents(name):
        if not document["apiVersion"].startswith("ray.io/"):
            continue
        plural = document["kind"].lower() + "s"
        definition = yaml.safe_load((Path(str(CRDS)) / f"ray.io_{plural}.yaml").read_text(encoding="utf-8"))
        [schema] = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
        problems = [error.message for error in Draft202012Validator(closed(schema)).iter_errors(document)]
        assert not problems, problems


def closed(schema: Any) -> Any:
    """The schema with unknown keys forbidden, as the API server forbids them; numbers may be texts where it says so."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if schema.get("type") == "object" and set(schema.get("properties", {})) <= {"name"} and "name" in str(schema):
        found.pop("additionalProperties", None)  # metadata
    return found


@every_manifest
def test_what_kuberay_requires_is_there(name: str) -> None:
    """The required keys of the RayCluster schema, the same in KubeRay 1.5.1 and 1.7.0."""
    spec = spec_of(name)
    assert spec["headGroupSpec"]["template"]["spec"]["containers"]
    for group in spec["workerGroupSpecs"]:
        assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group)
        assert group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]
        assert group["labels"]["region"], "a node of the world is placed by it"
    assert spec["authOptions"] == {"mode": "token"}


@every_manifest
def test_images_and_ray_are_those_of_the_project(name: str) -> None:
    [ray] = [wanted for wanted in map(Requirement, PROJECT["dependencies"]) if wanted.name == "ray"]
    assert ray.specifier.contains(spec_of(name)["rayVersion"])
    assert {c["image"] for c in containers(name)} == {f"registry.example.com/worldlm_ray:{PROJECT['version']}"}


@every_manifest
def test_no_container_is_privileged_and_all_have_limits(name: str) -> None:
    for pod in pods(name):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        user = pod["securityContext"]
        assert user["runAsNonRoot"]
        assert (user["runAsUser"], user["fsGroup"]) == (1000, 1000), "the user of cluster/Containerfile"
        assert user["fsGroupChangePolicy"] == "OnRootMismatch", "at every mount, keys would be opened to the group"
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod.get("initContainers", []) + pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            resources = container["resources"]
            assert resources["requests"] == resources["limits"], "Ray gives out what the limits say"
            assert set(resources["limits"]) >= {"cpu", "memory"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= names


def test_the_autoscaler_sees_labels_and_the_job_finds_its_cluster() -> None:
    cluster, job = documents("kuberay")
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


def test_members_reach_the_gateway_on_the_head_and_nothing_else() -> None:
    gateway = pytest.importorskip("worldlm_ray.gateway.identity")
    cluster, service = documents("kuberay-world")
    spec = service["spec"]
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert spec["selector"] == {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}
    assert [(port["port"], port["targetPort"]) for port in spec["ports"]] == [(gateway.PORT, gateway.PORT)]
    # A list of ports in the head's container would replace Ray's in the service that its workers join by.
    assert "ports" not in next(pods("kuberay-world"))["containers"][0]
    assert [document["kind"] for document in documents("kuberay-member")] == ["RayCluster"], "a member opens no port"


@pytest.mark.parametrize("name", ["kuberay-world", "kuberay-member"])
def test_keys_are_on_a_volume_of_the_head_alone_that_can_be_written(name: str) -> None:
    head, *workers = pods(name)
    assert "/border" in mounted(head)
    assert not any("readOnly" in mount for mount in head["containers"][0]["volumeMounts"])
    assert workers
    assert all(mounted(worker) == {"/worlds"} for worker in workers)


def test_the_invitation_is_a_secret_that_only_the_joining_container_reads() -> None:
    head, *_ = pods("kuberay-member")
    [secret] = [volume for volume in head["volumes"] if "secret" in volume]
    assert secret["secret"]["optional"], "the pod starts again once it is deleted"
    [join] = head["initContainers"]
    assert [m["readOnly"] for m in join["volumeMounts"] if m["name"] == secret["name"]] == [True]
    assert "/invitation" not in mounted(head)


def test_the_head_of_a_member_joins_once_and_fails_while_it_cannot(tmp_path: Path) -> None:
    """The command of the manifest, with a program in the place of worldlm that writes down what it was given."""
    [join] = next(pods("kuberay-member"))["initContainers"]
    *shell, script = join["command"]
    script = script.replace("/border", f"{tmp_path}/border").replace("/invitation", f"{tmp_path}/invitation")
    profile = tmp_path / "border" / "profile"
    program = tmp_path / "worldlm"
    program.write_text(
        f'#!/bin/sh\n{{ echo "$@"; cat; }} >> {tmp_path}/given\nmkdir -p {profile}\ntouch {profile}/identity.pem\n',
        encoding="utf-8",
    )
    program.chmod(0o755)

    def start() -> int:
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.run([*shell, script], env={"PATH": path}, capture_output=True, check=False).returncode

    assert start() != 0, "there is no invitation"
    assert not (tmp_path / "given").exists()
    (tmp_path / "invitation").mkdir()
    (tmp_path / "invitation" / "line").write_text("worldlm1.X\n", encoding="utf-8")
    assert start() == 0
    (tmp_path / "invitation" / "line").unlink()
    assert start() == 0, "it has joined: the Secret may be gone"
    given = f"gateway join - --dir {profile} --policy {tmp_path}/invitation/policy.yaml\nworldlm1.X\n"
    assert (tmp_path / "given").read_text(encoding="utf-8") == given
