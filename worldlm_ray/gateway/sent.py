"""What has left a member, by request, field and byte; and what would leave next. Files of the profile.

    sent.jsonl      a line for each request, written before its first byte goes; with the bytes of the day so far
    sent.1.jsonl    the lines before those
    next.json       the newest update that the member's side was given: what its header says, before the policy

A line of a transfer that was cut and begun again counts its bytes again, so that the log never says too little. Lines
survive a kill of the process; both files together hold at most `LOG_BYTES`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from worldlm_ray.errors import GatewayError
from worldlm_ray.gateway.policy import Policy, day_of
from worldlm_ray.storage.filesystem import Growing, replace_text

LOG_BYTES = 8 * 2**20
"""Of both files; a line has about 400 bytes."""
LOG, BEFORE, NEXT = "sent.jsonl", "sent.1.jsonl", "next.json"
_BYTES = "values"


class Sent:
    """The log of one profile.

    Args:
        folder: of the profile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._log = folder, Growing(folder / LOG, closing=b"\n")
        self._beats = 0
        *_, last = [{}, *lines(folder)]
        self._day, self._today = str(last.get("day", "")), int(last.get("today_bytes", 0))

    def today_bytes(self, now_s: float) -> int:
        """Bytes of updates that have gone today."""
        return self._today if self._day == day_of(now_s) else 0

    def beat(self) -> None:
        """A heartbeat goes; the next line says how many have gone."""
        self._beats += 1

    def add(self, now_s: float, request: str, *, nbytes: int = 0, **facts: Any) -> None:
        """A request is about to go.

        Args:
            now_s: Unix seconds.
            request: its name.
            nbytes: of an update; other requests are small, and count nothing.
            facts: what it says.

        Raises:
            GatewayError: the line cannot be written: then the request must not go.
        """
        self._today, self._day = self.today_bytes(now_s) + nbytes, day_of(now_s)
        line = {"at_s": round(now_s, 3), "request": request, "bytes": nbytes, **facts, "heartbeats": self._beats}
        line |= {"day": self._day, "today_bytes": self._today}
        path = self._folder / LOG
        try:
            with suppress(FileNotFoundError):
                if path.stat().st_size > LOG_BYTES // 2:
                    path.replace(self._folder / BEFORE)
            self._log.add(json.dumps(line).encode() + b"\n")
        except OSError as error:
            self._today -= nbytes
            text = f"{error.strerror or error}; nothing is sent that the log cannot say: make room"
            raise GatewayError(f"{path}: {text}") from error
        self._beats = 0

    def waits(self, header: Mapping[str, Any], nbytes: int, held: str) -> None:
        """Write what the newest update would say.

        Args:
            header: as the member's federation or client has packed it.
            nbytes: of its values.
            held: why it does not go; empty if it does.
        """
        plain = {name: value for name, value in header.items() if not isinstance(value, bytes | list)}
        residuals = [_named(residual) for residual in header.get("residuals") or []]
        facts = {"bytes": nbytes, "held": held, "header": plain, "residuals": residuals}
        with suppress(OSError):  # for people: an update goes without it
            replace_text(self._folder / NEXT, json.dumps(facts) + "\n")


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of a profile's log, oldest first; one that is damaged is left out."""
    for name in (BEFORE, LOG):
        with suppress(FileNotFoundError), (folder / name).open("rb") as file:
            for raw in file:
                with suppress(ValueError):
                    if isinstance(found := json.loads(raw), dict):
                        yield found


def preview(folder: Path, policy: Policy) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """What the next update would say.

    Args:
        folder: of the profile.
        policy: as it is now.

    Returns:
        What `Sent.waits` has written; and for each field its name, its value, and what goes of it.

    Raises:
        GatewayError: no update has been made yet, or the file is damaged.
    """
    path = folder / NEXT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        header, residuals = dict(found["header"]), list(found["residuals"])
        rows = [(_BYTES, f"{found['bytes']:,} bytes", "all")]
        after = policy.allowed(header | {"residuals": residuals})
        for name, value in header.items():
            rows.append((name, str(value), "as it is" if after[name] == value else f"rounded to {after[name]}"))
        for residual in residuals:
            says = f"{residual['layer']} of {residual['origin']}, {residual['bytes']:,} bytes"
            rows.append(("residual", says, "as it is" if after["residuals"] else "removed"))
        return found, rows
    except FileNotFoundError as error:
        raise GatewayError(f"{folder}: no update has been made yet; begin the run first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GatewayError(f"{path}: is damaged; remove it: the next update writes it anew") from error


def _named(residual: Any) -> dict[str, Any]:
    said = residual if isinstance(residual, dict) else {}
    values = said.get("values")
    size = len(values) if isinstance(values, bytes) else 0
    return {"layer": str(said.get("layer"))[:200], "origin": str(said.get("origin"))[:200], "bytes": size}
