"""The arguments that a docstring explains are those of its function: none that is gone, and none left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARGS = re.compile(r"^Args:\n((?:    .*\n?|\n)+)", re.MULTILINE)
NAMES = re.compile(r"^    ((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*): ", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def documented(node: ast.ClassDef | Function) -> set[str]:
    """Names in the section `Args` of a docstring; empty where there is none."""
    section = ARGS.search(ast.get_docstring(node) or "")
    lines = NAMES.findall(section.group(1)) if section else []
    return {name.strip(" *") for line in lines for name in line.split(",")}


def arguments(node: ast.ClassDef | Function) -> set[str] | None:
    """Names of the arguments; of a class those of its `__init__`. None of a class without one: it inherits it."""
    if isinstance(node, ast.ClassDef):
        made = [each for each in node.body if isinstance(each, Function) and each.name == "__init__"]
        return arguments(made[0]) if made else None
    taken = node.args
    all_of_them = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg]
    return {each.arg for each in all_of_them if each is not None} - {"self", "cls"}


def wrong(source: str) -> Iterator[tuple[int, str, set[str]]]:
    """Line and name of every function or class whose docstring explains other arguments, and the ones that differ."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | Function) and (said := documented(node)):
            there = arguments(node)
            if there is not None and said != there:
                yield node.lineno, node.name, said ^ there


def test_docstrings_explain_the_arguments_that_there_are() -> None:
    paths = sorted(path for folder in ("worldlm_ray", "actors") for path in (ROOT / folder).rglob("*.py"))
    found = {path.relative_to(ROOT): list(wrong(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: each for path, each in found.items() if each} == {}
    assert len(paths) > 300


def test_an_argument_that_is_gone_or_left_out_is_seen() -> None:
    source = '''
class Node:
    """A node.

    Args:
        path: of the node.
        layout, rules: of the model.
            and a second line: of these.
    """

    def __init__(self, path, layout, *, clock):
        pass
'''
    assert list(wrong(source)) == [(2, "Node", {"rules", "clock"})]
    assert list(wrong(source.replace("*, clock", "rules"))) == []
