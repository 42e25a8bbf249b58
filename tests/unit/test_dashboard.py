"""`worldlm dashboard`: what its page is told of a run, and what its server refuses."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from support.tracked import ITALY, Clock, attention, round_of, start, tracker, verdict
from typer.testing import CliRunner

from worldlm_ray.cli.main import app
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import CONFIG, SUMMARY
from worldlm_ray.records import BorderRecord, LifeRecord, VerdictRecord
from worldlm_ray.reports import dashboard
from worldlm_ray.reports.dashboard import Dashboard, look
from worldlm_ray.reports.dashboard_server import METHODS, Server
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tracking.audit import AuditLog
from worldlm_ray.tracking.drawing import MOST_CANDIDATES, attention_means
from worldlm_ray.tracking.tracker import Tracker

EUROPE = "world/europe"


def row(found: Mapping[str, Any], path: str) -> dict[str, Any]:
    [node] = [node for node in found["nodes"] if node["path"] == path]
    return dict(node)


def points(found: Mapping[str, Any], node: str, name: str = "loss") -> list[list[float]]:
    [curve] = [curve for curve in found["curves"] if (curve["node"], curve["name"]) == (node, name)]
    return [list(point) for point in curve["points"]]


def test_a_simulated_run_has_its_tree_its_curves_and_its_audit(tiny: Callable[..., Plan]) -> None:
    plan = tiny(budget={"rounds": 2})
    simulate(plan)
    found = json.loads(Dashboard(plan.run_dir).json())
    clients = [path for path, kind in plan.kinds.items() if kind == "client"]
    assert [node["path"] for node in found["nodes"]] == list(plan.kinds)
    assert (found["run"], found["ended"], found["every_s"]) == ("run", True, dashboard.ENDED_EVERY_S)
    assert found["tokens"] == sum(row(found, path)["tokens"] for path in clients) > 0
    for path in clients:
        times, tokens, losses = zip(*points(found, path), strict=True)
        assert list(times) == sorted(times)
        assert tokens[-1] == row(found, path)["tokens"]
        assert losses[-1] == row(found, path)["loss"]
    assert points(found, "world", "clients_loss")
    assert found["audit"]["holds"] is True
    edges = {f"{edge['node']}/{edge['sender']}": edge for edge in found["audit"]["edges"]}
    assert edges.keys() == plan.kinds.keys() - {"world"}
    assert {path: edge["applied"] for path, edge in edges.items()} == {
        path: row(found, path)["accepted"] for path in edges
    }
    assert "error" not in found


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Tracker]:
    """A run that goes on: italy has trained, and one update of it was refused."""
    made = tracker(tmp_path, clock=Clock())
    made.record(start(ITALY))
    made.record(round_of(ITALY, tokens=100, loss=4.0, epsilon=1.5))
    log = AuditLog(tmp_path, EUROPE)
    for record in (verdict("italy"), verdict("italy", "stale", tau=2, seq=2)):
        log.verdict(record)
        made.record(record)
    made.record(attention())
    made.flush()
    yield made
    made.close()


def test_a_living_run_says_who_is_away_and_how_fast_links_are(living: Tracker, tmp_path: Path) -> None:
    border = BorderRecord(
        node="world/japan", now_s=11.0, bytes_up=10, bytes_down=20, mbit_up=3.5, mbit_down=8.0, resumed=1, accepted=2,
        refused={}, tau=1, every_s=5.0, parameters=100, codec="none", overlap=False, certificate_days=9.0,
        offline_s=42.0,
    )  # fmt: skip
    living.record(border)
    living.record(LifeRecord(node=ITALY, now_s=12.0, event="lost", detail="no answer"))
    living.flush()
    found = look(tmp_path)
    italy, japan = row(found, ITALY), row(found, "world/japan")
    assert (found["said"], found["ended"], found["every_s"]) == ("running", False, dashboard.EVERY_S)
    assert (italy["state"], italy["away"], italy["epsilon"], italy["depth"]) == ("lost", True, 1.5, 2)
    assert (italy["accepted"], italy["refused"], italy["tau"], italy["tau_mean"]) == (1, 1, 2, 1.0)
    assert (japan["mbit_up"], japan["mbit_down"], japan["offline_s"], japan["away"]) == (3.5, 8.0, 42.0, True)
    assert not row(found, "world/europe/france")["away"]
    assert (found["audit"]["applied"], found["audit"]["refused"]) == (1, 1)


def test_the_newest_attention_weights_are_means_over_key_layers(living: Tracker, tmp_path: Path) -> None:
    living.record(replace(attention(version=5), now_s=14.0, weights=((0.5, 0.5), (0.7, 0.3))))
    living.close()
    [blend] = look(tmp_path)["attention"]
    assert (blend["node"], blend["of"]) == (EUROPE, "children")
    assert list(blend["weights"].items()) == [("self", 0.6), ("italy", 0.4)]


def test_attention_has_curves_of_the_candidates_that_weigh_most() -> None:
    names = tuple(f"n{number}" for number in range(MOST_CANDIDATES + 3))
    row = tuple(float(number) for number in range(len(names)))
    means = attention_means(replace(attention(), candidates=names, weights=(row, row)))
    assert len(means) == MOST_CANDIDATES
    assert next(iter(means)) == f"attention/up/{names[-1]}"
    assert means["attention/up/n3"] == 3.0


def test_a_run_without_a_status_is_asked_about_again(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert found["every_s"] == dashboard.EVERY_S
    assert found["error"].startswith(f"there is no run in {str(tmp_path)!r}")


def test_a_summary_ends_a_run(living: Tracker, tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text("{}")
    assert look(tmp_path)["ended"]


@pytest.mark.parametrize(
    "line", [b"5", b"null", b"[]", b'{"now_s": 1}', b'{"now_s": 1, "tokens": 1, "nod', b"\xff\xfe", b"[" * 9000]
)
def test_a_damaged_line_of_the_curves_is_left_out(living: Tracker, tmp_path: Path, line: bytes) -> None:
    before = look(tmp_path)["curves"]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    assert before
    assert look(tmp_path)["curves"] == before


def test_a_damaged_trail_proves_nothing(living: Tracker, tmp_path: Path) -> None:
    with (tmp_path / "audit" / "world" / "europe.jsonl").open("a") as file:
        file.write("?\n")
    found = look(tmp_path)["audit"]
    assert found["holds"] is False
    assert "europe.jsonl line 3" in found["conclusion"]


def test_a_long_curve_keeps_its_ends(living: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "POINTS", 20)
    many = 207
    for number in range(1, many):
        living.record(round_of(ITALY, tokens=100 * number, loss=1.0 + 1.0 / number, now_s=10.0 + number))
    living.flush()
    shown = points(look(tmp_path), ITALY)
    assert len(shown) <= 21
    assert shown[0][0] == 0.0
    assert shown[-1][:2] == [9.0 + many, 100 * (many - 1)]


def test_a_run_is_read_no_more_often_than_the_page_needs(
    living: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, reads = Clock(), list[float]()

    def slow(_: Path) -> dict[str, Any]:
        reads.append(clock.now)
        clock.now += 3.0
        return {"read": len(reads)}

    monkeypatch.setattr(dashboard, "look", slow)
    board = Dashboard(tmp_path, clock=clock)
    assert json.loads(board.json()) == {"read": 1}
    clock.now += 11.9  # a quarter of the time at most
    assert json.loads(board.json()) == {"read": 1}
    clock.now += 0.1
    assert json.loads(board.json()) == {"read": 2}


@contextmanager
def serving(folder: Path, **where: Any) -> Iterator[Server]:
    with Server(folder, port=0, **where) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(living: Tracker, tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as made:
        yield made


def asked(server: Server, path: str, *, method: str = "GET", host: str | None = None) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host if host is not None else f"127.0.0.1:{server.server_port}")
        connection.endheaders()
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_the_page_runs_its_script_alone_and_asks_no_other_host(server: Server) -> None:
    answer, body = asked(server, "/")
    page = body.decode()
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    policy = answer.getheader("Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval", page)


def test_a_name_that_is_html_is_only_ever_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    kinds = {"world": "world", "world/<script>": "federation", "world/<script>/<b>": "client"}
    made = Tracker(tmp_path, kinds=kinds, hparams={}, budget=BudgetConfig(rounds=1))
    made.record(start("world/<script>/<b>"))
    made.record(LifeRecord(node="world", now_s=1.0, event="warning", detail=evil))
    made.close()
    with serving(tmp_path) as server:
        answer, body = asked(server, "/data.json")
        found = json.loads(body)
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert b"<" not in body
    assert row(found, "world/<script>")["name"] == "<script>"
    assert found["warnings"][0]["text"] == evil


@pytest.mark.parametrize(
    "path",
    ["/status.json", "/config.yaml", "/../status.json", "/%2e%2e/status.json", "/data.json/", "*"],
)
def test_no_other_path_has_anything(server: Server, path: str) -> None:
    answer, body = asked(server, path)
    assert (answer.status, body) == (404, b"there is only / and /data.json\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_another_method_is_refused(server: Server, method: str) -> None:
    answer, _ = asked(server, "/data.json", method=method)
    assert (answer.status, answer.getheader("Allow")) == (405, ", ".join(METHODS))


def test_head_has_no_body(server: Server) -> None:
    answer, body = asked(server, "/", method="HEAD")
    assert (answer.status, body) == (200, b"")
    assert int(answer.getheader("Content-Length") or 0) == len(server.page)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:6116", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_a_request_for_another_host_is_refused(server: Server, host: str) -> None:
    answer, body = asked(server, "/data.json", host=host)
    assert answer.status == 421
    assert b"nodes" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1", "[::1]:6116"])
def test_this_machine_may_be_named_and_a_tunnel_has_another_port(server: Server, host: str) -> None:
    assert asked(server, "/data.json", host=host)[0].status == 200


def test_a_server_for_the_network_answers_to_addresses_but_not_to_any_name(living: Tracker, tmp_path: Path) -> None:
    with serving(tmp_path, host="0.0.0.0") as server:
        assert asked(server, "/data.json", host="10.1.2.3:80")[0].status == 200
        assert asked(server, "/data.json", host=socket.gethostname())[0].status == 200
        assert asked(server, "/data.json", host="evil.example")[0].status == 421


def test_a_port_or_an_address_that_cannot_be_bound_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--port: {server.server_port} is taken; give another one, or 0"):
        Server(tmp_path, port=server.server_port)
    with pytest.raises(ConfigError, match=r"--host: cannot listen on '203\.0\.113\.1'"):
        Server(tmp_path, host="203.0.113.1", port=0)
    with pytest.raises(ConfigError, match="--host: cannot listen on 'no such host'"):
        Server(tmp_path, host="no such host", port=0)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    error = CliRunner().invoke(app, ["dashboard", str(tmp_path), "--no-open"]).exception
    assert isinstance(error, RunError)
    assert str(error).startswith(f"there is no run {str(tmp_path)!r}; give its folder or its name")


def test_the_command_says_where_the_page_is(living: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CONFIG).touch()

    def interrupted(server: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    done = CliRunner().invoke(app, ["dashboard", str(tmp_path), "--port", "0"])
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r".* is shown at http://127\.0\.0\.1:\d+/ until Ctrl-C\n", done.output)


def test_edges_that_have_lost_updates_are_listed_first(
    tmp_path: Path, living: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path, "world")
    for seq in (1, 1):
        log.verdict(VerdictRecord(**vars(verdict("japan", seq=seq)) | {"node": "world"}))
    monkeypatch.setattr(dashboard, "EDGES", 1)
    found = look(tmp_path)["audit"]
    assert [(edge["sender"], edge["twice"]) for edge in found["edges"]] == [("japan", 1)]
    assert (found["left_out"], found["holds"]) == (1, False)
