"""Scripts of faults on purpose: how they are read, and what is no fault."""

from __future__ import annotations

from typing import Any

import pytest

from worldlm_ray.errors import ConfigError
from worldlm_ray.plan.faults import Faults

KINDS = {"world": "world", "world/north": "federation", "world/north/a": "client"}


def test_a_script_is_read_line_by_line() -> None:
    script = Faults.parse(["20s kill world", "1.5s delay world/north by 2s for 10s"], kinds=KINDS)
    assert script.of("world", kind="kill")[0].at_s == 20.0
    assert script.delay_s("world/north", 11.0) == 2.0
    assert script.delay_s("world/north", 11.6) == 0.0
    assert not script.now("world/north", "cut", 2.0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("kill world", "is not a fault"),
        ("3s explode world", "there is no fault 'explode'"),
        ("3s kill world/south", "there is no node 'world/south'"),
        ("3s cut world for 2s", "the world has no parent"),
        ("3s cut world/north", "does not say how long"),
        ("3s delay world/north for 2s", "`by` belongs to delay"),
        ("3s cut world/north by 1s for 2s", "`by` belongs to delay"),
        ("3s leave world", "the world cannot leave itself"),
        ("3s leave world/north/a for 2s", "leave takes no `for`"),
        ("3s join world/north/a by 2s", "`by` belongs to delay"),
        (7, "is not a fault"),
    ],
)
def test_a_line_that_is_no_fault_is_an_error_with_a_cure(line: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"^faults\[1\]") as caught:
        Faults.parse(["1s kill world", line], kinds=KINDS)
    assert problem in str(caught.value)
    assert caught.value.cure


def test_clients_leave_and_join_in_turn() -> None:
    script = Faults.parse(["20s leave world/north", "30s join world/north/a"], kinds=KINDS)
    assert [script.is_member("world/north/a", now_s) for now_s in (0.0, 20.0, 29.9, 30.0)] == [True, False, False, True]
    assert not script.comes_late("world/north/a")
    late = Faults.parse(["30s leave world/north/a", "20s join world/north/a"], kinds=KINDS)
    assert late.comes_late("world/north/a")
    assert [late.is_member("world/north/a", now_s) for now_s in (0.0, 20.0, 30.0)] == [False, True, False]
    with pytest.raises(ConfigError, match=r"^faults\[0\].*would join twice in a row"):
        Faults.parse(["20s join world/north/a", "10s join world/north"], kinds=KINDS)
