"""A border below a border: a member that has members itself. Updates travel up over both, and models come down."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from support.borders import Border, a_border, run
from support.trails import TrailedParent
from support.worlds import client

from worldlm_ray.aggregation.events import Command, Exchange, ParentModel, UpdateDue, UpdateSent
from worldlm_ray.exchange.messages import Model, Update, buffer_of
from worldlm_ray.exchange.outbox import Outbox
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway import terms
from worldlm_ray.gateway.receipts import FOLDER, RECEIVED, SENT, run_id
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol.child import Sleep, Steps, Uplink
from worldlm_ray.protocol.node_child import NodeAsChild
from worldlm_ray.reports import receipts
from worldlm_ray.tracking.audit import proofs

Tiny = Callable[..., Plan]
T = TypeVar("T")
WORLD, EUROPE, FRANCE = "world", "world/europe", "world/europe/france"

pytestmark = pytest.mark.usefixtures("quick")


class Killed(Exception):
    """The process has ended here."""


async def follow(steps: Steps[T], parent: Any) -> T:
    """Take the steps of a child's protocol; the parent may be behind a border."""
    answer, error = None, None
    while True:
        try:
            step = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as end:
            return end.value
        answer, error = None, None
        if isinstance(step, Sleep):
            continue
        arguments = step.arguments
        if step.method == "push":
            arguments = (*arguments[:-1], buffer_of(arguments[-1]))
        try:
            answer = await getattr(parent, step.method)(*arguments)
        except Killed:
            raise
        except Exception as refusal:  # noqa: BLE001 - the steps know what to do with it
            error = refusal


class Middle(TrailedParent):
    """A federation that has members and is one: what actors/federation.py does, without Ray.

    Args:
        plan: of its run.
        parent: what stands for its parent.
    """

    def __init__(self, plan: Plan, parent: Any, run_dir: Path) -> None:
        super().__init__(build.inner_node(plan, plan.top, build.initial(plan)), run_dir)
        self.parent = parent
        self.uplink = Uplink(plan, EUROPE, NodeAsChild(self.node), tell=lambda record: None, now_s=self._now)
        self.has_joined = False
        self.killed_after = ""
        self._perform(self.due)

    async def exchange(self) -> None:
        """Bring the parent what is due, and its model."""
        if not self.has_joined:
            self.has_joined = True
            await follow(self.uplink.join(), self.parent)
        while self.node.in_flight is not None or self.node.wants_refresh:
            if self.node.in_flight is not None:
                self.save()
                self._at("save")
                self.node.handle(UpdateSent())
                await follow(self.uplink.push(self.node.in_flight), self.parent)
                self._at("push")
            model = await follow(self.uplink.pull(), self.parent)
            self._at("pull")
            self._take("refresh", ParentModel(model=model, now_s=self._now()))

    def _take(self, method: str, event: Any) -> list[Any]:
        commands = super()._take(method, event)
        self._perform(commands)
        return commands

    def _perform(self, commands: list[Command]) -> None:
        if any(isinstance(command, Exchange) for command in commands):
            self.node.handle(UpdateDue())

    def _at(self, point: str) -> None:
        if point == self.killed_after:
            self.killed_after = ""
            raise Killed


@dataclass
class Client:
    """A client without training, as `Uplink` needs it."""

    size: int
    incarnation: int = 1
    seq: int = 0
    outbox: Outbox = field(default_factory=Outbox)
    started_tokens: int = 0
    verdicts: list[str] = field(default_factory=list)

    def welcomed(self, welcome: Welcome) -> None:
        self.outbox.durable(welcome.durable_seq)

    def answered(self, seq: int, verdict: Verdict) -> None:
        self.verdicts.append(verdict.reason)
        self.outbox.durable(verdict.durable_seq)

    def update(self, base: int) -> Update:
        """The next one."""
        self.seq += 1
        self.started_tokens += 10
        values = np.random.default_rng(self.seq).normal(size=self.size).astype(np.float32) / 100
        fields: dict[str, Any] = {"sender": "france", "seq": self.seq, "base_version": base, "tokens": 10}
        made = Update(**fields, started_tokens=self.started_tokens, values=values)
        self.outbox.add(made)
        return made


@dataclass
class Levels:
    """A world, a member of it with a member, and what stands between them: two borders, or nothing."""

    plan: Plan
    folders: list[Path]
    """Of the runs: the world's, the middle's, the client's."""
    world: TrailedParent
    middle: Middle
    client: Client
    uplink: Uplink
    below: Any
    """What stands for the middle at the client."""
    borders: list[Border] = field(default_factory=list)

    async def round(self) -> Model:
        """The client pulls and pushes, and the middle exchanges with the world; returns what the client got."""
        await self.middle.exchange()
        model = await follow(self.uplink.pull(), self.below)
        assert isinstance(model, Model), model
        await follow(self.uplink.push(self.client.update(model.version)), self.below)
        await self.middle.exchange()
        return model

    async def kill_the_middle(self) -> None:
        """Another process takes its place, which knows what its checkpoint says."""
        self.middle = Middle(self.plan, self.middle.parent, self.folders[1])
        self.borders[1].parent = self.middle
        await self.borders[1].restart()


def plans(tiny: Tiny, folder: Path) -> tuple[Plan, Plan, Plan]:
    """Of the three runs."""
    gateway, joins = {"listen": "127.0.0.1:8443"}, "profile"
    return (
        tiny([{"member": "europe", "required": True}], gateway=gateway),
        tiny(world={"federation": EUROPE, "children": [{"member": "france"}]}, gateway=gateway, joins=joins),
        tiny(world=client("france", folder, 1) | {"client": FRANCE}, joins=joins),
    )


@asynccontextmanager
async def levels(tiny: Tiny, folder: Path, *, borders: bool = True) -> AsyncIterator[Levels]:
    """All three, with two borders between them or with none."""
    top, plan, last = plans(tiny, folder)
    place = folder / ("borders" if borders else "none")
    folders = [place / "world" / "run", place / "europe" / "run", place / "france"]
    world = TrailedParent(build.inner_node(top, top.root, build.initial(top)), folders[0])
    leaf = Client(plan.layout.size)
    uplink = Uplink(last, FRANCE, leaf, tell=lambda record: None, now_s=lambda: 0.0)
    if not borders:
        middle = Middle(plan, world, folders[1])
        await follow(uplink.join(), middle)
        yield Levels(plan, folders, world, middle, leaf, uplink, middle)
        return
    options = [{"sealed": True, "run": run_id(each / FOLDER)} for each in folders[:2]]
    async with a_border(folders[0].parent, world, plan.layout, **options[0]) as upper:
        middle = Middle(plan, upper.sealed_link(EUROPE, run_dir=folders[1]), folders[1])
        async with a_border(folders[1].parent, middle, plan.layout, node=EUROPE, **options[1]) as lower:
            below = lower.sealed_link(FRANCE, run_dir=folders[2])
            await follow(uplink.join(), below)
            yield Levels(plan, folders, world, middle, leaf, uplink, below, [upper, lower])


def sent(folder: Path, path: str) -> Path:
    return folder / FOLDER / SENT / f"{path}.jsonl"


def received(folder: Path, path: str) -> Path:
    return folder / FOLDER / RECEIVED / f"{path}.jsonl"


def proved(folders: list[Path]) -> list[tuple[str, str, int, int]]:
    """What all three prove by the files of their neighbours: member, side, updates accepted, and accepted again."""
    world, europe, france = folders
    neighbours = [
        (world, [sent(europe, EUROPE)]),
        (europe, [received(world, EUROPE), sent(france, FRANCE)]),
        (france, [received(europe, FRANCE)]),
    ]
    found = []
    for run_dir, files in neighbours:
        border = receipts.look(run_dir, files)
        assert border.holds, border.lines()
        found += [(proof.member, proof.side, proof.accepted, proof.again) for proof in border.proofs]
    for run_dir in folders[:2]:
        whole = proofs(run_dir)
        assert whole
        assert all(proof.holds for proof in whole), whole
    return found


# ---- tests --------------------------------------------------------------------------------------------------------


def test_the_three_runs_fit_each_other(tiny: Tiny, tmp_path: Path) -> None:
    top, middle, last = plans(tiny, tmp_path)
    assert middle.kinds == {WORLD: "remote", EUROPE: "federation", FRANCE: "remote"}
    assert [spec.path for spec in middle.root.members] == [FRANCE]
    assert terms.alike(top, top.root) == terms.alike(middle, middle.root)
    assert terms.alike(middle, middle.top) == terms.alike(last, last.node(EUROPE))
    assert terms.imposed(middle, middle.top)["exchange.codecs"] == "fp32"


def test_updates_go_up_over_two_borders_and_models_come_down_with_the_bits_of_one_cluster(
    tiny: Tiny, tmp_path: Path
) -> None:
    async def three_rounds(*, borders: bool) -> tuple[list[Any], list[Path]]:
        async with levels(tiny, tmp_path, borders=borders) as found:
            models = [await found.round() for _ in range(3)]
            last = await follow(found.uplink.pull(), found.below)
            assert isinstance(last, Model)
            assert found.client.verdicts == ["accepted"] * 3
            assert found.world.accepted == [("europe", seq) for seq in (1, 2, 3)]
            seen = [(model.version, model.values.tobytes()) for model in [*models, last]]
            return [*seen, found.world.node.version, found.world.node.theta.tobytes()], found.folders

    async def both() -> None:
        here, _ = await three_rounds(borders=False)
        there, folders = await three_rounds(borders=True)
        assert there == here
        assert len({values for _, values in here[:4]}) == 4, "each model that came down is another one"
        assert here[3][1] == here[5], "the last one is the world's"
        assert proved(folders) == [
            (EUROPE, "received", 3, 0),
            (EUROPE, "sent", 3, 0),
            (FRANCE, "received", 3, 0),
            (FRANCE, "sent", 3, 0),
        ]

    run(both())


@pytest.mark.parametrize("point", ["save", "push", "pull"])
def test_a_middle_that_is_killed_loses_nothing_and_sends_nothing_twice(tiny: Tiny, tmp_path: Path, point: str) -> None:
    async def work() -> None:
        async with levels(tiny, tmp_path) as found:
            await found.round()
            found.middle.killed_after = point
            with pytest.raises(Killed):
                await found.round()
            await found.kill_the_middle()
            await found.round()
            assert found.client.seq == 3
            assert [seq for _, seq in found.world.accepted] == sorted({seq for _, seq in found.world.accepted})
            counts = {(member, side): accepted for member, side, accepted, _ in proved(found.folders)}
            assert counts[FRANCE, "received"] == 3
            assert counts[EUROPE, "received"] == len(found.world.accepted) == found.middle.node.seq

    run(work())
