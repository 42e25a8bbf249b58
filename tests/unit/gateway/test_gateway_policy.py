"""What a member's policy refuses: of a charter, of its own run, of a request, and in its own file."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.guards import write
from support.worlds import client

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import policy
from worldlm_ray.gateway.charter import Charter
from worldlm_ray.gateway.policy import Policy, rounded
from worldlm_ray.plan.plan import Plan

Tiny = Callable[..., Plan]
TERMS = {"exchange.codecs": "fp32 int8", "model.parameters": "1000", "fields": "tokens started_tokens"}
HEADER: dict[str, Any] = {"tokens": 123_456, "started_tokens": 999, "seq": 4_321, "residuals": [{"layer": "head"}]}


def a_policy(folder: Path, **sections: Any) -> Policy:
    return policy.load(write(folder, **sections))


def a_charter(**imposed: str) -> Charter:
    return Charter(world="w", node="world", epoch=3, imposed=TERMS | imposed)


# ---- against a charter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "imposed", "said"),
    [
        ({"send": {"codecs": ["int4"]}}, {}, "exchange.codecs is fp32, int8, and send.codecs int4"),
        ({"send": {"bytes_per_day": 900}}, {}, "an update has 1,004 bytes, and send.bytes_per_day is 900"),
        ({"fields": {"tokens": "rounded"}}, {"fields": "tokens weight"}, "fields.tokens is rounded"),
    ],
)
def test_a_charter_that_asks_for_more_is_refused(
    tmp_path: Path, sections: dict[str, Any], imposed: dict[str, str], said: str
) -> None:
    with pytest.raises(Refused, match="policy: charter 3 of world asks for more") as error:
        a_policy(tmp_path, **sections).judge(a_charter(**imposed))
    assert said in error.value.detail


def test_every_conflict_stands_in_one_line(tmp_path: Path) -> None:
    strict = a_policy(tmp_path, send={"bytes_per_day": 10, "codecs": ["int8"]}, fields={"tokens": "rounded"})
    with pytest.raises(Refused) as error:
        strict.judge(a_charter(fields="weight"))
    assert str(error.value).count(", and ") >= 2
    assert "\n" not in str(error.value)


def test_a_policy_without_a_key_refuses_nothing(tmp_path: Path) -> None:
    Policy().judge(a_charter())
    assert policy.of_profile(tmp_path) == Policy()
    assert policy.load(write(tmp_path)) == Policy()


# ---- against the run ---------------------------------------------------------------------------------------------


def a_run(tiny: Tiny, folder: Path, **top: Any) -> Plan:
    tree = {"federation": "world/a", "children": [client("b", folder, 2), client("c", folder, 3)]} | top
    return tiny(world=tree, joins="profile")


def test_the_privacy_of_every_client_is_compared(tiny: Tiny, tmp_path: Path) -> None:
    asked = a_policy(tmp_path, require={"privacy": {"unit": "record", "target_epsilon": 4}})
    with pytest.raises(Refused, match=r"policy: .*privacy\.unit: is none at world/a/b, and record is asked for"):
        asked.check_run(a_run(tiny, tmp_path))
    private = {"unit": "record", "target_epsilon": 8.0}
    with pytest.raises(Refused, match=r"privacy\.target_epsilon: is 8\.0 at world/a/b, and 4\.0 is asked for"):
        asked.check_run(a_run(tiny, tmp_path, privacy=private))
    asked.check_run(a_run(tiny, tmp_path, privacy=private | {"target_epsilon": 4.0}))


@pytest.mark.parametrize(
    ("aggregation", "unit", "enough"),
    [
        ({"buffer_size": 2}, "client", True),
        ({"buffer_size": 1}, "client", False),
        ({"buffer_size": 2}, "none", False),  # both may be of one client
        ({"trigger": "synchronous"}, "client", False),  # of those that live
        ({"trigger": "time_up", "quorum": 2}, "client", True),
    ],
)
def test_an_update_is_the_work_of_so_many_clients_at_least(
    tiny: Tiny, tmp_path: Path, aggregation: dict[str, Any], unit: str, enough: bool
) -> None:
    privacy = {"unit": unit} | ({} if unit == "none" else {"noise_multiplier": 1.0, "max_updates": 4})
    plan = a_run(tiny, tmp_path, aggregation=aggregation, privacy=privacy)
    asked = a_policy(tmp_path, require={"min_clients": 2})
    if enough:
        asked.check_run(plan)
    else:
        with pytest.raises(Refused, match=r"may be the work of 1, and require\.min_clients is 2; set privacy\.unit"):
            asked.check_run(plan)


def test_an_update_with_a_member_s_part_is_the_work_of_one_client_at_least(tiny: Tiny, tmp_path: Path) -> None:
    gateway = {"listen": "127.0.0.1:8443", "dir": str(tmp_path)}
    europe = {"federation": "world/europe", "children": [client("a", tmp_path, 1), {"member": "france"}]}
    plan = tiny(world=europe, gateway=gateway, joins=str(tmp_path))
    a_policy(tmp_path).check_run(plan)
    with pytest.raises(Refused, match=r"may be the work of 1, and require\.min_clients is 2"):
        a_policy(tmp_path, require={"min_clients": 2}).check_run(plan)


def test_the_run_s_codec_must_be_allowed(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"exchange\.codec is fp32 at world/a, and not in send\.codecs; set it to one of"):
        a_policy(tmp_path, send={"codecs": ["int8"]}).check_run(a_run(tiny, tmp_path))


# ---- what is sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "residuals"), list(itertools.product(["exact", "rounded"], ["all", "none"])), ids="-".join
)
def test_each_field_is_as_the_policy_leaves_it(tmp_path: Path, tokens: str, residuals: str) -> None:
    found = a_policy(tmp_path, fields={"tokens": tokens, "residuals": residuals}).allowed(HEADER)
    counts = (123_456, 999) if tokens == "exact" else (120_000, 990)
    assert (found["tokens"], found["started_tokens"]) == counts
    assert found["residuals"] == (HEADER["residuals"] if residuals == "all" else [])
    assert found["seq"] == 4_321
    assert set(found) == set(HEADER)


@pytest.mark.parametrize(("count", "told"), [(0, 0), (1, 1), (99, 99), (100, 100), (109, 100), (1_999_999, 1_900_000)])
def test_a_rounded_count_claims_no_more_than_there_is(count: int, told: int) -> None:
    assert rounded(count) == told


def at(hour: int, minute: int = 0) -> float:
    return time.mktime((2027, 1, 31, hour, minute, 0, 0, 0, -1))


@pytest.mark.parametrize(
    ("hours", "open_", "shut"),
    [("20:00-06:00", (20, 23, 0, 5), (6, 12, 19)), ("08:00-17:30", (8, 12, 17), (18, 0, 7))],
)
def test_the_link_is_open_in_its_hours(
    tmp_path: Path, hours: str, open_: tuple[int, ...], shut: tuple[int, ...]
) -> None:
    found = a_policy(tmp_path, send={"hours": hours})
    assert all(found.is_open(at(hour)) for hour in open_)
    assert not any(found.is_open(at(hour)) for hour in shut)


def test_the_last_day_is_over_at_midnight(tmp_path: Path) -> None:
    (tmp_path / policy.FILE).write_text("stop: {after: 2027-01-31}\n")
    found = policy.load(tmp_path / policy.FILE)
    assert not found.is_over(at(23, 59))
    assert found.is_over(at(23, 59) + 61)


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("send: {rate: 5}", "send.rate: unknown key; did you mean 'rate_mbps'"),
        ("sent: {}", "sent: unknown key; did you mean 'send'"),
        ("send: {bytes_per_day: 0}", "send.bytes_per_day: got 0"),
        ("send: {rate_mbps: 0.1}", "send.rate_mbps: got 0.1; give at least 0.5"),
        ("send: {hours: all}", "send.hours: got 'all'; give HH:MM-HH:MM"),
        ("send: {hours: 25:00-06:00}", "send.hours: got '25:00-06:00'"),
        ("send: {hours: 06:00-06:00}", "send.hours: got '06:00-06:00'"),
        ("send: {codecs: [int7]}", "int7"),
        ("fields: {tokens: some}", "fields.tokens: got 'some'; expected one of exact, rounded"),
        ("fields: {metrics: none}", "fields.metrics: unknown key"),
        ("require: {min_clients: x}", "require.min_clients: got 'x'"),
        ("accept: {max_model_step: .nan}", "accept.max_model_step"),
        ("stop: {after: tomorrow}", "stop.after: got 'tomorrow'; give a day, such as 2027-01-31"),
        ("stop: {after: 2027-02-30}", "stop.after: got '2027-02-30'"),
        ("- a", "expected a mapping of keys"),
        ("a: [", "is not valid YAML"),
        ("send: {codecs: [a]}\nsend: {}", "is not valid YAML"),
    ],
)
def test_a_wrong_policy_is_one_line_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / policy.FILE
    path.write_text(text)
    with pytest.raises(GatewayError) as error:
        policy.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_mutated_policies_are_read_or_refused_by_name(tmp_path: Path) -> None:
    whole = {
        "send": {"bytes_per_day": 5e10, "rate_mbps": 20, "hours": "20:00-06:00", "codecs": ["int8"]},
        "fields": {"tokens": "rounded", "residuals": "none"},
        "require": {"privacy": {"unit": "record", "target_epsilon": 8.0}, "min_clients": 4},
        "accept": {"max_model_step": 2.0, "charter": "ask"},
        "stop": {"after": "2027-01-31"},
    }
    raw, random_, path, said = yaml.safe_dump(whole).encode(), random.Random(3), tmp_path / policy.FILE, []
    assert policy.load(write(tmp_path, **whole)).require.min_clients == 4
    for _ in range(500):
        changed = bytearray(raw)
        for _ in range(random_.randint(1, 4)):
            place = random_.randrange(len(changed))
            changed[place : place + random_.randint(0, 3)] = random_.randbytes(random_.randint(0, 3))
        path.write_bytes(bytes(changed))
        try:
            policy.load(path)
        except GatewayError as error:
            said.append(str(error))
    assert len(said) > 100
    assert [line for line in said if "\n" in line or not line.startswith(f"{path}: ")] == []


def test_a_policy_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / policy.FILE).write_text("#" * 70_000)
    with pytest.raises(GatewayError, match="has 70,000 bytes, expected at most 65,536"):
        policy.load(tmp_path / policy.FILE)
