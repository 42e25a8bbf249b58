"""The command that shows a run in a browser: dashboard."""

from __future__ import annotations

import os
import sys
import webbrowser
from contextlib import suppress
from typing import Annotated

import typer

from worldlm_ray.cli.common import Run, console

Host = Annotated[str, typer.Option("--host", help="address to listen on; others than 127.0.0.1 let the network read")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="port to listen on; 0 takes a free one")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="open the page in a browser, where there is one")]


def dashboard(run: Run, host: Host = "127.0.0.1", port: Port = 6116, open_page: Open = True) -> None:
    """Show a run, living or ended, as a page in a browser.

    The page is read-only and made from the run's folder alone: the tree, losses, the audit trail. Ctrl-C ends it.
    """
    from worldlm_ray.plan import rundir
    from worldlm_ray.reports.dashboard_server import Server

    folder = rundir.find(run)
    with Server(folder, host=host, port=port) as server, suppress(KeyboardInterrupt):
        console.print(f"{folder.name} is shown at {server.url} until Ctrl-C", highlight=False, soft_wrap=True)
        if open_page and _has_browser():
            webbrowser.open(server.url)
        server.serve_forever()


def _has_browser() -> bool:
    """Whether a window can open here. Without this, a browser for terminals might take this one."""
    return console.is_terminal and (
        sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    )
