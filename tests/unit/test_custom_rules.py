"""Rules of a user: in a file beside the configuration, used by a simulated run, kept by it, and in checkpoints."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.nodes import make, push
from support.worlds import TINY_MODEL, client, run_example

from worldlm_ray.aggregation.node_memory import node_bytes
from worldlm_ray.config import names, rule_files
from worldlm_ray.config.federated import AggregationConfig, RobustConfig
from worldlm_ray.config.loading import load, to_yaml
from worldlm_ray.config.registry import Registry
from worldlm_ray.errors import CheckpointError, ConfigError
from worldlm_ray.exchange.compression import decode, encode_update
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.simulation.simulator import simulate

RULES = '''
import numpy as np
from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.aggregation.robust_fold import robust_rule
from worldlm_ray.aggregation.rules import aggregation_rule
from worldlm_ray.aggregation.staleness import staleness
from worldlm_ray.data.corpora import corpus
from worldlm_ray.exchange.compression import Codec, codec


@staleness("my_staleness", a=2.0)
def my_staleness(tau, a, b):
    """Source: this test."""
    return 1.0 / (1.0 + a * tau)


@aggregation_rule("my_rule")
class MyRule(Fold):
    """It keeps its last update until the end. Source: this test."""

    @classmethod
    def models_held(cls, rules, children):
        return 1

    def add(self, update, tau, theta):
        self.last = update.values
        return super().add(update, tau, theta)

    def arrays(self):
        return super().arrays() | {"kept.last": self.last}

    def restore(self, saved, arrays):
        super().restore(saved, arrays)
        self.last = arrays["kept.last"]


@robust_rule("my_middle")
def my_middle(rows, trim):
    """The middle of the smallest and the largest. Source: this test."""
    return (rows.min(axis=0) + rows.max(axis=0)) / np.float32(2.0)


@codec("my_codec")
class MyCodec(Codec):
    """fp16. Source: IEEE 754."""

    def nbytes(self, size):
        return 2 * size

    def encode(self, values):
        return values.astype(np.float16).view(np.uint8)

    def decode(self, packed, size):
        return packed.view(np.float16).astype(np.float32)


@corpus("my_corpus", version="2")
def my_corpus():
    """Numbers. Source: this test."""
    for first in range(0, 4000, 40):
        yield " ".join(str(number) for number in range(first, first + 40))
'''
MINE = {
    "my_staleness": names.STALENESS,
    "my_rule": names.AGGREGATION_RULES,
    "my_middle": names.ROBUST_RULES,
    "my_codec": names.CODECS,
    "my_corpus": names.CORPORA,
}


def forget() -> None:
    """Be a process that has not read the file."""
    rule_files._EXECUTED.pop("my_rules.py", None)
    sys.modules.pop(f"{rule_files.PREFIX}my_rules", None)
    for name, registry in MINE.items():
        if name in registry:
            registry.remove(name)


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a configuration, and a file of rules beside it: `mine(aggregation={...})`."""

    def write(code: str = RULES, **settings: Any) -> Path:
        clients = [client(name, tmp_path, seed) for seed, name in enumerate("abc")]
        raw: dict[str, Any] = {
            "rules": ["my_rules.py"],
            "run_dir": str(tmp_path / "run"),
            "model": TINY_MODEL,
            "budget": {"rounds": 2},
            "training": {"local_steps": 2, "batch_size": 4},
            "evaluation": {"tokens": 64, "final_tokens": 128},
            "data": {"cache_dir": str(tmp_path / "cache")},
            "world": {"children": [{"federation": "f", "children": clients}]},
        }
        (tmp_path / "my_rules.py").write_text(code)
        (tmp_path / "mine.yaml").write_text(json.dumps(raw | settings))
        return tmp_path / "mine.yaml"

    yield write
    forget()


def planned(conf: Path) -> Plan:
    return make_plan(load(str(conf), []))


SETTINGS: dict[str, dict[str, Any]] = {
    "my_staleness": {"aggregation": {"staleness": {"fn": "my_staleness"}}},
    "my_rule": {"aggregation": {"rule": "my_rule"}},
    "my_middle": {"aggregation": {"robust": {"rule": "my_middle"}, "trigger": "synchronous"}},
    "my_codec": {"exchange": {"codec": "my_codec"}},
    "my_corpus": {"world": {"children": [{"client": "a", "data": {"corpus": "my_corpus"}}]}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_uses_each_kind_of_rule(mine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plan = rundir.create(planned(mine(**SETTINGS[name])))
    used, registry = [], MINE[name]
    get = Registry.get

    def noted(self: Registry[Any], got: str) -> Any:
        used.append(got)
        return get(self, got)

    monkeypatch.setattr(Registry, "get", noted)
    summary = simulate(plan).summary
    assert summary["status"] == "finished"
    assert name in used
    assert name in registry.names()


def test_a_rule_survives_a_checkpoint_and_counts_its_memory(mine: Callable[..., Path]) -> None:
    planned(mine(**SETTINGS["my_rule"]))
    node, twin, plain = make(rule="my_rule", buffer_size=2), make(rule="my_rule", buffer_size=2), make(buffer_size=2)
    push(node, "a", 1, change=1.0)
    twin.restore(*node.state())
    push(plain, "a", 1, change=1.0)
    for one in (node, twin, plain):
        push(one, "b", 1, change=3.0)
    assert node.version == twin.version == 1
    np.testing.assert_array_equal(node.theta, twin.theta)
    np.testing.assert_array_equal(node.theta, plain.theta)
    sizes = {"backbone": 100, "keys": 10, "children": 3, "is_world": True}
    more = node_bytes(AggregationConfig(rule="my_rule"), **sizes) - node_bytes(AggregationConfig(), **sizes)
    assert more == 4 * 110


def test_a_codec_gives_back_what_it_carries(mine: Callable[..., Path]) -> None:
    planned(mine())
    values, lost = np.array([0.1, 2.0, -3.3], np.float32), np.zeros(2, np.float32)
    packed, arrives = encode_update("my_codec", values.copy(), lost)
    assert packed is not None
    np.testing.assert_array_equal(decode("my_codec", packed, 3), arrives)
    np.testing.assert_allclose(arrives[:2] + lost, values[:2], rtol=1e-6)


def test_the_run_goes_by_its_copy_of_the_file(mine: Callable[..., Path], tmp_path: Path) -> None:
    conf = mine(**SETTINGS["my_staleness"])
    plan = rundir.create(planned(conf))
    assert (plan.run_dir / "files" / "my_rules.py").read_text() == RULES
    assert plan.config.rules == [str(tmp_path / "my_rules.py")]
    (tmp_path / "my_rules.py").unlink()
    pickled = pickle.dumps(plan)
    for again in (lambda: rundir.reopen(str(plan.run_dir)), lambda: pickle.loads(pickled)):
        forget()
        assert again().root.settings.aggregation.staleness.fn == "my_staleness"
        assert "my_staleness" in names.STALENESS
    forget()
    moved = plan.run_dir.rename(tmp_path / "moved")
    assert rundir.reopen(str(moved)).config.rules == plan.config.rules
    (moved / "files" / "my_rules.py").write_text("pass")
    with pytest.raises(ConfigError, match=r"rules\[0\].*has changed since the run was made; restore the file"):
        rundir.reopen(str(moved))


def test_another_process_reads_the_copy(mine: Callable[..., Path]) -> None:
    plan = rundir.create(planned(mine(**SETTINGS["my_rule"])))
    code = f"import pickle; plan = pickle.loads({pickle.dumps(plan)!r}); print(plan.root.settings.aggregation.rule)\n"
    code += "from worldlm_ray.aggregation.rules import rule_of\nprint(rule_of(plan.root.settings.aggregation).kind)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["my_rule", "my_rule"], done.stderr


def test_rules_belong_to_what_a_run_began_with(mine: Callable[..., Path]) -> None:
    plan = rundir.create(planned(mine()))
    with pytest.raises(ConfigError, match="belongs to what the run began with"):
        rundir.reopen(str(plan.run_dir), ["rules=[]"])


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        (
            ["no_such_package.rules"],
            r"rules\[0\].*cannot be imported \(ModuleNotFoundError.*install it on every machine",
        ),
        (["none.py"], r"rules\[0\].*cannot be read"),
        (["my_rules.py"], r"rules\[0\].*cannot be imported \(ZeroDivisionError"),
        (["my_rules.py", "other/my_rules.py"], r"rules\[1\].*has the name of another file"),
        ("my_rules.py", "rules.*expected a list"),
    ],
)
def test_a_rule_that_cannot_be_read_says_so(mine: Callable[..., Path], rules: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(str(mine("1 / 0", rules=rules)), [])


def test_a_name_without_its_file_is_unknown(mine: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"aggregation.rule.*expected one of mean, capped, robust"):
        load(str(mine(rules=[], **SETTINGS["my_rule"])), [])


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({"rule": "my_rule", "max_share": 0.5}, "my_rule, but aggregation.max_share chooses capped"),
        (
            {"rule": "my_rule", "trigger": "synchronous", "robust": {"rule": "median"}},
            "aggregation.robust.rule chooses",
        ),
        ({"rule": "robust"}, "robust does not go with it: aggregation.robust.rule is none"),
    ],
)
def test_two_rules_for_one_node_are_refused(mine: Callable[..., Path], rules: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        planned(mine(aggregation=rules))


def test_an_unfinished_aggregation_of_another_rule_is_refused(mine: Callable[..., Path]) -> None:
    planned(mine())
    node = make(rule="my_rule", buffer_size=2)
    push(node, "a", 1, change=1.0)
    with pytest.raises(CheckpointError, match=r"aggregation.rule is mean, but 1 children's updates wait"):
        make(buffer_size=2).restore(*node.state())


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_the_memory_of_a_robust_rule_is_a_model_per_child(rule: str) -> None:
    sizes = {"backbone": 100, "keys": 10, "children": 7, "is_world": True}
    robust = AggregationConfig(robust=RobustConfig(rule=rule))
    assert node_bytes(robust, **sizes) - node_bytes(AggregationConfig(), **sizes) == 7 * 4 * 110


def test_the_example_runs(tmp_path: Path) -> None:
    said = run_example("custom_rule.py", str(tmp_path / "run"))
    assert "packages" in said
    assert (tmp_path / "run" / "files" / "custom_rule.py").is_file()
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "rule: sign_blend" in config
    assert "fn: logarithmic" in config
    assert config.endswith(to_yaml(load(str(tmp_path / "run" / "config.yaml"), [])))
