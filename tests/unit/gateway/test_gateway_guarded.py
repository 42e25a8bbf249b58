"""A member's policy in front of its link: what it keeps back stays with the caller, and comes when it may."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.borders import ALIKE, IMPOSED, run
from support.guards import Guarded, guarded, write
from support.worlds import client

from worldlm_ray.errors import GatewayError, MessageError, Refused
from worldlm_ray.exchange.messages import Update, pack_header, read_header, unpack_model
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.gateway import guarded as module
from worldlm_ray.gateway import policy, sent, standing
from worldlm_ray.gateway.charter import impose
from worldlm_ray.gateway.guard import Guard
from worldlm_ray.gateway.standing import Standing, State
from worldlm_ray.plan.plan import Plan

Tiny = Callable[..., Plan]
TOKENS = 12_345


@pytest.fixture
def plan(tiny: Tiny, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    return tiny(world=client("a", tmp_path, 1) | {"client": "world/a"}, joins="profile")


def an_update(plan: Plan, seq: int) -> Update:
    values = np.full(plan.layout.size, 0.5, np.float32)
    return Update(sender="a", seq=seq, base_version=0, tokens=TOKENS, started_tokens=TOKENS, values=values)


async def push(member: Guarded, plan: Plan, seq: int) -> Verdict:
    update = an_update(plan, seq)
    return await member.parent.push("a", 1, 1, pack_header(update, plan.layout), update.values)


def with_a(tmp_path: Path, plan: Plan, work: Callable[[Guarded], Any], *, initial: Any = None, **sections: Any) -> None:
    async def all_of_it() -> None:
        start = np.ones(plan.layout.size, np.float32) if initial is None else initial
        async with guarded(tmp_path, plan, start, **sections) as member:
            await work(member)

    run(all_of_it())


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


# ---- what goes ---------------------------------------------------------------------------------------------------


def test_fields_go_as_the_policy_leaves_them_and_the_log_says_what_went(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        headers: list[dict[str, Any]] = []
        take = member.border.parent.push

        async def spy(sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
            headers.append(read_header(header))
            return await take(sender, incarnation, to, header, values)

        member.border.parent.push = spy
        await member.parent.join("a", 1, 0)
        await member.parent.heartbeat("a", 1, 1)
        assert (await push(member, plan, 1)).accepted
        assert (headers[0]["tokens"], headers[0]["started_tokens"]) == (12_000, 12_000)
        lines = list(sent.lines(member.folder))
        assert [line["request"] for line in lines] == ["join", "push"]
        assert lines[1]["bytes"] == lines[1]["today_bytes"] == plan.layout.nbytes
        assert (lines[1]["seq"], lines[1]["heartbeats"]) == (1, 1)
        assert lines[1]["changed"] == ["tokens", "started_tokens"]
        assert set(lines[1]["fields"]) == set(headers[0])
        found, rows = sent.preview(member.folder, member.guard.policy)
        assert ("tokens", "12345", "rounded to 12000") in rows
        assert ("seq", "1", "as it is") in rows
        assert found["held"] == ""

    with_a(tmp_path, plan, work, fields={"tokens": "rounded"})


def test_without_a_policy_the_header_is_not_touched(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        header = pack_header(an_update(plan, 1), plan.layout)
        assert member.guard.update(header, 4) is header

    with_a(tmp_path, plan, work)


def test_an_update_beyond_the_day_s_bytes_waits_for_the_next_day(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        now = [1e9]
        member.guard._profile.clock = lambda: now[0]
        await member.parent.join("a", 1, 0)
        assert (await push(member, plan, 1)).accepted
        with pytest.raises(MessageError, match=r"unreachable: .* bytes have gone today, and send\.bytes_per_day is"):
            await push(member, plan, 2)
        assert [line["request"] for line in sent.lines(member.folder)] == ["join", "push"]
        joining = asyncio.create_task(member.parent.join("a", 1, 2))
        await until(lambda: member.told[-1][0] == "waiting")
        assert not joining.done()
        assert sent.preview(member.folder, member.guard.policy)[0]["held"].startswith(f"{plan.layout.nbytes:,} bytes")
        again = Guard(member.guard._profile, plan, ALIKE)  # a proxy that was killed knows what has gone
        assert again.sent.today_bytes(now[0]) == plan.layout.nbytes
        now[0] += 86_400
        await joining
        assert (await push(member, plan, 2)).accepted
        assert member.border.parent.accepted == [("a", 1), ("a", 2)]

    with_a(tmp_path, plan, work, send={"bytes_per_day": 1.5 * plan.layout.nbytes})


def test_a_rate_holds_for_updates(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        waits: list[float] = []

        async def note(seconds: float) -> None:
            waits.append(seconds)

        module.Pace.__call__.__globals__["asyncio"].sleep, before = note, asyncio.sleep
        try:
            pace = module.Pace(lambda: member.guard.policy.send.rate_mbps)
            for _ in range(3):
                await pace(1_000_000)  # 4 s each at 2 Mbit/s
        finally:
            asyncio.sleep = before  # type: ignore[assignment]
        assert waits[-1] == pytest.approx(8.0 - module.Pace.__call__.__globals__["BURST_S"], abs=0.2)

    with_a(tmp_path, plan, work, send={"rate_mbps": 2})


# ---- paused, and open again --------------------------------------------------------------------------------------


def test_a_running_link_is_paused_and_goes_on_where_it_was(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        standing = Standing(member.folder)
        await member.parent.join("a", 1, 0)
        asked = asyncio.Event()

        async def for_ever(*_: Any) -> Any:
            asked.set()
            await asyncio.Event().wait()

        member.border.parent.pull, before = for_ever, member.border.parent.pull
        pulling = asyncio.create_task(member.parent.pull("a", 1, 1, 0))
        await asked.wait()
        standing.become(State.PAUSED)
        with pytest.raises(MessageError, match="unreachable: paused by the operator; run `worldlm gateway resume"):
            await asyncio.wait_for(pulling, 2.0)
        with pytest.raises(MessageError, match="paused by the operator"):
            await push(member, plan, 1)
        with pytest.raises(MessageError, match="paused by the operator"):
            await member.parent.heartbeat("a", 1, 1)
        joining = asyncio.create_task(member.parent.join("a", 1, 1))
        await asyncio.sleep(0.1)
        assert not joining.done()
        assert not member.border.parent.accepted
        member.border.parent.pull = before
        standing.become(State.ACTIVE)
        await asyncio.wait_for(joining, 2.0)
        assert (await push(member, plan, 1)).accepted
        assert [event for event, _ in member.told] == ["waiting", "training"]

    with_a(tmp_path, plan, work)


def test_an_edited_policy_counts_at_the_next_request_and_a_bad_one_shuts_the_link(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        path = write(member.folder, send={"codecs": ["int4"]})
        with pytest.raises(MessageError, match=r"exchange\.codec is fp32 at world/a, and not in send\.codecs"):
            await push(member, plan, 1)
        path.write_text("send: {codec: x}")
        with pytest.raises(MessageError, match=re.escape(f"{path}: send.codec: unknown key")):
            await push(member, plan, 1)
        path.unlink()
        assert (await push(member, plan, 1)).accepted

    with_a(tmp_path, plan, work)


def test_a_damaged_word_of_the_operator_shuts_the_link(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        (member.folder / "standing.json").write_text("{")
        with pytest.raises(MessageError, match=r"standing\.json: is not what `worldlm gateway` wrote"):
            await push(member, plan, 1)

    with_a(tmp_path, plan, work)


# ---- charters ----------------------------------------------------------------------------------------------------


def test_a_new_charter_waits_for_the_operator_if_the_policy_says_ask(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        assert Standing(member.folder).accepted[0] == 1  # the first one was accepted by joining
        changed = impose(member.border.world.identity, "world", ALIKE, IMPOSED | {"aggregation.max_staleness": "4"})
        object.__setattr__(member.border.settings, "charter", changed.raw)
        with pytest.raises(MessageError, match=r"unreachable: charter 2 waits to be accepted; .* --accept-charter"):
            await member.parent.join("a", 1, 0)
        joining = asyncio.create_task(member.parent.join("a", 1, 0))
        await asyncio.sleep(0.1)
        assert not joining.done()
        Standing(member.folder).accept(changed)
        await asyncio.wait_for(joining, 2.0)

    with_a(tmp_path, plan, work, accept={"charter": "ask"})


def test_a_hello_reads_once_which_charter_is_accepted(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, names = standing._read, list[str]()

    def counted(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
        names.append(path.name)
        return read(path, kinds)

    async def work(member: Guarded) -> None:
        await member.parent.greet()
        assert Standing(member.folder).accepted[0] == 1
        monkeypatch.setattr(standing, "_read", counted)
        await member.parent.greet()
        assert names.count(standing.ACCEPTED) == 1

    with_a(tmp_path, plan, work)


def test_without_ask_a_charter_that_the_policy_allows_is_accepted(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        changed = impose(member.border.world.identity, "world", ALIKE, IMPOSED | {"aggregation.max_staleness": "4"})
        object.__setattr__(member.border.settings, "charter", changed.raw)
        await member.parent.join("a", 1, 0)
        assert Standing(member.folder).accepted[0] == 2
        refused = impose(member.border.world.identity, "world", ALIKE, IMPOSED | {"exchange.codecs": "int8"})
        object.__setattr__(member.border.settings, "charter", refused.raw)
        with pytest.raises(MessageError, match=r"exchange\.codec is fp32 at world/a, and not in charter 3 of world"):
            await member.parent.join("a", 1, 0)
        with suppress(MessageError):
            await member.parent.join("a", 1, 0)
        assert [event for event, _ in member.told] == ["waiting"]  # told once, however often it is tried
        other = impose(member.border.world.identity, "world", ALIKE | {"budget.rounds": "9"}, IMPOSED)
        object.__setattr__(member.border.settings, "charter", other.raw)
        with pytest.raises(Refused, match=r"budget\.rounds is '2' at world/a, and '9' in charter 4 of world"):
            await member.parent.greet()
        assert Standing(member.folder).accepted[0] == 2

    with_a(tmp_path, plan, work)


@pytest.mark.parametrize(
    ("imposed", "said"),
    [
        ({"liveness.grace_s": "0.01"}, r"liveness\.heartbeat_s is .* at world/a, and liveness\.grace_s 0\.01 in"),
        ({"privacy.unit": "record"}, r"privacy\.unit: is none at world/a, and record is asked for in charter 2"),
        ({"privacy.unit": "magic"}, "bad_charter: privacy.unit is 'magic'"),
        ({"liveness.grace_s": "soon"}, "bad_charter: liveness.grace_s is 'soon' in charter 2, expected a number"),
    ],
)
def test_a_run_that_does_not_fit_the_charter_does_not_begin(
    tmp_path: Path, plan: Plan, imposed: dict[str, str], said: str
) -> None:
    async def work(member: Guarded) -> None:
        changed = impose(member.border.world.identity, "world", ALIKE, IMPOSED | imposed)
        object.__setattr__(member.border.settings, "charter", changed.raw)
        with pytest.raises(Refused, match=said):
            await member.parent.greet()

    with_a(tmp_path, plan, work)


# ---- models ------------------------------------------------------------------------------------------------------


def test_a_model_whose_step_is_too_large_does_not_reach_the_child(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        first = await member.parent.pull("a", 1, 1, 0)
        assert np.array_equal(first.values, np.ones(plan.layout.size, np.float32))
        for scale, taken in ((1.5, True), (9.0, False), (2.0, True)):
            member.border.parent._publish = lambda scale=scale: np.full(plan.layout.size, scale, np.float32)
            found = await member.parent.pull("a", 1, 1, 0)
            assert np.isfinite(found.values).all() == taken
            unpack_model(found, plan.layout)  # it can be read: the child hears what else the parent says
        warned = [text for event, text in member.told if event == "warning"]
        assert warned == [
            "a model of the world is refused: its step of 5 is above accept.max_model_step 1; "
            "ask the world's operator, or raise it"
        ]

    with_a(tmp_path, plan, work, accept={"max_model_step": 1.0})


def test_a_model_with_nan_is_refused_without_any_policy(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        found = await member.parent.pull("a", 1, 1, 0)
        assert member.parent.last_digest == module.REFUSED
        assert np.isnan(found.values).all()
        assert "nan or infinity in the model" in member.told[-1][1]

    initial = np.ones(plan.layout.size, np.float32)
    initial[3] = np.inf
    with_a(tmp_path, plan, work, initial=initial)


# ---- leaving -----------------------------------------------------------------------------------------------------


def test_a_member_that_leaves_ends_its_rounds_and_tells_the_world(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        standing = Standing(member.folder)
        await member.parent.join("a", 1, 0)
        assert not unpack_model(await member.parent.pull("a", 1, 1, 0), plan.layout).finished
        standing.become(State.LEAVING)
        assert unpack_model(await member.parent.pull("a", 1, 1, 0), plan.layout).finished
        assert (await push(member, plan, 1)).accepted  # what is under way still counts
        answers = iter([False, True])

        async def left(*_: Any) -> bool:
            return next(answers)  # first, no checkpoint of the world knows the update

        member.border.parent.left = left
        await member.parent.done("a", 1, 1)
        assert standing.state is State.LEFT
        assert next(answers, None) is None
        with pytest.raises(MessageError, match="revoked"):
            await member.border.link().greet()
        with pytest.raises(GatewayError, match="this member has left"):
            await member.parent.greet()

    with_a(tmp_path, plan, work)


def test_a_member_leaves_by_itself_after_the_last_day(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        await until(lambda: Standing(member.folder).state is State.LEAVING)
        assert ("warning", "the day of stop.after is over: the member leaves") in member.told

    with_a(tmp_path, plan, work, stop={"after": "2020-01-01"})


# ---- the log -----------------------------------------------------------------------------------------------------


def test_nothing_goes_that_the_log_cannot_say(tmp_path: Path, plan: Plan) -> None:
    async def work(member: Guarded) -> None:
        await member.parent.join("a", 1, 0)
        log = member.folder / sent.LOG
        log.unlink()
        log.mkdir()
        with pytest.raises(MessageError, match=r"sent\.jsonl: .*; nothing is sent that the log cannot say: make room"):
            await push(member, plan, 1)
        assert not member.border.parent.accepted
        with suppress(OSError):
            log.rmdir()
        assert (await push(member, plan, 1)).accepted

    with_a(tmp_path, plan, work)


def test_the_log_is_bounded_and_its_newest_lines_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent, "LOG_BYTES", 4_000)
    log = sent.Sent(tmp_path)
    for number in range(200):
        log.add(1e9, "push", nbytes=10, seq=number)
    assert sum((tmp_path / name).stat().st_size for name in (sent.LOG, sent.BEFORE)) < 4_500
    found = list(sent.lines(tmp_path))
    assert [line["seq"] for line in found] == list(range(found[0]["seq"], 200))
    assert sent.Sent(tmp_path).today_bytes(1e9) == 2_000
    assert sent.Sent(tmp_path).today_bytes(1e9 + 2 * 86_400) == 0


def test_a_damaged_preview_is_named(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="no update has been made yet; begin the run first"):
        sent.preview(tmp_path, policy.Policy())
    for text in ("{", "[]", '{"header": 3}', '{"header": {}, "residuals": [1], "bytes": 3}'):
        (tmp_path / sent.NEXT).write_text(text)
        with pytest.raises(GatewayError, match=r"next\.json: is damaged; remove it"):
            sent.preview(tmp_path, policy.Policy())
