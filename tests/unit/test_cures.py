"""Every CheckpointError and RunError says what to do: its text has a cure behind a semicolon."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {"CheckpointError", "RunError", "OutputError", "Unreachable"}
PASSED_ON = {
    "found": "a worker's error, with its cure",
    "self._ended": "why a group of workers ended, with its cure",
    "_refusal(error)": "each of its texts has a cure",
    "'\\n'.join(sorted(problems))": "each line is a problem with its cure",
    "f'{self.path}: {error}'": "a CheckpointError of a part of the node",
    "f'no model of {plan.run_dir} can serve: {left_out[uncovered]}'": "the CheckpointError of a node",
    "f'{path} {why}'": "each text of _NO_ROUND has a cure",
    "f'{missing} ({error})'": "the first error has its cure",
    "f'{name} does not let {plan.top.path} in: {told.detail}'": "a refusal's detail has its cure",
    "f'{run_dir} already holds {_taken(made)}, or give another --run-dir'": "what holds it has a cure",
}
"""Texts that are made elsewhere, and why they need nothing more."""


def messages(source: str) -> list[tuple[int, ast.expr]]:
    """Line and message of every such error that a file makes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            found.append((node.lineno, node.args[-1]))
    return found


def has_cure(message: ast.expr) -> bool:
    texts = [node.value for node in ast.walk(message) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return any(";" in text for text in texts) or ast.unparse(message) in PASSED_ON


def test_every_error_of_a_run_or_a_checkpoint_names_a_cure() -> None:
    found, without = 0, []
    for path in sorted(p for folder in ("worldlm_ray", "actors") for p in (ROOT / folder).rglob("*.py")):
        for line, message in messages(path.read_text(encoding="utf-8")):
            found += 1
            if not has_cure(message):
                without.append(f"{path.relative_to(ROOT)}:{line}: {ast.unparse(message)}")
    assert without == []
    assert found > 50


def test_a_text_without_a_cure_is_seen() -> None:
    [(line, message)] = messages('raise RunError(f"{path}: is damaged")')
    assert (line, has_cure(message)) == (1, False)
    [(_, message)] = messages('raise CheckpointError(f"{path}: is damaged" + "; restore it from a copy")')
    assert has_cure(message)
