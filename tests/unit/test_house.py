"""The size of rooms, and some rules of the house. What broke a rule when it was made stands in tests/house.json.

That list may only shrink: an offender that has grown fails, and so does one that is listed and offends no more.
`python tests/unit/test_house.py` takes out what has been mended; it never adds or raises an entry. With `--largest` it
prints the ten largest files and classes of the two packages.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "house.json"
MOST = {"file": 400, "class": 300, "function": 60, "parameters": 8, "ray": 0, "test": 0}
"""Lines of a file, a class and a function; parameters of a function without `self`; private parts of Ray that a file
uses, and tests that a test imports. One folder may use private parts of Ray: PRIVATE_PARTS_OF_RAY."""
MODULES_AT_THE_TOP = {"__init__", "__main__", "errors", "records", "run_clock", "seeds"}
PRIVATE_PARTS_OF_RAY = "worldlm_ray/launch/private/"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def named(
    tree: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every class and function with its dotted name inside its file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            yield from named(node, f"{prefix}{node.name}.")
        else:
            yield from named(node, prefix)


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def private_parts_of_ray(path: Path) -> set[str]:
    """Modules and names of Ray's with an underscore in front that a file uses."""
    text = path.read_text(encoding="utf-8")
    if not re.search(r"\bray\b.*\._", text):
        return set()
    found = {name for name in imports(path) if re.match(r"ray(\.\w+)*\._", name)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and re.match(r"ray(\.\w+)*\._[a-z]", ast.unparse(node)):
            found.add(ast.unparse(node))
    return found


def measures() -> Iterator[tuple[str, str, str, int]]:
    """Kind, path, name and size of everything that has a limit."""
    tests = {path.stem for path in sources("tests") if path.stem.startswith("test_")}
    for path in sources("worldlm_ray", "actors", "benchmarks", "examples", "tests"):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        measured = [("file", "", len(text.splitlines()))]
        if place.startswith("tests/"):
            measured.append(("test", "", len(imports(path) & tests)))
        elif not place.startswith(PRIVATE_PARTS_OF_RAY):
            measured.append(("ray", "", len(private_parts_of_ray(path))))
        for name, node in named(ast.parse(text)):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            measured.append((kind, name, (node.end_lineno or 0) - node.lineno + 1))
            if not isinstance(node, ast.ClassDef) and not place.startswith("tests/"):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                counted = [argument for argument in every if argument.arg not in ("self", "cls")]
                # A command's parameters are its options: typer makes the command line of them.
                is_command = place.startswith("worldlm_ray/cli/") and not name.startswith("_")
                is_command |= any("command" in ast.unparse(decorator) for decorator in node.decorator_list)
                measured.append(("parameters", name, 0 if is_command else len(counted)))
        for kind, name, size in measured:
            yield kind, place, name, size


@lru_cache
def sizes() -> dict[str, int]:
    """What is larger than it may be, as `kind path name`, and how large it is."""
    return {f"{kind} {place} {name}".rstrip(): size for kind, place, name, size in measures() if size > MOST[kind]}


def print_largest(count: int = 10) -> None:
    """Print the largest files and classes of the two packages."""
    ours = [entry for entry in measures() if entry[1].startswith(("worldlm_ray/", "actors/"))]
    for kind in ("file", "class"):
        ranked = sorted((entry for entry in ours if entry[0] == kind), key=lambda entry: -entry[3])
        for _, place, name, size in ranked[:count]:
            print(f"{kind:6} {size:5} {place} {name}")


def allowed() -> dict[str, int]:
    listed: dict[str, int] = json.loads(FILE.read_text(encoding="utf-8"))
    return listed


def test_no_room_is_larger_than_it_may_be() -> None:
    listed = allowed()
    too_large = {key: size for key, size in sizes().items() if size > listed.get(key, 0)}
    assert not too_large, f"cut these, or give what they do a room: {too_large}; at most {MOST}"


def test_the_list_of_large_rooms_only_shrinks() -> None:
    mended = sorted(set(allowed()) - set(sizes()))
    assert not mended, f"take them out of tests/house.json (python tests/unit/test_house.py): {mended}"


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports test files by their names: it would refuse to collect the second one."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []


def test_few_modules_stand_at_the_top() -> None:
    top = {path.stem for path in (ROOT / "worldlm_ray").glob("*.py")}
    assert top == MODULES_AT_THE_TOP


@pytest.mark.parametrize(
    ("source", "found"), [("import ray._private.x", True), ("ray.get(1)", False), ("ray.a._b()", True)]
)
def test_private_parts_are_seen(tmp_path: Path, source: str, found: bool) -> None:
    (tmp_path / "x.py").write_text(source, encoding="utf-8")
    assert bool(private_parts_of_ray(tmp_path / "x.py")) == found


if __name__ == "__main__":
    if sys.argv[1:] == ["--largest"]:
        print_largest()
        sys.exit()
    now = sizes()
    kept = {key: min(size, now[key]) for key, size in allowed().items() if key in now}
    FILE.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
    print(f"{len(kept)} entries left")
