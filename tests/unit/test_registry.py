"""Registries: every name has its source, an unknown one is refused, and a package adds one without touching ours."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray.aggregation.staleness import STALENESS, discount, staleness
from worldlm_ray.config import names, registry
from worldlm_ray.config.federated import StalenessConfig
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.config.registry import Registry
from worldlm_ray.errors import ConfigError
from worldlm_ray.tracking.sinks import SINKS

ALL = {name: found for name, found in vars(names).items() if isinstance(found, Registry)} | {"SINKS": SINKS}


@pytest.fixture
def twice() -> Iterator[None]:
    @staleness("twice", a=2.0)
    def function(tau: int, a: float, b: float) -> float:
        """1 / (1 + a tau). Source: this test."""
        return 1.0 / (1.0 + a * tau)

    yield
    STALENESS.remove("twice")


@pytest.mark.parametrize("name", ALL)
def test_every_registered_name_says_its_source(name: str) -> None:
    documented = ALL[name].documented()
    assert len(documented) > 1
    for rule, text in documented.items():
        assert "Source: " in text, f"{name} {rule}"


def test_a_registered_function_is_used_and_listed(twice: None) -> None:
    assert discount(StalenessConfig(fn="twice"), 1) == pytest.approx(1 / 3)
    assert discount(StalenessConfig(fn="twice", a=1.0), 1) == 0.5
    assert STALENESS.names()[-1] == "twice"
    assert ours().aggregation.staleness.fn == "twice"


def ours(fn: Any = "twice") -> Any:
    return from_mapping({"budget": {"rounds": 1}, "aggregation": {"staleness": {"fn": fn}}})


def test_a_name_is_registered_once(twice: None) -> None:
    with pytest.raises(ValueError, match="staleness function 'twice' is registered twice"):

        @staleness("twice")
        def another(tau: int, a: float, b: float) -> float:
            """Another. Source: this test."""
            return 1.0


def test_the_word_for_no_rule_is_no_name() -> None:
    found: Registry[Any] = Registry("rule", "a.key", off="none")
    with pytest.raises(ValueError, match="registered twice"):
        found.add("none", 1, test_the_word_for_no_rule_is_no_name)


def test_a_rule_without_a_docstring_is_refused() -> None:
    with pytest.raises(ValueError, match="has no docstring"):
        STALENESS.add("silent", object(), lambda: None)
    assert "silent" not in STALENESS


@pytest.mark.parametrize(
    ("fn", "cure"),
    [
        ("polynomail", "did you mean 'polynomial'? expected one of constant, polynomial, hinge"),
        ("zzz", "expected one of constant, polynomial, hinge, exponential, harmonic"),
        (None, "expected one of constant"),
        (["hinge"], "expected one of constant"),
    ],
)
def test_the_schema_lists_the_names_and_the_nearest(fn: Any, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ours(fn)
    assert caught.value.key == "aggregation.staleness.fn"
    assert str(caught.value.cure).startswith(cure)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, module: str) -> None:
    """An installed package as Python sees it: a module, and the metadata that names it as an entry point."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nmine = {module}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(registry, "_LOADED", set())
    assert [point.value for point in metadata.entry_points(group=registry.GROUP)] == [module]


def test_an_installed_package_adds_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from worldlm_ray.aggregation.staleness import staleness\n"
        "@staleness('of_a_package')\n"
        "def of_a_package(tau, a, b):\n"
        "    'A half. Source: this test.'\n"
        "    return 0.5\n"
    )
    install(tmp_path, monkeypatch, code, "package_with_a_rule")
    assert ours("polynomial"), "a name of ours loads no entry point"
    assert not registry._LOADED
    assert ours("of_a_package").aggregation.staleness.fn == "of_a_package"
    assert discount(StalenessConfig(fn="of_a_package"), 3) == 0.5
    STALENESS.remove("of_a_package")


def test_a_broken_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "raise OSError('no such disk')\n", "package_that_fails")
    with pytest.raises(ConfigError, match=r"package package_that_fails cannot be imported \(OSError: no such disk\)"):
        ours("of_a_package")
