"""A world in this process's Ray cluster, and members of it: processes with another cluster each, over a line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml

from support.borders import Line
from support.gateway import make_member, make_world
from support.worlds import TINY_MODEL
from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.plan import living, rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.tracking.audit import Proof, proofs

FOLDER = "gateway"
KILL = """
import os, signal, sys, ray
address, namespace, name = sys.argv[1:]
ray.init(address, namespace=namespace, log_to_driver=False)
os.kill(ray.get(ray.get_actor(name).process.remote()), signal.SIGKILL)
"""


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class LineThread:
    """A line to a port, which a test cuts while it waits for something else."""

    def __init__(self, to: int) -> None:
        self._loop, self.line = asyncio.new_event_loop(), Line(to)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self.line.start())

    def cut(self, *, down: bool) -> None:
        """Abort all connections, and refuse new ones or take them again."""

        async def cut() -> None:
            self.line.is_down = down
            self.line.cut()

        self._do(cut())

    def stop(self) -> None:
        self._do(self.line.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)


@dataclass
class TwoClusters:
    """What a test of a border needs.

    Args:
        folder: for everything.
        settings: of both sides.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        port = free_port()
        self.line, self.listen = LineThread(port), f"127.0.0.1:{port}"
        self.keys = make_world(self.folder / FOLDER, port=self.line.line.port)
        self.members: dict[str, Member] = {}

    def common(self) -> dict[str, Any]:
        """Settings that both sides have alike."""
        raw: dict[str, Any] = {
            "model": TINY_MODEL,
            "budget": {"rounds": 2},
            "training": {"local_steps": 4, "batch_size": 4},
            "evaluation": {"tokens": 64, "final_tokens": 128},
            "data": {"cache_dir": str(self.folder / "cache")},
            "liveness": {"heartbeat_s": 0.5, "grace_s": 5.0},
            "merge": {"client": 1.0},
        }
        return raw | self.settings

    def world(self, tree: dict[str, Any], **changes: Any) -> Plan:
        """The world's plan; its run folder exists."""
        gateway = {"listen": self.listen, "dir": str(self.folder / FOLDER), "staging_dir": str(self.folder)}
        raw = self.common() | {"name": "world", "run_dir": str(self.folder / "world"), "world": tree}
        return rundir.create(make_plan(from_mapping(raw | {"gateway": gateway} | changes)))

    def member(
        self,
        path: str,
        tree: dict[str, Any],
        *,
        kind: str = "federation",
        keys: Authority | None = None,
        **changes: Any,
    ) -> Member:
        """A member: it enrols now, and its process begins when it is told to. `keys`: of another one than the world."""
        name = path.rpartition("/")[2]
        make_member(keys or self.keys, self.folder / "profiles" / name, path)
        raw = (
            self.common()
            | {"name": name, "joins": str(self.folder / "profiles" / name), "world": {kind: path} | tree}
            | changes
        )
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(raw))
        self.members[path] = Member(file, self.folder / name)
        return self.members[path]

    def close(self) -> None:
        for member in self.members.values():
            member.kill()
        self.line.stop()


@dataclass
class Member:
    """A member's `worldlm train`, with a Ray cluster that begins and ends with it."""

    file: Path
    run_dir: Path
    process: subprocess.Popen[str] | None = None
    inside: tuple[str, ...] = ()
    """What stands before a command that is to run where the member lives."""
    address: str = ""
    """Of a cluster that it lives in; without, it starts one."""

    def start(self) -> None:
        begun = ["--resume", str(self.run_dir)] if self.run_dir.exists() else [str(self.file)]
        place = [] if self.run_dir.exists() else ["--run-dir", str(self.run_dir)]
        place += ["--address", self.address] if self.address else []
        with self.file.with_suffix(".log").open("a") as log:
            self.process = subprocess.Popen(
                [*self.inside, sys.executable, "-m", "worldlm_ray", "train", *begun, *place],
                env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
                stdout=log,
                stderr=log,
                text=True,
            )

    def kill(self) -> None:
        """End the process, if it is there still, as a user does who is in a hurry."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30.0)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def kill_actor(self, name: str) -> None:
        """End an actor's process at once, from a third process that looks for it in the member's cluster."""
        place = living.recall(self.run_dir)
        assert place is not None
        done = subprocess.run(
            [*self.inside, sys.executable, "-c", KILL, place["address"], place["namespace"], name],
            capture_output=True,
            text=True,
            timeout=60.0,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def wait(self, *, at_most_s: float = 150.0) -> dict[str, Any]:
        """The summary of the member's run, once its process has ended."""
        assert self.process is not None
        assert self.process.wait(at_most_s) == 0, self.log()
        return dict(json.loads((self.run_dir / "summary.json").read_text()))

    def accepted(self, path: str) -> int:
        """Updates of a node that its parent has accepted so far."""
        return int(self.status().get("nodes", {}).get(path, {}).get("accepted", 0))

    def log(self) -> str:
        return self.file.with_suffix(".log").read_text()

    def status(self) -> dict[str, Any]:
        """The member's status; without any, nothing."""
        try:
            return dict(json.loads((self.run_dir / "status.json").read_text()))
        except (OSError, ValueError):
            return {}


class Run(threading.Thread):
    """The world's run beside a test that disturbs it."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(daemon=True)
        self.plan, self.summary, self.error = plan, dict[str, Any](), ""
        self.snapshot: dict[str, Any] = {"accepted": 0, "nodes": {}}
        self.phases: list[str] = []
        self._stops = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            looks: dict[str, Any] = {"on_progress": self._look, "on_phase": self.phases.append}
            looks["should_stop"] = self._stops.is_set
            self.summary = launch.train(self.plan, **looks).summary
        except BaseException as error:  # noqa: BLE001 - the test says what it was
            self.error = repr(error)

    def _look(self, snapshot: dict[str, Any]) -> None:
        self.snapshot = snapshot

    def accepted(self, path: str) -> int:
        """Updates of a node that its parent has accepted so far."""
        return int(self.snapshot["nodes"].get(path, {}).get("accepted", 0))

    def until(self, holds: Callable[[], bool], *, at_most_s: float = 150.0) -> float:
        """Wait until something holds; returns seconds."""
        began = time.monotonic()
        while not holds():
            assert not self.error, self.error
            assert time.monotonic() - began < at_most_s, f"it does not come: {self.phases[-1:]}, {self.snapshot}"
            time.sleep(0.05)
        return time.monotonic() - began

    def kill(self, name: str) -> None:
        """End an actor's process at once; Ray starts it again."""
        place = living.recall(self.plan.run_dir)
        assert place is not None
        actor = ray.get_actor(name, namespace=place["namespace"])
        os.kill(ray.get(actor.process.remote()), signal.SIGKILL)

    def stop(self) -> None:
        """What Ctrl-C does."""
        self._stops.set()

    def end(self, *, at_most_s: float = 200.0) -> dict[str, Any]:
        """The summary."""
        self.join(at_most_s)
        assert not self.error, self.error
        assert self.summary, f"the run goes on: {self.phases[-1:]}, {self.snapshot}"
        return self.summary


def whole_trail(run_dir: Path) -> list[Proof]:
    """What a run's trail proves: nothing is lost, and nothing applied twice."""
    found = proofs(run_dir)
    assert found
    assert all(proof.holds for proof in found), found
    return found
