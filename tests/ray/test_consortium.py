"""Three organisations on three hosts, over slow lines: a kill and an absence cost no update, and nothing leaks."""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts import hosts, why_not
from support.sites import PORT, Consortium, Site, is_clear, payloads
from support.slow_links import Quality, why_no_link
from support.two_clusters import whole_trail
from support.worlds import TINY_MODEL, WORDS, client

from worldlm_ray.config.loading import load
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.reports.border import border_lines

REASON = why_not(tools=["nft"]) or why_no_link()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]
LINE = Quality(mbit_per_s=100.0, round_trip_s=0.08, loss=0.01)
AWAY_S, LONG_AWAY_S = 60.0, 180.0
"""How long one member is cut off; the second with `--soak`."""
SETTINGS = {
    "model": TINY_MODEL | {"hidden_size": 64, "intermediate_size": 192},
    "budget": {"rounds": 10_000},
    "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
    "evaluation": {"tokens": 64, "final_tokens": 128},
    "checkpoint": {"every_s": 2.0, "every_updates": 4},
    "liveness": {"heartbeat_s": 0.5, "grace_s": 5.0},
    "aggregation": {"buffer_size": 2},
}
EAST, WEST, OWN = "world/east", "world/west", "world/own"
MARK = "zanzibar"
"""A word that stands in the text of one member only."""


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    folder, shared = tmp_path / "hosts", tmp_path / "shared"
    for each in (folder, shared):
        each.mkdir()
    with hosts(folder, shared, 3, with_ssh=False, far={2: LINE, 3: LINE}) as made:
        three = Consortium(made, SETTINGS)
        yield three
        for site in three.sites:
            site.kill()


def test_a_kill_and_an_absence_cost_no_update(
    consortium: Consortium, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    world, east, west = organisations(consortium, tmp_path)
    for site in (world, east, west):
        site.start()
    for path in (OWN, EAST, WEST):
        world.until(lambda path=path: world.accepted(path) >= 3, at_most_s=240.0)

    world.kill_actor("world")
    before = {path: world.accepted(path) for path in (OWN, EAST, WEST)}
    took_s = world.until(lambda: all(world.accepted(path) > before[path] for path in before), at_most_s=60.0)
    print(f"the world is killed: an update of each member {took_s:.1f} s later")

    away_s = LONG_AWAY_S if pytestconfig.getoption("--soak") else AWAY_S
    consortium.hosts.unplug(3)
    time.sleep(2.0)  # what was on its way has come or is lost
    before = {path: world.accepted(path) for path in (OWN, EAST, WEST)}
    alone = west.accepted(f"{WEST}/w1")
    for _ in range(3):  # all the time
        then = {path: world.accepted(path) for path in (OWN, EAST)}
        time.sleep(away_s / 3)
        assert all(world.accepted(path) > then[path] for path in then), "the others wait"
    assert world.accepted(WEST) == before[WEST]
    print(f"away for {away_s:.0f} s: {OWN} {world.accepted(OWN) - before[OWN]} updates more,", end=" ")
    print(f"{EAST} {world.accepted(EAST) - before[EAST]}, in {WEST} {west.accepted(f'{WEST}/w1') - alone}")
    assert west.accepted(f"{WEST}/w1") > alone, "the member waits"
    consortium.hosts.plug(3)
    took_s = world.until(lambda: world.accepted(WEST) > before[WEST], at_most_s=60.0)
    print(f"back: its next update {took_s:.1f} s later")

    for site, paths in ((world, (EAST, WEST)), (east, ("world",)), (west, ("world",))):
        status = site.status()
        print(*border_lines(status), sep="\n")
        assert all(status["nodes"][path]["border"]["accepted"] > 0 for path in paths)
    initial = build.initial(make_plan(load(str(world.file))))
    for site in (east, west, world):
        assert site.stop()["status"] == "stopped"
        for proof in whole_trail(site.run_dir):
            print(f"{proof.sender} -> {proof.node}: {len(proof.applied)} applied, {proof.again} again, 0 lost, 0 twice")
    dialled_one_port(consortium)
    nothing_is_clear(consortium, tmp_path, initial.tobytes())


def organisations(consortium: Consortium, folder: Path) -> tuple[Site, Site, Site]:
    """A world with one client, and two members: a federation of two clients, and one of one."""
    shared = consortium.hosts.shared
    east = [client(f"e{number}", shared, number) for number in range(2)]
    west = [client("w1", shared, 7)]
    for tree in (*east, *west):
        [file] = tree["data"]["files"]
        Path(file).write_text(Path(file).read_text().replace(WORDS[0], MARK))
    members = [{"member": "east", "required": True}, {"member": "west", "required": True}]
    world = consortium.world([client("own", shared, 9), *members])
    tree = {"federation": EAST, "children": east}
    return (
        world,
        consortium.member(2, "east", tree),
        consortium.member(3, "west", {"federation": WEST, "children": west}),
    )


def dialled_one_port(consortium: Consortium) -> None:
    """The members' firewalls have let through the gateway's port alone, and nothing has tried another one."""
    dial = f"import socket; socket.create_connection(({consortium.address!r}, 6379), timeout=2.0)"
    for host in (2, 3):
        packets = consortium.packets(host)
        print(f"host {host}: {packets['border']} packets of the border, {packets['elsewhere']} elsewhere")
        assert packets["border"] > 1_000
        assert packets["elsewhere"] == 0
        # The counter can count: a port of Ray is refused.
        tried = subprocess.run([*consortium.hosts.inside(host), sys.executable, "-c", dial], stderr=subprocess.DEVNULL)
        assert tried.returncode != 0
        assert consortium.packets(host)["elsewhere"] > 0


def nothing_is_clear(consortium: Consortium, folder: Path, initial: bytes) -> None:
    """No text, no pickle and no number of the model can be read on the lines."""
    secrets = {"text": MARK.encode()}
    secrets |= {f"fp32 at {at}": initial[at : at + 32] for at in range(0, len(initial) - 32, len(initial) // 64)}
    for host, link in consortium.hosts.links.items():
        streams = payloads(link.captured, port=PORT)
        crossed = b"".join(streams.values())
        print(f"host {host}: {len(link.captured)} frames, {len(crossed)} bytes in {len(streams)} streams, ", end="")
        print(f"{link.dropped} frames lost; deflate leaves {len(zlib.compress(crossed, 1)) / len(crossed):.1%}")
        assert len(crossed) > 4 * len(initial), "updates and models have crossed"
        assert is_clear(crossed, secrets) == []
        assert len(zlib.compress(crossed, 1)) > 0.97 * len(crossed)
