"""Run folders: claimed by one run, taken back by a run that could not begin, printed so that a shell reads them."""

from __future__ import annotations

import ast
import glob
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import tokenizer, write_text
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.config.loading import from_mapping, load, save, to_mapping
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.terminal import Terminal
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.paths import pasted

ROOT = Path(__file__).resolve().parents[2]
CLAIM = """
import sys
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import plan
from worldlm_ray.plan import rundir
run = plan.make_plan(from_mapping({mapping!r}))
sys.stdout.write("ready\\n"), sys.stdout.flush(), sys.stdin.readline()
try:
    print(rundir.create(run).run_dir.name)
except Exception as error:
    print(type(error).__name__, error)
"""
HOLD = """
import sys
from pathlib import Path
from typing import Any
from worldlm_ray.plan import rundir
with rundir.held(Path({folder!r})):
    print("held", flush=True)
    sys.stdin.readline()
"""


def at(plan: Plan, folder: Path | str | None, **changes: object) -> Plan:
    return replace(plan, config=replace(plan.config, run_dir=None if folder is None else str(folder), **changes))


def with_tokenizer(tiny: Any, folder: Path) -> Plan:
    """A world whose run keeps a copy of its tokenizer."""
    raw = to_mapping(tiny().config)
    raw["data"]["tokenizer"] = str(tokenizer(folder / "tok.json"))
    return make_plan(from_mapping(raw))


def a_file(path: Path) -> None:
    """A file of the user's, in folders made for it."""
    path.parent.mkdir(parents=True)
    path.write_text("mine")


def claims(plan: Plan, folder: Path, processes: int = 3) -> list[str]:
    """What processes that claim a folder in the same moment are answered."""
    code = CLAIM.format(mapping=plan.to_mapping())
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, cwd=folder)
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sorted(process.communicate()[0].strip() for process in started)


def test_runs_of_one_name_in_one_moment_get_a_folder_each(tiny: Any, tmp_path: Path) -> None:
    plan = at(tiny(), None, name="same")
    assert claims(plan, tmp_path) == ["same", "same-2", "same-3"]
    assert claims(plan, tmp_path) == ["same-4", "same-5", "same-6"]


def test_of_runs_that_name_one_folder_in_one_moment_one_gets_it(tiny: Any, tmp_path: Path) -> None:
    answers = claims(at(tiny(), tmp_path / "one"), tmp_path)
    assert answers.count("one") == 1
    assert sum("already holds a run" in answer for answer in answers) == 2


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError(1, "no hard links here")

        monkeypatch.setattr("worldlm_ray.storage.filesystem.os.link", refuse)
    filesystem.create_text(tmp_path / "file", "first")
    with pytest.raises(FileExistsError):
        filesystem.create_text(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_taken_back_meanwhile_is_made_again(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, create = tmp_path / "run", filesystem.create_text
    asked = []

    def taken_back(path: Path, text: str) -> None:
        asked.append(path)
        if len(asked) == 1:
            folder.rmdir()
        create(path, text)

    monkeypatch.setattr(filesystem, "create_text", taken_back)
    assert rundir.create(at(tiny(), folder)).run_dir == folder
    assert len(asked) == 2


def test_a_folder_without_a_configuration_is_free(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / ".config.yaml.0a1b2c3d").write_text("of a process that was killed")
    assert rundir.create(at(tiny(), tmp_path / "run")).run_dir == tmp_path / "run"


def test_a_run_is_driven_by_one_process(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD.format(folder=str(tmp_path))]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"is being run by process {other.pid} on .*worldlm status .* --watch"):
            rundir._locked(tmp_path)
        other.kill()
    with rundir.held(tmp_path), rundir.held(tmp_path):  # a killed process holds nothing
        pass


def test_a_second_resume_changes_nothing(tiny: Any, tmp_path: Path) -> None:
    plan = rundir.create(at(tiny(), tmp_path / "run"))
    before = (plan.run_dir / "config.yaml").read_text()
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD.format(folder=str(plan.run_dir))]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = CliRunner().invoke(cli.app, ["train", "--resume", str(plan.run_dir), "seed=7"])
        other.kill()
    assert isinstance(done.exception, RunError)
    assert "is being run by process" in str(done.exception)
    assert (plan.run_dir / "config.yaml").read_text() == before


def test_a_lock_file_that_was_removed_is_not_waited_for(tmp_path: Path) -> None:
    with rundir.held(tmp_path):
        (tmp_path / rundir.LOCK).unlink()
        rundir._HELD.clear()
        with rundir.held(tmp_path):
            assert (tmp_path / rundir.LOCK).is_file()


def test_a_simulation_cannot_be_continued_even_if_it_left_no_summary(tiny: Any, tmp_path: Path) -> None:
    made = rundir.create(at(tiny(), tmp_path / "run"), simulated=True)
    assert rundir.reopen(str(made.run_dir), check_data=False).config == made.config
    with pytest.raises(RunError, match="is a simulation"):
        rundir.resume(str(made.run_dir), [])
    with pytest.raises(RunError, match=r"simulation, which is not continued; delete the folder, or give another"):
        rundir.create(at(tiny(), tmp_path / "run"), simulated=True)


def test_a_simulation_that_could_not_begin_can_be_given_again(tiny: Any, tmp_path: Path) -> None:
    text, conf, run = tmp_path / "t.txt", tmp_path / "conf.yaml", tmp_path / "run"
    text.write_text("short")
    save(tiny([{"client": "a", "data": {"files": [str(text)]}}]).config, conf)
    command = ["simulate", str(conf), "--run-dir", str(run)]
    failed = CliRunner().invoke(cli.app, command)
    assert "train part" in str(failed.exception)
    assert not run.exists()
    write_text(text, seed=1, size=12_500)
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert (run / "summary.json").is_file()


def test_what_others_have_put_into_the_folder_stays(tiny: Any, tmp_path: Path) -> None:
    plan = rundir.create(at(tiny(), tmp_path / "run"))
    (plan.run_dir / "notes.txt").write_text("mine")
    rundir.discard(plan, began=False)
    assert [path.name for path in plan.run_dir.iterdir()] == ["notes.txt"]


def test_the_users_own_folders_stay(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "proj"
    mine = [folder / "files" / "corpus.txt", folder / "tensorboard" / "old" / "events"]
    for file in mine:
        a_file(file)
    plan = rundir.create(at(with_tokenizer(tiny, tmp_path), folder))
    assert (folder / "files" / "tokenizer.json").is_file()
    rundir.discard(plan)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == mine


def test_what_a_run_has_made_in_its_folder_goes_with_it(tiny: Any, tmp_path: Path) -> None:
    plan = rundir.create(at(with_tokenizer(tiny, tmp_path), tmp_path / "run"))
    a_file(plan.run_dir / "tensorboard" / "world" / "events")
    with rundir.held(plan.run_dir):
        rundir.discard(plan, began=False)
    assert not plan.run_dir.exists()


def test_a_file_that_a_run_would_write_over_is_named(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plan, folder = with_tokenizer(tiny, tmp_path), tmp_path / "proj"
    mine = folder / "files" / "tokenizer.json"
    a_file(mine)
    wanted = (
        rf"^{folder} already holds files/tokenizer\.json, which .* over; move that file away, or .* another --run-dir"
    )
    with pytest.raises(RunError, match=wanted):
        rundir.create(at(plan, folder))
    assert [path for path in folder.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"
    # A folder that the user has not named gets another number.
    monkeypatch.chdir(tmp_path)
    a_file(tmp_path / "runs" / "proj" / "files" / "tokenizer.json")
    assert rundir.create(at(plan, None, name="proj")).run_dir.name == "proj-2"


def test_a_folder_that_another_process_has_claimed_is_not_taken_back(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = rundir.create(at(tiny(), tmp_path / "run"))
    monkeypatch.setattr(rundir, "_CLAIMED", {})
    rundir.discard(rundir.reopen(str(plan.run_dir)), began=False)
    assert (plan.run_dir / "config.yaml").is_file()


def test_the_claim_is_the_last_thing_that_is_taken_back(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = rundir.create(at(with_tokenizer(tiny, tmp_path), tmp_path / "run"))
    a_file(plan.run_dir / "tensorboard" / "events")
    (plan.run_dir / "audit").mkdir()
    left, unlink = list[str](), Path.unlink

    def look(path: Path, missing_ok: bool = False) -> None:
        if path.name == "config.yaml":
            left.extend(other.name for other in path.parent.iterdir())
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", look)
    with rundir.held(plan.run_dir):
        rundir.discard(plan, began=False)
    assert left == ["config.yaml"]


def test_a_claim_of_a_folder_that_another_process_holds_is_taken_back(tiny: Any, tmp_path: Path) -> None:
    folder, pipe = tmp_path / "run", subprocess.PIPE
    folder.mkdir()
    command = [sys.executable, "-c", HOLD.format(folder=str(folder))]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        plan = rundir.create(at(tiny(), folder))
        with pytest.raises(RunError, match="is being run by process"), rundir.held_anew(plan):
            pass
        assert [path.name for path in folder.iterdir()] == [rundir.LOCK]  # the other one's
        other.kill()


def test_a_lock_file_of_another_user_locks_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file, asked = os.open, []

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            asked.append(path)
            raise PermissionError(13, "Permission denied")
        return open_file(path, flags, *mode)

    (tmp_path / rundir.LOCK).touch()
    monkeypatch.setattr(os, "open", refuse)
    with rundir.held(tmp_path):
        assert asked
        with pytest.raises(RunError, match="is being run by another process"):
            rundir._locked(tmp_path)
    with rundir.held(tmp_path):  # it was let go
        pass


def test_a_lock_that_was_let_go_names_no_process(tmp_path: Path) -> None:
    with rundir.held(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / rundir.LOCK).read_text()
    assert not (tmp_path / rundir.LOCK).read_text()


def test_a_folder_whose_configuration_is_no_text_is_no_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    assert not rundir.is_simulated(tmp_path)

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("the object store's own error")

    # What an object store raises is not an OSError.
    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(filesystem, "is_remote", lambda _: True)
    assert not rundir.is_simulated(tmp_path)


def test_a_run_that_has_begun_is_kept(tiny: Any, tmp_path: Path) -> None:
    plan = rundir.create(at(tiny(), tmp_path / "run"))
    (plan.run_dir / "status.json").write_text("{}")
    rundir.discard(plan)
    assert (plan.run_dir / "config.yaml").is_file()


ODD = ["sweep[lr]", "a[/b]", "with space", "it's", '"quoted"', "~no-user-of-this-name", ":smile:", "#1", "ü 中"]


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_taken_and_printed_as_it_is(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tiny(budget={"rounds": 1}, simulation={"train": False}).config, tmp_path / "conf.yaml")
    done = CliRunner().invoke(cli.app, ["simulate", "conf.yaml", "--run-dir", name])
    assert done.exit_code == 0, done.output
    assert (tmp_path / name / "summary.json").is_file()
    line = done.output.splitlines()[0].removeprefix("run folder ")
    assert shlex.split(line) == [str(tmp_path / name)]


def test_a_pattern_that_matches_another_file_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "a[bc]"
    assert pasted(path) == str(path)
    (tmp_path / "ab").touch()
    assert pasted(path) == f"'{path}'"
    assert glob.glob(str(path))


def test_nothing_that_is_printed_is_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().print("a[/b] :smile:")
    assert capsys.readouterr().out == "a[/b] :smile:\n"
    for file in (ROOT / "worldlm_ray").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] == "Console":
                raise AssertionError(f"{file.name}, line {node.lineno}: use Terminal, which reads no markup")
        assert not re.search(r"from_markup|markup=True|\.status\((?!\")", text), file.name


def test_a_home_folder_that_is_no_ones_is_the_name_of_a_file(tiny: Any) -> None:
    unknown = "~no-user-of-this-name/t.txt"
    assert filesystem.expanded(unknown) == Path(unknown)
    with pytest.raises(ConfigError, match="no-user-of-this-name"):
        tiny([{"client": "a", "data": {"files": [unknown]}}])
    with pytest.raises(ConfigError, match="no-user-of-this-name"):
        load("~no-user-of-this-name/conf.yaml")
