"""Pages of the site that are written from the code: configuration, command line, rules, API and sources.

Each function gives one page as Markdown. `docs/site_hooks.py` puts them into the site when it is built.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from typer.main import get_group

from worldlm_ray.cli.main import app
from worldlm_ray.config import names, schema
from worldlm_ray.config.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
INTERNAL = {"kept"}
"""Keys that a run writes for itself."""
API = {
    "Python": (
        "worldlm_ray.api.runs",
        "worldlm_ray.api.run",
        "worldlm_ray.api.comparison",
    ),
    "Running": (
        "worldlm_ray.config.loading",
        "worldlm_ray.plan.plan",
        "worldlm_ray.plan.rundir",
        "worldlm_ray.simulation.simulator",
        "worldlm_ray.launch.run",
    ),
    "Extending": (
        "worldlm_ray.config.registry",
        "worldlm_ray.aggregation.staleness",
        "worldlm_ray.aggregation.attention",
        "worldlm_ray.aggregation.server_optimizer",
        "worldlm_ray.aggregation.rules",
        "worldlm_ray.aggregation.fold",
        "worldlm_ray.aggregation.robust_fold",
        "worldlm_ray.exchange.compression",
        "worldlm_ray.data.corpora",
        "worldlm_ray.tracking.sinks",
    ),
    "What travels, and what happened": (
        "worldlm_ray.exchange.messages",
        "worldlm_ray.records",
        "worldlm_ray.errors",
    ),
}
"""Modules of the API pages, by what they are for."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh", ".md": "markdown"}


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def documented(settings: type) -> dict[str, str]:
    """The docstring below each field of a class of settings; empty where there is none."""
    tree = ast.parse(inspect.getsource(settings))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found: dict[str, str] = {}
    for here, below in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            found[here.target.id] = str(below.value.value) if is_text else ""
    return found


def kind(hint: Any) -> str:
    """The type of a key as a person writes it: the choices of a name, or the type."""
    registry = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Registry)), None)
    if registry is not None:
        choices = (*([] if registry.off is None else [registry.off]), *registry.names())
        return ", ".join(f"`{name}`" for name in choices)
    arguments = get_args(hint)
    if str(get_origin(hint)) == "typing.Literal":
        return ", ".join(f"`{name}`" for name in arguments)
    if hint is Any:
        return ""
    if get_origin(hint) in (list, dict):
        inside = ", ".join(kind(one) for one in arguments if one is not Any)
        return f"{'list' if get_origin(hint) is list else 'mapping'}{f' of {inside}' if inside else ''}"
    if arguments:
        return " or ".join(kind(one) for one in arguments if one is not type(None))
    return {str: "text", int: "integer", float: "number", bool: "true or false"}.get(hint, str(hint))


def default(field: dataclasses.Field[Any]) -> str:
    """The default of a key as YAML has it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def row(key: str, values: str, unless_given: str, text: str) -> str:
    """A row of the table of keys. Two columns fit a telephone."""
    text = re.sub(r"\bdocs/([a-z_]+)\.md", r"[\1](../\1.md)", cell(text))
    facts = [part for part in (values, f"default {unless_given}" if unless_given else "no default") if part]
    return f"| `{key}` | {text}{' ' if text else ''}*({'; '.join(facts)})* |"


def section(settings: type, path: str, inherited: tuple[str, ...]) -> list[str]:
    """Keys of a class of settings as a table, and below it those of its parts."""
    hints, texts = get_type_hints(settings, include_extras=True), documented(settings)
    rows, parts = [], []
    for field in dataclasses.fields(settings):
        key = f"{path}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(hints[field.name]):
            parts.append((hints[field.name], key))
        elif field.name not in INTERNAL:
            rows.append(row(key, kind(hints[field.name]), default(field), texts[field.name]))
    level = "#" * min(2 + path.count("."), 4)
    lines = [f"{level} {path or 'The run'}", "", (inspect.getdoc(settings) or "").strip(), ""]
    if path in inherited:
        lines += ["*Inherited down the tree; any node may override it.*", ""]
    if rows:
        lines += ["| key | meaning |", "|---|---|", *rows, ""]
    for part, key in parts:
        lines += section(part, key, inherited)
    return lines


def configuration() -> str:
    """The page of every key of a configuration."""
    from worldlm_ray.plan import tree

    lines = [
        "# Configuration",
        "",
        "Every key, with its default and unit, from the schema. A key is checked before Ray starts.",
        "",
    ]
    lines += ["## The tree", "", inspect.cleandoc(tree.__doc__ or "").partition("\n\n")[2], ""]
    node = ", ".join(f"`{key}`" for key in schema.NODE_KEYS if key not in schema.INHERITED)
    member = ", ".join(f"`{key}`" for key in schema.MEMBER_KEYS)
    lines += [f"Keys of a node: {node}, and each inherited section below. Keys of a member: {member}.", ""]
    return "\n".join([*lines, *section(schema.RunConfig, "", schema.INHERITED)])


def command(name: str, one: Any) -> list[str]:
    """A command of the command line: what it does, its arguments and options."""
    context = one.make_context(name, [], resilient_parsing=True)
    usage = " ".join(one.get_usage(context).split()).removeprefix("Usage: ")
    lines = [f"## {name}", "", inspect.cleandoc(one.help or ""), "", "```text", usage, "```", ""]
    records = [record for parameter in one.params if (record := parameter.get_help_record(context))]
    if records:
        lines += ["| argument or option | meaning |", "|---|---|"]
        lines += [f"| `{' '.join(words.split())}` | {cell(meaning)} |" for words, meaning in records]
    return [*lines, ""]


def command_line() -> str:
    """The page of every command."""
    group = get_group(app)
    lines = [
        "# The command line",
        "",
        "`CONF` is a preset's name or a YAML file, `RUN` the folder of a run or its name under `runs/`.",
        "",
    ]
    lines += ["[Operations](../operations.md#commands-and-exit-codes) has the exit codes.", ""]
    for name, one in group.commands.items():
        for below, part in getattr(one, "commands", {}).items():
            lines += command(f"worldlm {name} {below}", part)
        if not hasattr(one, "commands"):
            lines += command(f"worldlm {name}", one)
    return "\n".join(lines)


def rules() -> str:
    """The page of every name that a configuration chooses: rules, codecs, corpora."""
    lines = [
        "# Rules by name",
        "",
        "What a configuration chooses by name. [Extending](../extending.md) says how to add one.",
        "",
    ]
    for registry in (one for one in vars(names).values() if isinstance(one, Registry)):
        lines += [
            f"## {registry.what.capitalize()}",
            "",
            f"Key: `{registry.key}`.",
            "",
            "| name | what it is |",
            "|---|---|",
        ]
        for name, text in registry.documented().items():
            first, *rest = text.split("\n\n")
            source = next((part for part in rest if part.startswith("Source:")), "")
            lines.append(f"| `{name}` | {cell(f'{first} {source}')} |")
        lines.append("")
    return "\n".join(lines)


def api() -> dict[str, str]:
    """The pages of the API, by their path: one that lists the modules, and one each."""
    lines = ["# API", "", "From the docstrings. [Architecture](../architecture.md) lists every other module.", ""]
    pages = {}
    for title, modules in API.items():
        lines += [f"## {title}", "", "| module | what it is |", "|---|---|"]
        for module in modules:
            first = (ast.get_docstring(ast.parse(_file(module).read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
            lines.append(f"| [`{module}`](api/{module}.md) | {cell(first)} |")
            pages[f"reference/api/{module}.md"] = (
                f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n"
            )
        lines.append("")
    return {"reference/api.md": "\n".join(lines), **pages}


def notebook(text: str) -> list[str]:
    """The cells of a notebook, with what they print.

    Args:
        text: the notebook's JSON.
    """
    lines: list[str] = []
    for one in json.loads(text)["cells"]:
        body = "".join(one["source"])
        if one["cell_type"] != "code":
            lines += [re.sub(r"^#", "##", body, flags=re.M), ""]
            continue
        lines += ["```python", body, "```", ""]
        for output in one["outputs"]:
            printed = output.get("text") or output.get("data", {}).get("text/plain", "")
            lines += ["```text", "".join(printed).rstrip("\n"), "```", ""] if printed else []
    return lines


def source(path: str) -> str:
    """A page with the text of a file, or of the files of a folder.

    Args:
        path: from the root of the repository.
    """
    place = ROOT / path
    files = sorted(one for one in place.iterdir() if one.is_file()) if place.is_dir() else [place]
    lines = ["---", "search:", "  exclude: true", "---", "", f"# {path}", ""]
    for file in files:
        lines += [f"## {file.name}", ""] if place.is_dir() else []
        if file.suffix == ".ipynb":
            lines += notebook(file.read_text(encoding="utf-8"))
            continue
        lines += [
            f"````{LANGUAGES.get(file.suffix, 'text')}",
            file.read_text(encoding="utf-8").rstrip("\n"),
            "````",
            "",
        ]
    return "\n".join(lines)


@lru_cache(maxsize=1)
def reference() -> dict[str, str]:
    """Every generated page of the reference, by its path in the site."""
    pages = {"reference/configuration.md": configuration(), "reference/cli.md": command_line()}
    return {**pages, "reference/rules.md": rules(), **api()}


def _file(module: str) -> Path:
    place = ROOT / module.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


if __name__ == "__main__":
    sys.stdout.write("\n".join(reference()) + "\n")
