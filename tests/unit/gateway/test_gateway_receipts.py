"""What either side keeps of pushes and verdicts, and what each proves by the other one's file alone."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.borders import Border
from support.nodes import a_node
from support.receipts import LAYOUT, a_parent, at_a_border, at_member, at_world, both, push, three_updates
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.errors import MessageError, RunError
from worldlm_ray.gateway import ledger
from worldlm_ray.gateway import receipts as writing
from worldlm_ray.gateway.receipts import FOLDER
from worldlm_ray.plan.rundir import CONFIG, SUMMARY
from worldlm_ray.reports import receipts

pytestmark = pytest.mark.usefixtures("quick")


def test_both_sides_prove_by_the_other_ones_file_that_each_update_counted_once(tmp_path: Path) -> None:
    three_updates(tmp_path)
    for border in both(tmp_path):
        assert border.lines() == ["the receipts of both sides agree: each update counted once"]
        [proof] = border.proofs
        assert (proof.member, proof.sent, proof.accepted, proof.again, proof.newer) == ("world/a", 3, 3, 0, 0)
    size = at_member(tmp_path).stat().st_size
    with at_member(tmp_path).open() as file:
        chains = sum(len(line) for line in file if "certificates" in line)
    assert (size - chains) / 3 < 1_200, "bytes for each update"


def test_an_update_whose_verdict_was_lost_on_its_way_counts_once(tmp_path: Path) -> None:
    async def work(border: Border) -> None:
        link = border.sealed_link(tries=1)
        await link.join("a", 1, 0)
        assert (await push(link, 1)).accepted
        border.parent.before = lambda method: border.line.cut()
        with pytest.raises(MessageError, match="unreachable"):
            await push(link, 2)
        border.parent.before = lambda method: None
        welcome = await link.join("a", 1, 2)
        assert welcome.last_seq == 2
        assert (await push(link, 3)).accepted

    at_a_border(tmp_path, work)
    for border in both(tmp_path):
        assert border.holds, border.lines()
    assert len(at_member(tmp_path).read_text().splitlines()) == len(at_world(tmp_path).read_text().splitlines()) - 1


def test_a_session_of_cuts_and_restarts_is_proved_on_both_sides(tmp_path: Path) -> None:
    """The line is cut a dozen times, and the parent goes back to a checkpoint twice, once behind an accepted update."""

    async def work(border: Border) -> None:
        link, done = border.sealed_link(tries=2), 0
        line, began = border.line, border.line.bytes["up"]
        line.cut_when = lambda: line.cuts < 12 and line.bytes["up"] - began > 4_000 * line.cuts
        while done < 6:
            if done in (3, 5) and border.parent.node.incarnation == (1 if done == 3 else 2):
                border.parent = a_parent(tmp_path, every=2)
                await border.restart()
            with suppress(MessageError):
                welcome = await link.join("a", 1, done)
                for seq in range(welcome.last_seq + 1, done + 2):
                    assert (await push(link, seq, to=welcome.incarnation)).reason in ("accepted", "duplicate")
                done += 1
        assert line.cuts == 12

    at_a_border(tmp_path, work, every=2)
    for border in both(tmp_path):
        assert border.holds, border.lines()
        assert border.proofs[0].sent == 6
    assert both(tmp_path)[0].proofs[0].again >= 1


def test_what_a_restart_has_undone_may_be_accepted_again(tmp_path: Path) -> None:
    async def work(border: Border) -> None:
        link = border.sealed_link()
        await link.join("a", 1, 0)
        for seq in (1, 2, 3):
            await push(link, seq)
        border.parent = a_parent(tmp_path, every=2)
        await border.restart()
        welcome = await link.join("a", 1, 3)
        assert (welcome.incarnation, welcome.last_seq, welcome.durable_seq) == (2, 2, 2)
        assert (await push(link, 3, to=2)).accepted

    at_a_border(tmp_path, work, every=2)
    for border in both(tmp_path):
        assert border.holds, border.lines()
        assert (border.proofs[0].accepted, border.proofs[0].again) == (3, 1)


def test_a_file_may_be_older_than_a_run_that_goes_on(tmp_path: Path) -> None:
    three_updates(tmp_path)
    for own, theirs in (("run", at_member(tmp_path)), ("run-a", at_world(tmp_path))):
        older = tmp_path / "older.jsonl"
        older.write_text("".join(theirs.read_text().splitlines(keepends=True)[:4]))
        border = receipts.look(tmp_path / own, [older])
        assert (border.holds, border.proofs[0].newer) == (True, 2)
        (tmp_path / own / SUMMARY).write_text("{}")
        assert not receipts.look(tmp_path / own, [older]).holds
        older.write_text("")
        assert [str(each) for each in receipts.look(tmp_path / own, [older]).all_findings] == [
            "missing: the files hold no receipt"
        ]


# ---- lies --------------------------------------------------------------------------------------------------------


def lines_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def put(file: Path, lines: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def of(lines: list[dict[str, str]], kind: str) -> list[dict[str, str]]:
    return [line for line in lines if kind in line]


def flipped(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[-1] ^= 1
    return base64.b64encode(raw).decode()


def alter_a_verdict(lines: list[dict[str, str]]) -> None:
    of(lines, "verdict")[1]["verdict"] = flipped(of(lines, "verdict")[1]["verdict"])


def forge_a_push(lines: list[dict[str, str]]) -> None:
    of(lines, "push")[1]["signature"] = of(lines, "push")[0]["signature"]


def leave_out_an_update(lines: list[dict[str, str]]) -> None:
    push, verdict = of(lines, "push")[1], of(lines, "verdict")[1]
    lines.remove(push)
    lines.remove(verdict)


def leave_out_a_push(lines: list[dict[str, str]]) -> None:
    lines.remove(of(lines, "push")[1])


def leave_out_certificates(lines: list[dict[str, str]]) -> None:
    lines.remove(of(lines, "certificates")[0])


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        (alter_a_verdict, "forged: .* bad_signature"),
        (forge_a_push, "forged: .* bad_signature"),
        (leave_out_an_update, r"missing: .*update 2 of world/a .*is not in the other side's file"),
        (leave_out_a_push, "missing: .* a verdict without its push"),
        (leave_out_certificates, "damaged: .* no line before it has its signer's certificates"),
    ],
)
def test_a_line_that_is_not_as_it_was_is_named_on_either_side(
    tmp_path: Path, lie: Callable[[list[dict[str, str]]], None], found: str
) -> None:
    three_updates(tmp_path)
    for own, file in (("run", at_member(tmp_path)), ("run-a", at_world(tmp_path))):
        lines = lines_of(file)
        lie(lines)
        altered = tmp_path / f"from-{own}.jsonl"
        put(altered, lines)
        border = receipts.look(tmp_path / own, [altered])
        assert not border.holds
        assert any(re.search(found, line) for line in border.lines()), border.lines()


def test_an_update_that_one_incarnation_accepts_twice_is_named_on_either_side(tmp_path: Path) -> None:
    """A world whose node forgets within a life what it has accepted: only the member's receipts show it."""

    async def work(border: Border) -> None:
        link = border.sealed_link()
        await link.join("a", 1, 0)
        for content in (1, 2):
            assert (await push(link, 1, content=content)).accepted
            node = a_node(layout=LAYOUT, initial=np.zeros(LAYOUT.size, np.float32), children=("a", "b"))
            border.parent.node = node
            border.gateway._staging.drop("world/a")
            await link.join("a", 1, 0)

    at_a_border(tmp_path, work, every=9)
    for border in both(tmp_path):
        assert "doubled: update 1 of world/a is accepted 2 times by incarnation 1 of its parent" in border.lines()
        assert "altered: update 1 of world/a (incarnation 1) has 2 contents" in border.lines()


def test_a_checkpoint_that_was_promised_and_is_gone_is_named_on_either_side(tmp_path: Path) -> None:
    async def work(border: Border) -> None:
        link = border.sealed_link()
        await link.join("a", 1, 0)
        for seq in (1, 2):
            await push(link, seq)
        for path in (tmp_path / "run" / "checkpoints").glob("0*"):
            shutil.rmtree(path)
        border.parent = a_parent(tmp_path)
        await border.restart()
        welcome = await link.join("a", 1, 2)
        assert welcome.last_seq == 0
        for seq in (1, 2):
            await push(link, seq, to=welcome.incarnation)

    at_a_border(tmp_path, work)
    here, there = both(tmp_path)
    assert any("begins with update 0 of world/a, and update 1 was said to be durable" in line for line in here.lines())
    text = "doubled: update 1 of world/a is accepted again, though a checkpoint before had it"
    assert text in there.lines()


def test_a_trail_without_an_accepted_update_is_named(tmp_path: Path) -> None:
    three_updates(tmp_path)
    trail = tmp_path / "run" / "audit" / "world.jsonl"
    lines = trail.read_text().splitlines(keepends=True)
    trail.write_text("".join(lines[:1] + lines[2:]))
    border = receipts.look(tmp_path / "run", [at_member(tmp_path)])
    assert border.lines()[0] == (
        "lost: update 2 of world/a was accepted by incarnation 1, and the trail of world has it not"
    )
    trail.write_text("".join([*lines, lines[1].replace('"seq": 2', '"seq": 4')]))
    border = receipts.look(tmp_path / "run", [at_member(tmp_path)])
    assert border.lines()[0].startswith("missing: the trail of world has update 4 of world/a")


def test_a_push_by_a_stolen_key_is_unknown_to_its_member(tmp_path: Path) -> None:
    async def work(border: Border) -> None:
        link = border.sealed_link()
        await link.join("a", 1, 0)
        await push(link, 1)
        kept = at_member(tmp_path).read_text()
        await push(link, 2)
        at_member(tmp_path).write_text(kept)

    at_a_border(tmp_path, work)
    _, there = both(tmp_path)
    assert there.lines()[0].startswith("unknown: update 2 of world/a (incarnation 1, to 1) is signed by this member's")


def test_receipts_of_another_member_or_world_are_not_of_this_run(tmp_path: Path) -> None:
    three_updates(tmp_path)

    async def work(border: Border) -> None:
        link = border.sealed_link("world/b")
        await link.join("b", 1, 0)
        await push(link, 1, sender="b")

    at_a_border(tmp_path / "other", work)
    [line, _] = receipts.look(tmp_path / "run", [at_member(tmp_path / "other", "b")]).lines()
    assert line.startswith("unknown: ")
    assert "and not of this run's" in line
    with pytest.raises(RunError, match="has no receipts"):
        receipts.look(tmp_path, [at_member(tmp_path)])


@pytest.mark.parametrize("number", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_mutated_file_is_read_to_its_end_and_proves_nothing_new(tmp_path: Path, number: int) -> None:
    three_updates(tmp_path)
    chance, roots = random.Random(number), ledger.roots_of(tmp_path / "run" / FOLDER)
    raw, file = at_member(tmp_path).read_bytes(), tmp_path / "mutated.jsonl"
    [whole] = ledger.read([at_member(tmp_path)], roots).members.values()
    unnoticed = 0
    for _ in range(number):
        damaged = bytearray(raw)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(damaged))
            damaged[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        file.write_bytes(damaged)
        found = ledger.read([file], roots)
        for member in found.members.values():
            assert member.pushes.keys() <= whole.pushes.keys()
            assert member.verdicts.keys() <= whole.verdicts.keys()
        lacks = not found.members or found.members["world/a"] != whole
        unnoticed += lacks and not found.findings and not found.torn
    assert unnoticed < number // 100 + 1, "a line that is gone as a whole"


# ---- writing -----------------------------------------------------------------------------------------------------


def test_no_update_is_judged_before_its_push_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "AGAIN_S", 0.01)
    failures, said = [OSError(28, "No space left on device")] * 2, list[str]()
    real = writing.Receipts._write

    def write(self: writing.Receipts, path: str, piece: bytes) -> None:
        if failures:
            raise failures.pop()
        real(self, path, piece)

    async def work(border: Border) -> None:
        link = border.sealed_link()
        link._receipts._warn = lambda path, text: said.append(f"{path}: {text}")
        await link.join("a", 1, 0)
        monkeypatch.setattr(writing.Receipts, "_write", write)
        assert (await push(link, 1)).accepted
        failures.extend([OSError(28, "No space left on device")])
        assert (await push(link, 2)).accepted

    at_a_border(tmp_path, work)
    assert [text.partition(" to ")[0] for text in said] == ["world/a: cannot write its receipts"] * 2
    for border in both(tmp_path):
        assert border.holds, border.lines()


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    three_updates(tmp_path)
    with at_world(tmp_path).open("a") as file:
        file.write('{"push": "k63')
    border = receipts.look(tmp_path / "run-a", [at_world(tmp_path)])
    assert border.lines() == [
        "the receipts of both sides agree: each update counted once; passed over 1 lines that a kill has torn apart"
    ]


def test_a_push_of_another_run_counts_for_nothing(tmp_path: Path) -> None:
    async def work(border: Border) -> None:
        link = border.sealed_link(tries=1)
        terms = await link.greet()
        link.terms = type(terms)(**(vars(terms) | {"run": "another"}))
        with pytest.raises(MessageError, match="unreachable: the world is in another run by now: join again"):
            await push(link, 1)
        await link.join("a", 1, 0)
        assert (await push(link, 1)).accepted

    at_a_border(tmp_path, work)


def test_the_command_says_it_and_exits_by_it(tmp_path: Path) -> None:
    three_updates(tmp_path)
    (tmp_path / "run" / CONFIG).write_text("name: run\n")
    words = ["audit", str(tmp_path / "run"), "--receipts", str(at_member(tmp_path))]
    done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "the receipts of both sides agree: each update counted once" in done.output
    assert "world/a" in done.output
    lines = lines_of(at_member(tmp_path))
    alter_a_verdict(lines)
    put(at_member(tmp_path), lines)
    done = CliRunner().invoke(cli.app, [*words, "--json"])
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert found["holds"] is True
    assert [each["kind"] for each in found["receipts"]["findings"]] == ["forged"]
