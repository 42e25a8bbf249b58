"""`ray up` on three hosts, and a world whose federations live on two of them."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.hosts import NET, Hosts, hosts, why_not
from support.worlds import TINY_MODEL, write_text

from worldlm_ray.launch.cluster_file import LABELS, TOKEN
from worldlm_ray.tracking.audit import proofs

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARKS = {region: f"mark{secrets.token_hex(8)}" for region in ("eu", "us")}
"""Words that stand in the texts of one region only."""
ACTORS = """
import json, ray
from ray._private.state import actors
ray.init("auto", logging_level="ERROR")
print(json.dumps([[actor["Name"], actor["Address"]["IPAddress"]] for actor in actors().values()]))
"""
"""Every actor that the cluster remembers, living or dead: the public list of actors wants a dashboard."""


@dataclass
class Cluster:
    """A cluster that `ray up` has started: the first host is its head, the others are `eu` and `us`."""

    hosts: Hosts
    file: Path
    head_start: str
    """The command that starts Ray on the head."""

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Version 2 of the autoscaler starts only one machine of a list, as of Ray 2.60.
        environment = os.environ | {"RAY_UP_enable_autoscaler_v2": "0"}
        command = [str(BIN / "ray"), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def worldlm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.hosts.run(1, " ".join(["cd", str(self.hosts.shared), "&& worldlm", *arguments]))


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """cluster/onprem.yaml with its addresses filled in, on three hosts."""
    folder, shared = tmp_path_factory.mktemp("hosts"), tmp_path_factory.mktemp("shared")
    with hosts(folder, shared, 3) as made:
        yield from bring_up(made)


def bring_up(made: Hosts, *, redis: str = "") -> Iterator[Cluster]:
    """A cluster that `ray up` has started, and that `ray down` stops; its head keeps what it knows in a Redis."""
    folder = made.folder
    token, labels = folder / "token", folder / "labels"
    token.write_text("0123456789abcdef" * 4, encoding="utf-8")
    token.chmod(0o600)
    labels.write_text(f"{made.address(2)} region=eu\n{made.address(3)} region=us\n", encoding="utf-8")
    raw = yaml.safe_load((ROOT / "cluster/onprem.yaml").read_text(encoding="utf-8"))
    raw["provider"] |= {"head_ip": made.address(1), "worker_ips": [made.address(2), made.address(3)]}
    raw["auth"] = {"ssh_user": "root", "ssh_private_key": str(made.key)}
    raw["file_mounts"] |= {TOKEN: str(token), LABELS: str(labels)}
    if redis:
        keep = f"export RAY_REDIS_ADDRESS={redis} RAY_external_storage_namespace=worldlm; "
        raw["head_start_ray_commands"][1] = keep + raw["head_start_ray_commands"][1] + " --redis-password=secret"
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    checked = subprocess.run([BIN / "worldlm", "cluster", file], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "3 machines answer" in checked.stdout, checked.stderr
    cluster = Cluster(made, file, raw["head_start_ray_commands"][1])
    started = cluster.ray("up", "-y", str(file))
    assert started.returncode == 0, started.stdout + started.stderr
    for host, region in ((2, "eu"), (3, "us")):
        write_private_text(made, host, region)
    wait_for_machines(cluster, 3)
    yield cluster
    assert cluster.ray("down", "-y", str(file)).returncode == 0


def write_private_text(made: Hosts, host: int, region: str) -> None:
    """Texts of two clients, on one host only; gone from everywhere else before anything starts."""
    for number in range(2):
        text = write_text(made.folder / "text", seed=10 * host + number).read_text(encoding="utf-8")
        text = text.replace("river", MARKS[region])
        (made.folder / "text").unlink()
        done = subprocess.run(
            ["ssh", "-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i", str(made.key)]
            + [f"root@{made.address(host)}", f"mkdir -p /tmp/text && cat > /tmp/text/{region}{number}.txt"],
            input=text,
            text=True,
            check=False,
        )
        assert done.returncode == 0


def wait_for_machines(cluster: Cluster, number: int) -> None:
    until = time.monotonic() + 180.0
    count = 'import ray; ray.init("auto", logging_level="ERROR"); print(sum(n["Alive"] for n in ray.nodes()))'
    while time.monotonic() < until:
        done = cluster.hosts.run(1, f"python -c '{count}'")
        if done.stdout.strip() == str(number):
            return
        time.sleep(1.0)
    pytest.fail(f"not {number} machines: {done.stdout} {done.stderr}")


def a_world(cluster: Cluster, name: str, *, rounds: int, **settings: Any) -> Path:
    """A configuration on the shared storage: a federation of two clients in each region."""
    children = [
        {
            "federation": region,
            "placement": {"labels": {"region": region}},
            "children": [
                {"client": f"{region}{number}", "data": {"files": [f"/tmp/text/{region}{number}.txt"]}}
                for number in range(2)
            ],
        }
        for region in ("eu", "us")
    ]
    raw = {
        "model": TINY_MODEL,
        "merge": {"client": 1.0},
        "budget": {"rounds": rounds},
        "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "checkpoint": {"every_s": 2.0},
        "liveness": {"heartbeat_s": 0.5},
        "data": {"cache_dir": "/tmp/cache"},
        "world": {"children": children},
    }
    path = cluster.hosts.shared / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw | settings), encoding="utf-8")
    return path


def test_federations_train_where_they_belong_and_nowhere_else(up: Cluster, tmp_path: Path) -> None:
    made = up.hosts
    run = made.shared / "placed"
    conf = a_world(up, "placed", rounds=4)
    done = up.worldlm("train", str(conf), "--run-dir", str(run), "--address", "auto")
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    check(run, rounds=4)
    # The proof: every actor of a federation, living or dead, on its host ...
    listed = made.run(1, f"python -c '{ACTORS}'")
    assert listed.returncode == 0, listed.stderr
    actors = json.loads(listed.stdout.splitlines()[-1])
    for region, host in (("eu", 2), ("us", 3)):
        found = [where for name, where in actors if name.startswith(f"world/{region}")]
        assert len(found) == 3
        assert set(found) == {made.address(host)}
    # ... and not a word of its texts on any other: on no disk, in no shared memory, nor in what they share.
    for region, home in (("eu", 2), ("us", 3)):
        for host in (1, 2, 3):
            search = f"grep -rlsa {MARKS[region]} /tmp /root /dev/shm {made.shared}"
            hits = made.run(host, search).stdout.split()
            assert bool(hits) == (host == home), f"{region} on host {host}: {hits}"
    # The result is fetched as any file is.
    fetched = tmp_path / "summary.json"
    assert up.ray("rsync-down", str(up.file), str(run / "summary.json"), str(fetched)).returncode == 0
    assert json.loads(fetched.read_text(encoding="utf-8")) == summary


def test_what_is_missing_on_a_machine_is_said_before_the_start(up: Cluster) -> None:
    conf = a_world(up, "missing", rounds=1)
    text = conf.read_text(encoding="utf-8").replace("/tmp/text/us1.txt", "/tmp/text/us7.txt")
    conf.write_text(text, encoding="utf-8")
    done = up.worldlm("train", str(conf), "--run-dir", "/tmp/not-shared", "--address", "auto")
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3, done.stderr
    assert sum("does not see the run folder /tmp/not-shared; put it on storage" in line for line in lines) == 2
    assert sum("there is no file '/tmp/text/us7.txt'" in line for line in lines) == 1
    assert up.hosts.run(1, "ls /tmp/not-shared").returncode != 0, "the same command can be given again"


def test_a_host_that_is_cut_off_for_30_s_is_merged_again(up: Cluster) -> None:
    run = up.hosts.shared / "cut"
    with a_run(up, "cut", rounds=80) as done:
        wait_for(run, "world/us/us0", 6)
        up.hosts.unplug(3)
        try:
            time.sleep(30.0)
        finally:
            up.hosts.plug(3)
        meanwhile = accepted(run)
    assert done[0].returncode == 0, done[0].stderr
    check(run, rounds=80)
    assert meanwhile["world/eu/eu0"] > meanwhile["world/us/us0"] + 15, "the others went on"


@pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="jobs need the extra `cluster`: ray[default]")
def test_a_run_is_a_job_that_can_be_left_and_found_again(up: Cluster) -> None:
    run, conf = up.hosts.shared / "job", a_world(up, "job", rounds=30)
    job = "--address http://127.0.0.1:8265"
    train = f"worldlm train {conf} --run-dir {run} --address auto"
    submitted = up.hosts.run(1, f"ray job submit {job} --submission-id left --no-wait -- {train}")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for(run, "world/us/us0", 3)
    assert "us0" in up.hosts.run(3, f"worldlm status {run}").stdout, "found from anywhere"
    assert up.hosts.run(1, f"ray job stop {job} left").returncode == 0, "as Ctrl-C would"
    wait_until(lambda: (run / "summary.json").exists())
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "stopped"
    done = up.hosts.run(1, f"ray job submit {job} -- worldlm train --resume {run} --address auto")
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout
    check(run, rounds=30)


def test_a_run_whose_head_is_lost_goes_on_in_a_new_cluster(up: Cluster) -> None:
    run = up.hosts.shared / "headless"
    with a_run(up, "headless", rounds=20):
        wait_for(run, "world/us/us0", 6)
        up.hosts.crash(1)
    up.ray("down", "-y", str(up.file))  # else the new head would be given what the old one had already: nothing
    started = up.ray("up", "-y", str(up.file))
    assert started.returncode == 0, started.stdout + started.stderr
    wait_for_machines(up, 3)
    done = up.worldlm("train", "--resume", str(run), "--address", "auto")
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout
    check(run, rounds=20)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs a redis-server")
def test_with_redis_the_actors_outlive_the_head(up: Cluster, tmp_path: Path) -> None:
    """The last of this module: its cluster makes room for one that keeps what it knows in a Redis."""
    assert up.ray("down", "-y", str(up.file)).returncode == 0
    command = f"redis-server --bind {NET}.1 --port 6400 --requirepass secret --save ''"
    store = subprocess.Popen(shlex.split(command), cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        for cluster in bring_up(up.hosts, redis=f"{NET}.1:6400"):
            outlive_the_head(cluster)
    finally:
        store.kill()
        store.wait()


def outlive_the_head(cluster: Cluster) -> None:
    run = cluster.hosts.shared / "redis"
    with a_run(cluster, "redis", rounds=60) as done:
        wait_for(run, "world/us/us0", 6)
        # All that runs on the head: Ray's daemons, what they have placed there, and the command that watches. The
        # script that kills them carries this line in its own name: none of the words may match itself.
        cluster.hosts.run(1, "kill -9 $(grep -lsE '[w]orldlm|[g]cs_s|[r]ay' /proc/[0-9]*/cmdline | cut -d/ -f3)")
        time.sleep(5.0)
        back = cluster.hosts.run(1, cluster.head_start)
        assert back.returncode == 0, back.stdout + back.stderr
    assert done[0].returncode != 0, "the command that watched was on the head"
    there = accepted(run)["world/us/us0"]
    wait_for(run, "world/us/us0", there + 3)
    resumed = cluster.worldlm("train", "--resume", str(run), "--address", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "the run lives: watching it" in resumed.stdout
    check(run, rounds=60)
    clients = [proof for proof in proofs(run) if proof.node in ("world/eu", "world/us")]
    assert all(proof.again == 0 for proof in clients), "federations and clients lived on"


@contextmanager
def a_run(cluster: Cluster, name: str, *, rounds: int) -> Iterator[list[subprocess.CompletedProcess[str]]]:
    """Train while something happens; at the end, the command that trained has come back."""
    conf = a_world(cluster, name, rounds=rounds)
    arguments = ("train", str(conf), "--run-dir", str(cluster.hosts.shared / name), "--address", "auto")
    done: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: done.append(cluster.worldlm(*arguments)))
    thread.start()
    yield done
    thread.join(timeout=300.0)
    assert done, "the command has not come back"


def check(run: Path, *, rounds: int) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "finished"
    assert all(node["steps"] == rounds * 4 for node in summary["nodes"].values() if node["kind"] == "client")
    assert all(proof.holds for proof in proofs(run))


def accepted(run: Path) -> dict[str, int]:
    try:
        nodes = json.loads((run / "status.json").read_text(encoding="utf-8"))["nodes"]
    except (OSError, ValueError):
        return {}
    return {path: node["accepted"] for path, node in nodes.items()}


def wait_for(run: Path, path: str, number: int) -> None:
    wait_until(lambda: accepted(run).get(path, 0) >= number)


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 120.0
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.2)
