"""The `worldlm` command.

Errors of the user are one line on stderr and exit code 2; `--debug` shows the traceback. Nothing heavy is imported
before it is needed, so that a wrong configuration is answered in a second.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from worldlm_ray.cli import (
    clusters,
    dashboard,
    experiments,
    gateway,
    gateway_charter,
    gateway_check,
    gateway_member,
    inspect,
    models,
    runs,
)
from worldlm_ray.cli.common import console, errors, spoken_of
from worldlm_ray.errors import ConfigError, OutputError, WorldLMError

app = typer.Typer(
    name="worldlm",
    help="Train language models across federations of federations, asynchronously, on Ray.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    runs.train,
    runs.simulate,
    experiments.compare,
    experiments.newcomer,
    experiments.map_,
    inspect.show,
    inspect.presets,
    models.evaluate,
    models.sample,
    models.export,
    inspect.privacy,
    runs.join,
    runs.leave,
    clusters.cluster,
    inspect.audit,
    runs.status,
    dashboard.dashboard,
)
"""In the order in which --help lists them."""
for _command in COMMANDS:
    app.command(_command.__name__.rstrip("_"))(_command)
for _of_a_member in (gateway_check.check, *gateway_member.COMMANDS):
    gateway.app.command(_of_a_member.__name__)(_of_a_member)
gateway.app.add_typer(gateway_charter.app)
app.add_typer(gateway.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        python = ".".join(map(str, sys.version_info[:3]))
        parts = [f"{name} {version(name)}" for name in ("worldlm_ray", "ray", "torch")]
        console.print(", ".join([*parts, f"Python {python}"]), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Read by `main`; stands here so that --help lists it."""


def _check_words(words: list[str]) -> None:
    """Refuse words of the command line that are not valid UTF-8: no file of a run could hold them."""
    for index, word in enumerate(words):
        try:
            word.encode()
        except UnicodeEncodeError:
            name, _, value = word.partition("=")
            if not value or not name.isascii():
                before = words[index - 1] if index else ""
                name, value = before if before.startswith("--") else f"argument {index + 1}", word
            raise ConfigError(name, f"{value!a} is not valid UTF-8", "give text in UTF-8") from None


def main() -> None:
    """Entry point: one line for the user's errors, a traceback for ours or with --debug."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        _check_words(sys.argv[1:])
        app(prog_name="worldlm")  # the name that completion goes by, also of `python -m worldlm_ray`
    except WorldLMError as error:
        if debug:
            raise
        from worldlm_ray.config.places import told

        for line in told(error, *(spoken_of() or ())):
            errors.print(f"worldlm: {line}", highlight=False)
        if isinstance(error, OutputError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its last flush would fail again
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
