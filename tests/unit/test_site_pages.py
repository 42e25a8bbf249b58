"""Pages of the site that are generated say all that the code knows."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType

import pytest
import yaml
from support.documents import ROOT
from typer.main import get_group

from worldlm_ray.cli.main import app
from worldlm_ray.config import names, schema
from worldlm_ray.config.loading import from_mapping, to_yaml
from worldlm_ray.config.registry import Registry


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(mapping: dict[str, object], path: str = "") -> set[str]:
    """Dotted keys of a configuration; a mapping without entries is a value."""
    found: set[str] = set()
    for key, value in mapping.items():
        found |= keys(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}"}
    return found


def test_every_key_of_a_configuration_has_a_row(pages: ModuleType) -> None:
    tree = {"children": [{"client": "a", "data": {"corpus": "docstrings"}}]}
    config = from_mapping({"budget": {"rounds": 1}, "world": tree})
    known = {key for key in keys(yaml.safe_load(to_yaml(config))) if not key.startswith(("world", "kept"))}
    rows = set(re.findall(r"^\| `([^`]+)` \|", pages.configuration(), re.M))
    assert known - rows == set()
    assert rows - known <= {"world"}


def test_a_row_has_the_default_the_choices_and_the_docstring(pages: ModuleType) -> None:
    text = pages.configuration()
    assert "| `checkpoint.keep` | *(integer; default `2`)* |" in text
    meaning = "Updates per aggregation: 1 is FedAsync, more is FedBuff."
    assert f"| `aggregation.buffer_size` | {meaning} *(integer; default `1`)* |" in text
    row = next(line for line in text.splitlines() if line.startswith("| `exchange.codec` |"))
    assert all(f"`{name}`" in row for name in names.CODECS.names())
    assert "*(true or false; default `false`)*" in text
    assert str(schema.LoraConfig.__doc__) in text


def test_every_command_and_option_has_a_place(pages: ModuleType) -> None:
    text = pages.command_line()
    for name, command in get_group(app).commands.items():
        for below, part in (getattr(command, "commands", None) or {"": command}).items():
            part_of_page = text.split(f"\n## worldlm {name} {below}".rstrip() + "\n", 1)[1].split("\n## ", 1)[0]
            for parameter in part.params:
                for option in parameter.opts:
                    is_listed = option in part_of_page or not option.startswith("--") or option == "--help"
                    assert is_listed, f"worldlm {name} {below} {option}"


def test_every_registered_name_has_a_row(pages: ModuleType) -> None:
    text = pages.rules()
    for registry in (one for one in vars(names).values() if isinstance(one, Registry)):
        assert all(f"| `{name}` |" in text for name in registry.names()), registry.what


def test_modules_of_the_api_exist(pages: ModuleType) -> None:
    assert all(f"::: {module}" in "".join(pages.api().values()) for group in pages.API.values() for module in group)


def test_a_cell_holds_one_line(pages: ModuleType) -> None:
    assert pages.cell("a | b\n  <c>") == "a \\| b &lt;c&gt;"


def test_a_folder_is_shown_file_by_file(pages: ModuleType) -> None:
    assert "## onprem.yaml" in pages.source("cluster")


def test_a_notebook_is_shown_cell_by_cell(pages: ModuleType) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Words."]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"data": {"text/plain": ["2"]}}, {"text": ["said\n"]}]},
    ]
    shown = "\n".join(pages.notebook(json.dumps({"cells": cells})))
    assert shown.startswith("## Title\nWords.\n\n```python\n1 + 1\n```")
    assert "```text\n2\n```" in shown
    assert "```text\nsaid\n```" in shown
