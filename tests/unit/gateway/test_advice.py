"""What a line lets a client do, by hand. A model of 1,024,000 parameters has 32.768 megabits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from worldlm_ray.gateway.advice import BUSY, LinkFacts, advice, changes, rounds_longer

FACTS = LinkFacts(parameters=1_024_000, mbit_up=8.192, mbit_down=32.768, round_s=20.0)
"""4 s up and 1 s down."""


def test_a_client_waits_for_what_crosses() -> None:
    assert FACTS.up_s == pytest.approx(4.0)
    assert FACTS.down_s == pytest.approx(1.0)
    assert FACTS.busy == pytest.approx(20 / 25)
    # int8: a byte each, and 4 bytes for each of 1,000 blocks: 8.224 megabits.
    int8 = replace(FACTS, codec="int8")
    assert int8.up_s == pytest.approx(8.224 / 8.192)
    assert int8.busy == pytest.approx(20 / (20 + 8.224 / 8.192 + 1))


def test_with_overlap_it_waits_only_for_the_rest() -> None:
    assert replace(FACTS, overlap=True).busy == 1.0
    assert replace(FACTS, overlap=True, round_s=4.0).busy == pytest.approx(4 / 5)


def test_the_mildest_change_of_each_kind_that_is_enough_is_advised() -> None:
    # bf16: 2 s up, 20 / 23 = 87 %, is not enough; int8 is.
    [codec, overlap, longer] = changes(FACTS)
    assert (codec.text, overlap.text) == ("exchange.codec: int8", "exchange.overlap: true")
    assert codec.busy == pytest.approx(0.9089, abs=1e-4)
    assert overlap.busy == 1.0
    # 5 s are a tenth of 50 s, of which 45 s are a round: 2.25 rounds of today.
    assert longer.text == "training.local_steps: 3 times as many"
    assert longer.busy == pytest.approx(60 / 65)


def test_a_codec_and_an_overlap_together_where_neither_is_enough() -> None:
    # 8 s up, 1 s down, a round of 4 s. With overlap: fp32 4/9, bf16 4/5, int8 4 / (2.008 + 1) and so busy.
    facts = replace(FACTS, mbit_up=4.096, round_s=4.0)
    assert facts.busy == pytest.approx(4 / 13)
    [both, longer] = changes(facts)
    assert both.text == "exchange.codec: int8 with exchange.overlap: true"
    assert both.busy == 1.0
    assert longer.text == "training.local_steps: 21 times as many"  # 9 * 9 = 81 s
    # It has the overlap already: no part of the advice.
    [codec, longer] = changes(replace(facts, overlap=True))
    assert codec.text == "exchange.codec: int8"
    assert longer.text == "training.local_steps: 3 times as many"  # 0.9 * 9 = 8.1 s


def test_where_only_longer_rounds_help() -> None:
    facts = replace(FACTS, codec="int4", mbit_down=1.0, round_s=1.0)
    [longer] = changes(facts)
    assert longer.busy >= BUSY
    assert rounds_longer(replace(facts, overlap=True)) == 30  # 0.9 * (0.531 + 32.768) = 29.97 s


def test_a_busy_client_needs_no_advice() -> None:
    facts = replace(FACTS, round_s=45.0)
    assert facts.busy == pytest.approx(0.9)
    assert rounds_longer(facts) == 1
    assert not list(changes(replace(facts, round_s=45.1)))
    assert advice(replace(facts, round_s=95.0)) == (
        "clients are busy for 95%: an update takes 4.0 s up and a model 1.0 s down, a round 95.0 s"
    )


def test_the_advice_is_one_line() -> None:
    assert advice(FACTS) == (
        "clients are busy for 80%: an update takes 4.0 s up and a model 1.0 s down, a round 20.0 s; to keep them busy: "
        "exchange.codec: int8 (91%), or exchange.overlap: true (100%), or training.local_steps: 3 times as many (92%)"
    )
