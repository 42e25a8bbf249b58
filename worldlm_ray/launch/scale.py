"""A living world while machines come and go: pretended ones, Ray's processes of several machines on this one.

Every machine holds a share of the clients. Those for whom there is no room wait; they begin as soon as machines come,
from their federation's model. When a machine is drained its clients wait again, or go on elsewhere if there is room;
what they have pushed stays. The head holds no client.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ray

from worldlm_ray.config.loading import from_mapping
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments.scaling import Stage
from worldlm_ray.launch import cluster
from worldlm_ray.launch.private import session
from worldlm_ray.launch.run import Progress, train
from worldlm_ray.plan.plan import Plan, make_plan

POLL_S = 0.2
FOREVER_S = 1e9
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""A machine that is gone is noticed within 2 s."""


def elastic(plan: Plan) -> Plan:
    """The plan of a world that begins with whoever there is room for, and goes on until it is told to stop."""
    mapping = plan.to_mapping()

    def open_up(node: dict[str, Any]) -> None:
        if any("client" in child for child in node["children"]):
            node["min_clients"] = 0
        for child in node["children"]:
            if "children" in child:
                open_up(child)

    open_up(mapping["world"])
    mapping["budget"] = {"seconds": FOREVER_S}
    return make_plan(from_mapping(mapping, resolved=True), check_data=False)


def parse(text: str) -> list[int]:
    """Numbers of machines: `1,2,4` grows and then shrinks the same way.

    Raises:
        ConfigError: something else.
    """
    try:
        grow = [int(part) for part in text.split(",")]
    except ValueError:
        grow = []
    if not grow or min(grow) < 1:
        raise ConfigError("--nodes", f"got {text!r}", "write numbers of machines, such as 1,2,4")
    return grow if sorted(grow) != grow or len(grow) == 1 else grow + grow[-2::-1]


def scale(
    plan: Plan,
    machines: Sequence[int],
    *,
    stage_s: float,
    on_progress: Progress = lambda _: None,
    on_phase: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[Stage], list[dict[str, Any]]]:
    """Run a world on one number of machines after the other.

    Args:
        plan: the run, from `elastic`; its folder exists.
        machines: their number, stage by stage.
        stage_s: seconds of each stage.
        on_progress: called about twice a second with a snapshot of the run.
        on_phase: told what happens.
        should_stop: asked as often; True ends the experiment with the stages so far.

    Returns:
        The stages, and the snapshots.

    Raises:
        RunError: the run failed.
    """
    from ray.cluster_utils import Cluster

    cores = sum(cluster.workers(spec) * cluster.each(spec)["CPU"] for spec in plan.root.clients)
    share = math.ceil(cores / max(machines))
    stages: list[Stage] = []
    with warnings.catch_warnings(), session.starting(), session.silent():
        warnings.simplefilter("ignore")
        on_phase(f"starting a cluster; {share:g} cores by name on each machine, for {len(plan.root.clients)} clients")
        pretended = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        )
        try:
            ray.init(pretended.address, **cluster.QUIET)
            there = [pretended.add_node(num_cpus=share) for _ in range(machines[0])]
            run = _Run(plan, on_progress)
            while not run.began and run.is_alive():
                time.sleep(POLL_S)
            for number in machines:
                _change(pretended, there, number, share)
                on_phase(f"{number} machine{'s' if number > 1 else ''}")
                begin_s, until = run.now_s, time.monotonic() + stage_s
                while time.monotonic() < until and run.is_alive() and not should_stop():
                    time.sleep(POLL_S)
                stages.append(Stage(machines=number, begin_s=begin_s, end_s=run.now_s))
                if should_stop() or not run.is_alive():
                    break
            run.end()
        finally:
            ray.shutdown()
            pretended.shutdown()
    return stages, run.looks


def _change(pretended: Any, there: list[Any], number: int, share: int) -> None:
    while len(there) < number:
        there.append(pretended.add_node(num_cpus=share))
    while len(there) > number:
        pretended.remove_node(there.pop(), allow_graceful=True)


class _Run(threading.Thread):
    """The run, beside the thread that changes the cluster: Ray wants that to be the main one."""

    def __init__(self, plan: Plan, on_progress: Progress) -> None:
        super().__init__(daemon=True)
        self.plan, self.on_progress = plan, on_progress
        self.looks: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Train until told to stop."""
        try:
            train(self.plan, on_progress=self._look, should_stop=self._over.is_set)
        except Exception as error:  # noqa: BLE001 - a boundary: raised by `end`
            self.error = error

    def _look(self, snapshot: dict[str, Any]) -> None:
        self.looks.append(snapshot)
        self.on_progress(snapshot)

    @property
    def began(self) -> bool:
        """Whether anybody trains."""
        return bool(self.looks) and self.looks[-1]["tokens"] > 0

    @property
    def now_s(self) -> float:
        """Run time of the last look."""
        return float(self.looks[-1]["now_s"]) if self.looks else 0.0

    def end(self) -> None:
        """Stop, and wait for the checkpoints.

        Raises:
            RunError: the run failed.
        """
        self._over.set()
        self.join()
        if self.error is not None:
            raise self.error if isinstance(self.error, RunError) else RunError(str(self.error)) from self.error
