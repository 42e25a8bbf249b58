"""The session in docs/gateway.md is what the commands print: an invitation, a join, two looks, a revocation.

Where they print something else, the test writes what they have printed now, to be copied into the document.
"""

from __future__ import annotations

import asyncio
import re
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.borders import NodeAsParent
from support.documents import read
from support.gateway_commands import run
from support.worlds import client

from worldlm_ray.config.loading import load
from worldlm_ray.gateway import terms
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.charter import impose
from worldlm_ray.gateway.connections import ConnectionLimits
from worldlm_ray.gateway.contexts import server_context
from worldlm_ray.gateway.link import hello_of
from worldlm_ray.gateway.server import Gateway, Settings
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import make_plan

DOCUMENT, HEADING = "docs/gateway.md", "## A session"
ALIKE: dict[str, Any] = {
    "model": {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "context": 32},
    "budget": {"rounds": 3},
}
WIDE, SHOWN = 118, 24
"""Columns of the document; characters of an invitation that are shown."""


def written() -> str:
    """The session in the document."""
    section = read(DOCUMENT).partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))


def alike(session: str) -> list[str]:
    """What does not differ from one session to the next: words, and the names of things."""
    text = re.sub(r"\b[0-9a-f]{4}( [0-9a-f]{4})+\b", "KEY", " ".join(session.split()))
    text = re.sub(r"\b[0-9a-f]{16,}\b", "ID", text)
    text = re.sub(r"worldlm1\.\w+", "LINE", text)
    text = re.sub(r"localhost is [\w:., ]+? ok", "localhost is ADDRESS ok", text)
    text = re.sub(r"\b(\d+ )?(now|s|min|seconds?|minutes?) ago\b|\bnow\b", "NOW", text)
    return re.sub(r"[-+]?\d[\d,.]*", "0", text).split()


def prepare(folder: Path) -> None:
    """What both operators have written before: a passphrase, two configurations and a policy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("acme", "europe"):
        (folder / name).mkdir()
    (folder / "acme/passphrase").write_text("correct horse\n")
    (folder / "acme/port").write_text(str(port))
    world = {
        "gateway": {"listen": f"127.0.0.1:{port}", "member_rate_mbps": 200},
        "world": {"children": [{"member": "europe"}]},
    }
    (folder / "acme/world.yaml").write_text(yaml.safe_dump(ALIKE | world))
    rome = client("rome", folder / "europe", 1)
    member = {"joins": "profile", "world": {"federation": "world/europe", "children": [rome]}}
    (folder / "europe/europe.yaml").write_text(yaml.safe_dump(ALIKE | {"budget": {"rounds": 5}} | member))
    (folder / "europe/policy.yaml").write_text("send: {rate_mbps: 100, codecs: [fp32, int8]}\n")


@contextmanager
def a_run(folder: Path) -> Iterator[None]:
    """The gateway of acme's run, in another thread: commands start event loops, too."""
    plan = make_plan(load(str(folder / "acme/world.yaml")), check_data=False)
    authority, sizes = Authority(folder / "acme/gateway"), terms.sizes_of(plan, plan.root)
    signed = impose(authority.identity, "world", terms.alike(plan, plan.root), terms.imposed(plan, plan.root))
    options: dict[str, Any] = {"root_pem": authority.identity.root_pem, "charter": signed.raw}
    options |= {"world": authority.identity.world, "limits": ConnectionLimits(look_s=10.0)}
    settings = Settings(
        sizes=sizes, hello=hello_of(sizes), staging_dir=folder / "staging", staging_bytes=2**20, **options
    )
    node = NodeAsParent(build.inner_node(plan, plan.root, build.initial(plan)))
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        gateway, port = Gateway(node, authority, settings), int((folder / "acme/port").read_text())
        await gateway.start(server_context(authority.identity), host="127.0.0.1", port=port)
        ready.set()
        await stop.wait()
        await gateway.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(20.0)
    yield
    loop.call_soon_threadsafe(stop.set)
    thread.join(10.0)
    loop.close()


def test_the_session_in_the_document_is_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    prepare(tmp_path)
    lines: list[str] = []

    def type_(place: str, *words: str, hidden: str = "", only: str = "", code: int = 0) -> str:
        monkeypatch.chdir(tmp_path / place)
        done = run(*words)
        assert done.exit_code == code, done.output
        said = " ".join(words).replace(hidden, hidden[:SHOWN] + "...") if hidden else " ".join(words)
        lines.append(f"{place}$ worldlm gateway {said}{f' | grep {only}' if only else ''}")
        for line in filter(lambda each: only in each, done.output.splitlines()):
            shown = line[:SHOWN] + "..." if line.startswith("worldlm1.") else line
            lines.extend(textwrap.wrap(shown, WIDE, subsequent_indent="      ") if len(shown) > WIDE else [shown])
        return done.stdout

    port = (tmp_path / "acme/port").read_text()
    type_("acme", "init", "acme", "--name", "localhost", "--port", port, "--passphrase-file", "passphrase")
    line = type_("acme", "invite", "world/europe").strip()
    with a_run(tmp_path):
        type_("europe", "join", line, "--policy", "policy.yaml", hidden=line)
        type_("europe", "check", "--conf", "europe.yaml", only="WRONG", code=1)
        fitting = (tmp_path / "europe/europe.yaml").read_text().replace("rounds: 5", "rounds: 3")
        (tmp_path / "europe/europe.yaml").write_text(fitting)
        lines.append("europe$ sed -i 's/rounds: 5/rounds: 3/' europe.yaml")
        type_("europe", "check", "--conf", "europe.yaml")
        type_("acme", "revoke", "world/europe")
        type_("acme", "members")
        type_("europe", "check", only="WRONG", code=1)
    session = "\n".join(each.rstrip() for each in lines)
    (tmp_path / "session.txt").write_text(textwrap.indent(session, "    ") + "\n")
    assert alike(written()) == alike(session), f"copy {tmp_path}/session.txt into {DOCUMENT}, below {HEADING!r}"
