"""What a member's operator types about its link, and either side's about charters: one line each, with its cure."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.borders import ALIKE, IMPOSED, Border, NodeAsParent, a_border
from support.gateway import make_member, make_world, moved_to
from support.gateway_commands import refused, run
from support.guards import write
from support.nodes import a_node
from support.worlds import TINY_MODEL, client

from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.gateway import policy, sent
from worldlm_ray.gateway.charter import impose
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.standing import Standing, State
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (100,)), ("head.weight", (7,))], ["head.*"], layers=0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def profile(here: Path) -> Profile:
    """A member whose world has shown two charters, of which the first is accepted."""
    world = make_world(here / "gateway")
    made = make_member(world, here / "profile")
    one = impose(world.identity, "world", ALIKE, IMPOSED)
    Standing(made.folder).accept(one)
    for signed in (one, impose(world.identity, "world", ALIKE | {"budget.rounds": "9"}, IMPOSED)):
        made.charters.keep(signed)
    return made


# ---- charters ----------------------------------------------------------------------------------------------------


def test_a_charter_is_shown_at_either_side(profile: Profile) -> None:
    for words in (("charter", "show", "profile"), ("charter", "show", "gateway"), ("charter", "show")):
        shown = run(*words).stdout
        assert "charter 2 of world" in shown
        assert "budget.rounds                      9" in shown
        assert "exchange.codecs                    fp32 int8" in shown
    assert json.loads(run("charter", "show", "profile", "--epoch", "1", "--json").stdout)["alike"] == ALIKE
    assert "there is no charter 5; there are 1, 2" in refused("charter", "show", "profile", "--epoch", "5")
    assert "names the folder" not in refused("charter", "show", "nowhere")


def test_what_a_charter_changes_is_shown(profile: Profile) -> None:
    shown = run("charter", "diff", "profile").stdout.splitlines()
    assert shown[0] == "charter 1 -> 2 of world: 1 terms change"
    assert shown[1].split() == ["budget.rounds", "2", "->", "9"]
    assert run("charter", "diff", "gateway").stdout.splitlines() == shown
    assert "charter none -> 1 of world: 4 terms change" in run("charter", "diff", "gateway", "--new", "1").stdout


def test_a_world_sets_its_charter_from_its_configuration(here: Path) -> None:
    make_world(here / "gateway")
    assert "there is no charter yet; begin the world's run" in refused("charter", "show")
    raw: dict[str, Any] = {
        "model": TINY_MODEL,
        "budget": {"tokens": 5_000},
        "gateway": {"listen": "127.0.0.1:0", "codecs": ["int8", "int4"], "least_privacy": {"unit": "record"}},
        "world": {"children": [{"member": "europe", "update_tokens": 700}]},
    }
    (here / "world.yaml").write_text(yaml.safe_dump(raw))
    assert "charter 1 of world is signed" in run("charter", "set", "world.yaml").stdout
    assert "charter 1 of world is signed" in run("charter", "set", "world.yaml").stdout
    imposed = json.loads(run("charter", "show", "--json").stdout)["imposed"]
    assert imposed["exchange.codecs"] == "int8 int4"
    assert (imposed["update_tokens"], imposed["privacy.unit"]) == ("700", "record")
    assert "--epoch: 1 does not rise above 1" in refused("charter", "set", "world.yaml", "--epoch", "1")
    assert "charter 5 of world" in run("charter", "set", "world.yaml", "--epoch", "5").stdout
    (here / "world.yaml").write_text(yaml.safe_dump(raw | {"gateway": raw["gateway"] | {"codecs": ["int7"]}}))
    with pytest.raises(ConfigError, match=r"gateway\.codecs"):
        run("charter", "set", "world.yaml")


# ---- pause and resume --------------------------------------------------------------------------------------------


def test_a_link_is_paused_and_opened(profile: Profile) -> None:
    standing = Standing(profile.folder)
    assert run("pause").stderr == "paused (no run has this link now); `worldlm gateway resume` opens it\n"
    assert standing.state is State.PAUSED
    assert "profile: is paused; `worldlm gateway resume profile` opens it" in refused("pause")
    said = run("resume").stderr
    assert "charter 2 is not accepted: see `worldlm gateway charter diff profile`" in said
    assert (standing.state, standing.accepted[0]) == (State.ACTIVE, 1)
    assert "charter 2 is accepted" in run("resume", "profile", "--accept-charter").stderr
    assert standing.accepted[0] == 2
    standing.run()
    assert run("pause").stderr == "paused; `worldlm gateway resume` opens it\n"


def test_a_charter_that_the_policy_refuses_is_not_accepted(profile: Profile) -> None:
    write(profile.folder, send={"codecs": ["int4"]})
    assert "policy: charter 2 of world asks for more" in refused("resume", "--accept-charter")
    assert Standing(profile.folder).accepted[0] == 1


# ---- log and preview ---------------------------------------------------------------------------------------------


def test_what_has_left_and_what_would_leave_is_shown(profile: Profile) -> None:
    assert run("log").stdout == "nothing has left yet\n"
    assert "no update has been made yet" in refused("preview")
    log = sent.Sent(profile.folder)
    log.add(1e9, "join")
    log.beat()
    log.add(1e9, "push", nbytes=1_004, seq=7, codec="int8", fields={"tokens": 3, "seq": 1}, changed=["tokens"])
    shown = run("log").stdout.splitlines()
    assert shown[0].endswith("join")
    assert shown[1].endswith("1,004 bytes of values, int8; update 7 (tokens 3*, seq 1); 1 heartbeats before")
    assert shown[2].startswith("1,004 bytes of updates on 2001-09-")
    assert [line["request"] for line in json.loads(run("log", "--json", "--last", "1").stdout)] == ["push"]

    residual = {"layer": "head.weight", "origin": "world/europe/rome", "values": bytes(28)}
    log.waits({"seq": 8, "tokens": 12_345, "residuals": [residual], "low": b"xx"}, 1_004, "paused by the operator")
    write(profile.folder, fields={"tokens": "rounded", "residuals": "none"})
    lines = run("preview").stdout.splitlines()
    assert lines[0] == "update 8 waits: paused by the operator"
    assert [line.split()[0] for line in lines[1:]] == ["values", "seq", "tokens", "residual"]
    assert lines[3].split() == ["tokens", "12345", "rounded", "to", "12000"]
    assert lines[4].endswith("removed")
    assert "head.weight of world/europe/rome, 28 bytes" in lines[4]


@pytest.mark.parametrize("name", ["log", "preview", "pause", "resume", "leave"])
def test_a_profile_that_is_not_there_is_named(here: Path, name: str) -> None:
    assert "nowhere: there is no such profile; run `worldlm gateway join LINE" in refused(name, "nowhere")


# ---- over the border ---------------------------------------------------------------------------------------------


@pytest.fixture
def border(here: Path) -> Iterator[Border]:
    """A gateway in another thread, since commands have their event loops."""
    loop, ready, stop, found = asyncio.new_event_loop(), threading.Event(), asyncio.Event(), list[Border]()

    async def serve() -> None:
        node = a_node(layout=LAYOUT, initial=np.zeros(LAYOUT.size, np.float32), children=("a",))
        async with a_border(here, NodeAsParent(node), LAYOUT, alike=ALIKE | {"model.layout": LAYOUT.hash}) as made:
            found.append(made)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(20.0)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10.0)
    loop.close()


def an_invitation(border: Border) -> str:
    """A line that names the port at which the gateway listens."""
    border.world.identity.port = border.port
    return border.world.invite("world/a", expires_s=600.0).line


def test_a_charter_that_the_policy_refuses_ends_the_join_before_anything_is_written(border: Border, here: Path) -> None:
    line = an_invitation(border)
    (here / "policy.yaml").write_text("send: {codecs: [int4]}\n")
    said = refused("join", line, "--policy", "policy.yaml")
    assert "policy: charter 1 of world asks for more: exchange.codecs is fp32, int8, and send.codecs int4" in said
    assert not (here / "profile").exists()
    (here / "policy.yaml").write_text("send: {codecs: [int8]}\n")
    assert "world/a has joined" in run("join", line, "--policy", "policy.yaml").stderr  # the invitation is good still
    profile = Profile(here / "profile")
    assert policy.of_profile(profile.folder).send.codecs == ["int8"]
    assert profile.charters.epochs() == [1]
    assert Standing(profile.folder).accepted[0] == 1


def test_a_stranger_without_the_invitation_s_secret_sees_no_charter(border: Border, here: Path) -> None:
    from dataclasses import replace

    from worldlm_ray.gateway.invitation import read_invitation

    real = read_invitation(an_invitation(border))
    forged = replace(real, secret=bytes(len(real.secret)))
    assert "bad_invitation: there is no such invitation" in refused("join", forged.line)
    assert not (here / "profile").exists()


def test_a_member_leaves_without_a_run(border: Border, here: Path) -> None:
    make_member(border.world, here / "profile", "world/a")
    moved_to(here / "profile", border.port)
    assert "world/a has left" in run("leave").stderr
    assert Standing(here / "profile").state is State.LEFT
    assert border.world.registry.members()["world/a"].state == "revoked"
    assert "has left already; to come back, ask the world's operator to readmit it" in refused("leave")


def test_a_member_with_a_run_leaves_at_its_end(profile: Profile) -> None:
    Standing(profile.folder).run()
    assert "the run ends after the rounds that are under way" in run("leave").stderr
    assert Standing(profile.folder).state is State.LEAVING


def test_a_world_that_cannot_be_reached_hears_of_no_leaving(profile: Profile) -> None:
    moved_to(profile.folder, 1)
    assert "run it again when the world can be reached" in refused("leave")
    assert Standing(profile.folder).state is State.ACTIVE


# ---- check -------------------------------------------------------------------------------------------------------


@pytest.fixture
def joined(border: Border, here: Path) -> Path:
    """A profile of a member of the border's world."""
    make_member(border.world, here / "profile", "world/a")
    return moved_to(here / "profile", border.port).folder


def a_configuration(folder: Path, **changes: Any) -> None:
    raw = {"model": TINY_MODEL, "budget": {"rounds": 5}, "joins": "profile", "world": client("solo", folder, 1)}
    (folder / "europe.yaml").write_text(yaml.safe_dump(raw | {"world": raw["world"] | {"client": "world/a"}} | changes))


def test_a_look_at_all_says_with_its_exit_code_whether_it_is_well(joined: Path, here: Path) -> None:
    done = run("check")
    assert done.exit_code == 0, done.output
    assert all(line.startswith("ok    ") for line in done.stdout.splitlines())
    assert done.stdout.splitlines()[-1] == "ok    link: open; no run has it now"
    run("pause")
    done = run("check", "profile")
    assert done.exit_code == 1
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG ")]
    assert wrong == ["WRONG link: paused by the operator; run `worldlm gateway resume profile`"]


def test_a_configuration_is_compared_with_the_charter_and_names_the_profile(joined: Path, here: Path) -> None:
    a_configuration(here)
    done = run("check", "--conf", "europe.yaml")
    assert done.exit_code == 1
    said = "WRONG configuration: budget.rounds is '5' at world/a, and '2' in charter 1 of world: have it alike on both"
    assert said in done.stdout
    assert "--conf FILE" not in done.stdout
    a_configuration(here, joins="nowhere")
    assert "nowhere: there is no such profile" in refused("check", "--conf", "europe.yaml")
    a_configuration(here, joins=None, world={"children": [client("b", here, 2)]})
    with pytest.raises(ConfigError, match=r"joins: is not given in europe\.yaml"):
        run("check", "--conf", "europe.yaml")


def test_a_run_shows_what_the_line_is_good_for(joined: Path, here: Path) -> None:
    from worldlm_ray.config.schema import BudgetConfig
    from worldlm_ray.records import BorderRecord
    from worldlm_ray.tracking.tracker import Tracker

    facts: dict[str, Any] = {"mbit_up": 8.0, "mbit_down": 8.0, "parameters": 1_000, "codec": "fp32", "overlap": False}
    facts |= {"bytes_up": 1, "bytes_down": 1, "resumed": 0, "accepted": 1, "refused": {}, "tau": 0}
    facts |= {"certificate_days": 30.0, "offline_s": 0.0}

    def pushed(*, every_s: float | None) -> None:
        record = BorderRecord(node="world", now_s=1.0, every_s=every_s, **facts)
        tracker = Tracker(here / "run", kinds={"world": "remote"}, hparams={}, budget=BudgetConfig(rounds=1))
        tracker.record(record)
        tracker.close()

    pushed(every_s=None)
    assert "ok    line: the run has not pushed two updates over a border yet" in run("check", "--run", "run").stdout
    pushed(every_s=50.0)
    assert "ok    line: clients are busy for 100%" in run("check", "--run", "run").stdout
    with pytest.raises(RunError, match="there is no run in 'elsewhere'"):
        run("check", "--run", "elsewhere")
