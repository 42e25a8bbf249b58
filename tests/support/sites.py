"""Organisations on hosts with a network each: a world at the first host, and members that reach it over slow lines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from support.gateway import make_member, make_world
from support.hosts import Hosts, children
from support.two_clusters import Member

PORT = 8_443
FIREWALL = """
table ip border {
    counter border {}
    counter elsewhere {}
    chain out {
        type filter hook output priority 0; policy drop
        oifname "lo" accept
        ip daddr WORLD tcp dport PORT counter name border accept
        counter name elsewhere
    }
    chain in {
        type filter hook input priority 0; policy drop
        iifname "lo" accept
        ip saddr WORLD tcp sport PORT counter name border accept
        counter name elsewhere
    }
}
"""
"""A member may dial the world's gateway and nothing else; nothing may dial a member."""


@dataclass
class Site(Member):
    """The run of one organisation on its host."""

    def stop(self) -> dict[str, Any]:
        """What Ctrl-C does; returns the summary of the run."""
        assert self.process is not None
        for child in children(self.process.pid):  # nsenter waits for the command, and hands no signal on
            os.kill(child, signal.SIGINT)
        self.process.wait(60.0)
        return dict(json.loads((self.run_dir / "summary.json").read_text()))

    def kill(self) -> None:
        """End the command at once, if it is there still: its host ends with the rest of it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def until(self, holds: Callable[[], bool], *, at_most_s: float) -> float:
        """Wait until something holds; returns seconds."""
        began = time.monotonic()
        while not holds():
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            assert time.monotonic() - began < at_most_s, f"it does not come: {self.log()[-2_000:]}"
            time.sleep(0.1)
        return time.monotonic() - began


class Consortium:
    """A world and its members, each on a host.

    Args:
        hosts: the first is the world's.
        settings: that all have alike.
    """

    def __init__(self, hosts: Hosts, settings: dict[str, Any]) -> None:
        self.hosts, self.address = hosts, hosts.address(1)
        self._settings = {"merge": {"client": 1.0}, "data": {"cache_dir": "/tmp/cache"}} | settings
        self._keys = make_world(hosts.shared / "gateway", port=PORT, hosts=[self.address])
        self.sites: list[Site] = []

    def world(self, children: list[dict[str, Any]]) -> Site:
        """The world's run."""
        gateway = {"listen": f"0.0.0.0:{PORT}", "dir": str(self.hosts.shared / "gateway"), "staging_dir": "/tmp"}
        return self._site(1, "world", {"gateway": gateway, "world": {"children": children}})

    def member(self, host: int, name: str, tree: dict[str, Any]) -> Site:
        """A member's run, behind a firewall."""
        profile = self.hosts.shared / "profiles" / name
        make_member(self._keys, profile, f"world/{name}")
        rules = FIREWALL.replace("WORLD", self.address).replace("PORT", str(PORT))
        self.firewall(host, "-f", "-", rules=rules)
        return self._site(host, name, {"joins": str(profile), "world": tree})

    def firewall(self, host: int, *arguments: str, rules: str = "") -> str:
        """What `nft` prints about a host's network."""
        command = ["ip", "netns", "exec", f"wlm{host}", "nft", *arguments]
        done = subprocess.run(command, input=rules, capture_output=True, text=True, timeout=60.0, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def packets(self, host: int) -> dict[str, int]:
        """How many packets a member's firewall has counted: to and from the gateway, and all others."""
        listed = json.loads(self.firewall(host, "-j", "list", "counters"))["nftables"]
        return {each["counter"]["name"]: each["counter"]["packets"] for each in listed if "counter" in each}

    def _site(self, host: int, name: str, raw: dict[str, Any]) -> Site:
        file = self.hosts.shared / f"{name}.yaml"
        file.write_text(yaml.safe_dump(self._settings | {"name": name} | raw))
        site = Site(file, self.hosts.shared / name, inside=(*self.hosts.inside(host), "env", "RAY_AUTH_MODE=token"))
        self.sites.append(site)
        return site


# ---- what has crossed a line -------------------------------------------------------------------------------------

PICKLE = re.compile(rb"\x80[\x02-\x05](\x95.{4}\x00{3}|[c}\]\(]q\x00)", re.DOTALL)
"""How pickles begin: a protocol, and then a frame of less than 2^40 bytes, or a first memo."""


def payloads(frames: list[bytes], *, port: int) -> dict[tuple[bytes, bytes], bytes]:
    """Bytes that TCP has carried to or from a port, by both ends: repeated where they were sent again.

    Args:
        frames: Ethernet frames, as captured.
        port: of one end.
    """
    found: dict[tuple[bytes, bytes], list[bytes]] = {}
    for frame in frames:
        if frame[12:14] != b"\x08\x00" or frame[23] != 6:  # no IPv4, or no TCP
            continue
        packet = frame[14 : 14 + int.from_bytes(frame[16:18], "big")]
        segment = packet[4 * (packet[0] & 15) :]
        ends = (packet[12:16] + segment[:2], packet[16:20] + segment[2:4])
        if port in (int.from_bytes(end[4:], "big") for end in ends):
            found.setdefault(ends, []).append(segment[4 * (segment[12] >> 4) :])
    return {ends: b"".join(parts) for ends, parts in found.items()}


def is_clear(crossed: bytes, secrets: dict[str, bytes]) -> list[str]:
    """What can be read in bytes that have crossed: names of `secrets`, and pickles."""
    found = [name for name, secret in secrets.items() if secret in crossed]
    return found + (["a pickle"] if PICKLE.search(crossed) else [])
