"""Errors of a configuration name the node, the file and the line; a weak delta is warned about."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import load, save
from worldlm_ray.config.places import told
from worldlm_ray.config.schema import PrivacyConfig
from worldlm_ray.errors import ConfigError, DataError, WorldLMError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.privacy import accounting
from worldlm_ray.privacy.account import weak_delta
from worldlm_ray.privacy.accounting import SMALLEST_NOISE, noise_for
from worldlm_ray.privacy.gaussian import composed_epsilon, gaussian_noise
from worldlm_ray.simulation.simulator import simulate

ROOT = Path(__file__).resolve().parents[2]
CONF = """\
model: {preset: nano}
budget: {rounds: 1}
data: {corpus: licenses}
evaluation:
  tokens: -1
world:
  children:
    - federation: europe
      children:
        - client: italy
          training:
            lr: -1
        - client: münchen
          training: {local_stps: 4}
        - client: italy
    - clint: japan
"""


@pytest.fixture
def conf(tmp_path: Path) -> str:
    (tmp_path / "conf.yaml").write_text(CONF, encoding="utf-8")
    return str(tmp_path / "conf.yaml")


def lines(conf: str, *overrides: str) -> list[str]:
    """What the user is told."""
    with pytest.raises(WorldLMError) as caught:
        make_plan(load(conf, overrides), check_data=False)
    return told(caught.value, conf, overrides)


def test_a_problem_has_the_nodes_name_the_file_and_the_line(conf: str) -> None:
    assert lines(conf) == ["evaluation.tokens (conf.yaml line 5): got -1; give a number above 0"]
    found = lines(conf, "evaluation.tokens=9")
    assert found[0] == "world/europe/italy: training.lr (conf.yaml line 12): got -1.0; give a number above 0"
    assert found[1].startswith(
        "world/europe/münchen: training.local_stps (conf.yaml line 14): unknown key; did you mean"
    )
    assert found[2] == (
        "world/europe/italy: client (conf.yaml line 15): the name 'italy' is taken by world/europe/italy; "
        "siblings need different names"
    )
    assert found[3].startswith("world/child 2 (conf.yaml line 16): is neither a federation nor a client")
    assert len(found) == 4


def test_what_the_command_line_gives_is_said_to_be_from_there(conf: str) -> None:
    found = lines(conf, "evaluation.tokens=9", "seed=x")
    assert found == ["seed (command line): got 'x'; expected a whole number"]
    found = lines(conf, "evaluation.tokens=9", "world.children[0].children[0].training.lr=.nan")
    assert found[0] == "world/europe/italy: training.lr (command line): got nan; give a finite number"


def test_errors_that_only_mention_a_key_have_names_too(conf: str) -> None:
    error = DataError("train part of world.children[0].children[1].data (a.txt): too short")
    assert told(error, conf) == ["train part of world/europe/münchen: data (a.txt): too short"]
    assert told(error) == [str(error)]
    assert told(error, "no/such.yaml") == [str(error)]
    assert told(ConfigError("--nodes", "got 'x'", "write numbers"), conf) == ["--nodes: got 'x'; write numbers"]


def test_the_command_line_tells_all_problems(conf: str) -> None:
    command = [sys.executable, "-m", "worldlm_ray", "show", conf, "evaluation.tokens=9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert len(said) == 4
    assert all(line.startswith("worldlm: world/") for line in said)
    assert "children[" not in done.stderr


# ---- privacy that promises nothing -------------------------------------------------------------------------


def private(tiny: Any, folder: Path, **privacy: Any) -> Any:
    rules = {"unit": "record", "target_epsilon": 8.0, **privacy}
    return tiny([client("a", folder, 1, privacy=rules)], budget={"rounds": 1}, model={"key_layers": []})


def test_delta_is_weak_from_one_in_n() -> None:
    def said(delta: float, records: int | None, unit: Any = "record") -> str:
        return weak_delta(PrivacyConfig(unit=unit, delta=delta, noise_multiplier=1.0), records)

    assert said(0.0099, 100) == ""
    assert said(0.01, 100).startswith("privacy.delta is 0.01, at or above 1 / 100 records")
    assert "such as 1e-03" in said(0.5, 100)
    assert "1 / 3 clients" in said(0.5, 3, "client")
    assert said(0.5, 100, "none") == said(0.5, None) == ""
    rules = PrivacyConfig(unit="record", delta=0.5, noise_multiplier=1.0)
    assert weak_delta(rules, 99, named=False) == (
        "privacy.delta is 0.5, at or above 1 / the number of records: "
        "that allows to publish one of them whole; set it well below"
    )


def test_a_weak_delta_is_a_warning_of_the_run_and_of_show(tiny: Any, tmp_path: Path) -> None:
    plan = rundir.create(private(tiny, tmp_path, delta=0.5))
    save(plan.config, tmp_path / "conf.yaml")
    shown = CliRunner().invoke(cli.app, ["show", str(tmp_path / "conf.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "WARNING world/a: privacy.delta is 0.5, at or above 1 / " in shown.stderr
    [warning] = simulate(plan).summary["warnings"]
    assert warning["node"] == "world/a"
    assert warning["text"].startswith("privacy.delta is 0.5, at or above 1 / the number of records")
    spent = CliRunner().invoke(cli.app, ["privacy", str(plan.run_dir)])
    assert "WARNING world/a: privacy.delta is 0.5" in spent.stderr


@pytest.mark.parametrize("reports", [False, True])
def test_how_many_records_a_client_has_stays_with_it_unless_its_metrics_leave(
    tiny: Any, tmp_path: Path, reports: bool
) -> None:
    plan = private(tiny, tmp_path, delta=0.5, report_metrics=reports)
    found = Client(plan, plan.root.clients[0])
    number = f"1 / {found.dataset.records(context=found.context):,} records"
    assert (number in found.warning) == reports
    assert bool(re.findall(r"\d", found.warning.replace("0.5", "").replace("1 / the", ""))) == reports


def test_a_client_that_comes_late_says_what_its_delta_allows(tiny: Any, tmp_path: Path) -> None:
    rules = {"unit": "record", "noise_multiplier": 1.0, "delta": 0.5}
    children = [client("a", tmp_path, 1), client("b", tmp_path, 2, privacy=rules)]
    late = tiny(children, budget={"rounds": 3}, model={"key_layers": []}, faults=["0.001s join world/b"])
    [warning] = simulate(rundir.create(late)).summary["warnings"]
    assert (warning["node"], warning["text"][:16]) == ("world/b", "privacy.delta is")


def test_clients_of_a_federation_are_counted_without_their_text(tiny: Any, tmp_path: Path) -> None:
    rules = {"unit": "client", "noise_multiplier": 1.0, "delta": 0.5}
    plan = tiny([client("a", tmp_path, 1), client("b", tmp_path, 2)], privacy=rules)
    [warning] = plan.warnings
    assert warning.startswith("world: privacy.delta is 0.5, at or above 1 / 2 clients")


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_budget_that_needs_no_noise_is_refused_and_not_searched_for(
    monkeypatch: pytest.MonkeyPatch, accountant: Any
) -> None:
    asked = []

    def cheap(history: Any, **_: Any) -> float:
        asked.append(history[-1].noise)
        return 1.0

    monkeypatch.setattr(accounting, "epsilon", cheap)
    with pytest.raises(WorldLMError, match=r"allows noise below .*remove the privacy section"):
        noise_for(1e9, spent=[], rate=0.01, steps=10, delta=1e-5, accountant=accountant, key="privacy")
    assert min(asked) >= SMALLEST_NOISE[accountant]
    assert len(asked) < 10


def test_noise_for_clients_has_a_floor_and_a_ceiling() -> None:
    with pytest.raises(WorldLMError, match="allows noise below"):
        gaussian_noise(1, target_epsilon=1e9, delta=1e-5, key="privacy")
    with pytest.raises(WorldLMError, match="no noise keeps"):
        gaussian_noise(10**6, target_epsilon=1e-9, delta=1e-12, key="privacy")
    assert composed_epsilon([1e-300], delta=1e-5) == float("inf")


# ---- make --------------------------------------------------------------------------------------------------


def dry(target: str, folder: Path) -> str:
    """What make would do in a fresh clone."""
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"))
    (folder / "pyproject.toml").touch()
    done = subprocess.run(["make", "-n", target], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_quickstart_installs_what_a_run_needs_only(tmp_path: Path) -> None:
    said = dry("quickstart", tmp_path)
    assert "--editable ." in said
    assert "dev" not in said
    assert "--quiet" not in said
    assert "usually" in said


@pytest.mark.parametrize("target", ["test", "check", "format", "bench", "soak", "test-fast"])
def test_other_targets_add_their_tools(tmp_path: Path, target: str) -> None:
    said = dry(target, tmp_path)
    assert said.index("--editable .\n") < said.index("--editable '.[dev,bench,docs]'")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()  # after the quickstart
    said = dry(target, tmp_path)
    assert "--editable '.[dev,bench,docs]'" in said
    assert "--editable .\n" in said or "-m venv" not in said
