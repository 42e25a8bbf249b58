"""A world that grows and shrinks with its machines: pretended ones, Ray's processes of several machines on this one.

    python examples/elastic_scaling.py --machines 1,2,4 --seconds 30

Every machine holds a share of the clients. Clients without room wait. They begin as soon as machines come, from their
federation's model. When a machine is drained its clients wait again, or go on elsewhere if there is room; what they
have pushed stays. The head holds no client. A table and a plot show speed, staleness and loss.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ray
from rich.console import Console
from scaling_figures import Stage, as_json, figures, plot, table

from worldlm_ray.config.loading import from_mapping, load
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments.methods import configure
from worldlm_ray.launch import cluster, train
from worldlm_ray.launch.private import session
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.tracking.audit import proofs

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
    """The plan of a world that begins with the clients that there is room for, and goes on until it is told to stop."""
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
        raise ConfigError("--machines", f"got {text!r}", "write numbers of machines, such as 1,2,4")
    return grow if sorted(grow) != grow or len(grow) == 1 else grow + grow[-2::-1]


def scale(
    plan: Plan,
    machines: Sequence[int],
    *,
    stage_s: float,
    on_phase: Callable[[str], None] = lambda _: None,
) -> tuple[list[Stage], list[dict[str, Any]]]:
    """Run a world on one number of machines after the other.

    Args:
        plan: the run, from `elastic`; its folder exists.
        machines: their number, stage by stage.
        stage_s: seconds of each stage.
        on_phase: told what happens.

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
            run = _Run(plan)
            while not run.began and run.is_alive():
                time.sleep(POLL_S)
            for number in machines:
                _change(pretended, there, number, share)
                on_phase(f"{number} machine{'s' if number > 1 else ''}")
                begin_s, until = run.now_s, time.monotonic() + stage_s
                while time.monotonic() < until and run.is_alive():
                    time.sleep(POLL_S)
                stages.append(Stage(machines=number, begin_s=begin_s, end_s=run.now_s))
                if not run.is_alive():
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

    def __init__(self, plan: Plan) -> None:
        super().__init__(daemon=True)
        self.plan = plan
        self.looks: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Train until told to stop."""
        try:
            train(self.plan, on_progress=self.looks.append, should_stop=self._over.is_set)
        except Exception as error:  # noqa: BLE001 - a boundary: raised by `end`
            self.error = error

    @property
    def began(self) -> bool:
        """Whether a client trains."""
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


def main() -> None:
    """Train on one number of machines after the other; print a table, draw a plot."""
    parser = argparse.ArgumentParser(description="Train one world while pretended machines come and go.")
    parser.add_argument("conf", nargs="?", default="elastic", help="a preset's name or a YAML file")
    parser.add_argument("overrides", nargs="*", help="changes, such as training.lr=1e-3")
    parser.add_argument("--machines", default="1,2,4", help="1,2,4 grows and shrinks again: 1,2,4,2,1")
    parser.add_argument("--method", default="worldlm", help="a method of `worldlm compare`")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a stage")
    parser.add_argument("--run-dir", help="folder of the run; runs/NAME unless given")
    asked = parser.parse_args()
    machines = parse(asked.machines)
    config = configure(load(asked.conf, asked.overrides, run_dir=asked.run_dir), asked.method)
    plan = rundir.create(elastic(make_plan(config)))
    stages, looks = scale(plan, machines, stage_s=asked.seconds, on_phase=print)
    tokens = {spec.path: plan.round_tokens(spec) for spec in plan.root.clients}
    rows = figures(plan.run_dir, stages, round_tokens=tokens, looks=looks)
    (plan.run_dir / "scaling.json").write_text(json.dumps(as_json(rows), indent=1), encoding="utf-8")
    picture = plan.run_dir / "scaling.png"
    plot(picture, rows, run_dir=plan.run_dir, round_tokens=tokens, looks=looks)
    Console().print(table(rows))
    print(f"plot: {picture}")
    print(f"updates lost or applied twice: {sum(len(proof.lost) + len(proof.twice) for proof in proofs(plan.run_dir))}")


if __name__ == "__main__":
    main()
