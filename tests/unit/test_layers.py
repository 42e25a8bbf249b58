"""Which package may import which: the core runs without Ray, and inner nodes run without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from worldlm_ray import errors

PACKAGE = Path(errors.__file__).parent
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Refuse())
"""


def modules() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def imports_without(refused: tuple[str, ...], names: list[str]) -> subprocess.CompletedProcess[str]:
    code = (
        BLOCK.format(refused=refused)
        + "import importlib\n"
        + "".join(f"importlib.import_module({name!r})\n" for name in names)
    )
    code += f"assert not set({refused!r}) & set(sys.modules)\n"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=PACKAGE.parent,
    )


def test_the_whole_core_imports_with_ray_out_of_reach() -> None:
    names = [name for name in modules() if not name.startswith("worldlm_ray.launch")]
    assert len(names) > 20
    done = imports_without(("ray", "actors"), names)
    assert done.returncode == 0, done.stderr


def test_an_inner_node_needs_no_torch() -> None:
    names = [
        "worldlm_ray.plan.plan",
        "worldlm_ray.aggregation.node",
        "worldlm_ray.storage.checkpoint",
        "worldlm_ray.reports.describe",
    ]
    done = imports_without(("torch", "ray", "actors"), names)
    assert done.returncode == 0, done.stderr


def test_the_hook_does_refuse() -> None:
    done = imports_without(("ray",), ["worldlm_ray.launch"])
    assert done.returncode != 0
    assert "ray must not be imported here" in done.stderr


@pytest.mark.parametrize("name", [name for name in modules() if not name.startswith("worldlm_ray.launch")])
def test_no_module_of_the_core_names_ray_anywhere(name: str) -> None:
    path = PACKAGE.parent / Path(*name.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & {"ray", "actors"}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in ("ray", "actors")


def layer_table() -> dict[str, int]:
    """Rank of every module by the table in CONTRIBUTING.md; higher may import lower."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ") and "`" in line]
    found: dict[str, int] = {}
    for rank, row in enumerate(reversed(rows)):
        found |= {module.rstrip("/"): rank for module in re.findall(r"`([a-z_/]+)`", row)}
    return found


def imported(file: Path) -> set[str]:
    """Top modules of ours that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "worldlm_ray":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package, _, rest = node.module.partition(".")
            found |= {"actors"} if package == "actors" else {rest.split(".")[0]} if package == "worldlm_ray" else set()
    return found


def test_the_layers_are_those_of_the_contributing_guide() -> None:
    ranks = layer_table()
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert files | folders == set(ranks) - {"actors"}
    for module in sorted(set(ranks) - {"actors"}):
        place = PACKAGE / module
        for file in place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            for other in imported(file) - {module, ""}:
                assert ranks[other] <= ranks[module], f"{file.name} of {module} imports {other}, which lies above it"


SHARED_BY_ACTORS = {
    "above",
    "drivers",
    "inner",
    "leaf",
    "node_checkpoints",
    "gateway_node",
    "node_records",
    "plans",
    "pool_member",
    "shared",
    "graceful_shutdown",
}


def test_an_actor_module_imports_only_what_actors_share() -> None:
    folder = PACKAGE.parent / "actors"
    others = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("actors."):
                name = ".".join(path.relative_to(folder).with_suffix("").parts)
                others.add((name, (node.module or "").removeprefix("actors.")))
    inside = {(who, what) for who, what in others if who.startswith("zero.") and what.startswith("zero.")}
    others = {(who, what) for who, what in others - inside if what not in SHARED_BY_ACTORS}
    assert others == {("zero.client", "client")}


def test_an_actor_knows_of_the_launcher_only_the_private_parts_of_ray() -> None:
    used = set()
    for path in (PACKAGE.parent / "actors").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("worldlm_ray.launch"):
                used.add(node.module)
    assert used
    assert all(module.startswith("worldlm_ray.launch.private") for module in used), used
