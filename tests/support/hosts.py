"""Several hosts on one machine: namespaces with a network, processes, mounts and a name each, and an sshd if wanted.

For `ray up` on real hosts, and for organisations with a network each. A host sees this machine's file system, but has
its own /tmp, /run, /dev/shm and home; what lies below `shared` is the same everywhere, as on NFS. Needs root and the
packages iproute2, openssh-server, rsync; without an sshd the first is enough.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from support.slow_links import Quality, SlowLink

NET, BRIDGE = "10.213.46", "wlmbr0"
TOOLS = ("ip", "unshare", "nsenter")
SSH_TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync")
BOOT_S = 15.0
PRIVATE = ("/tmp", "/run", "/dev/shm", str(Path.home()))

BOOT = r"""
set -e
mount --make-rprivate /
hostname "$HOST"
mkdir -p /mnt/kept-$HOST && mount -t tmpfs none /mnt/kept-$HOST
number=0
for path in $KEEP; do
  mkdir -p /mnt/kept-$HOST/$number
  mount --rbind "$path" /mnt/kept-$HOST/$number
  number=$((number + 1))
done
for path in $PRIVATE; do mount -t tmpfs -o mode=1777 none "$path"; done
chmod 700 "$HOME"
number=0
for path in $KEEP; do
  mkdir -p "$path"
  mount --rbind /mnt/kept-$HOST/$number "$path"
  number=$((number + 1))
done
mount -t proc proc /proc
# No server answers questions about names here, and waiting for an answer takes seconds each time.
: > /run/resolv.conf
mount --bind /run/resolv.conf /etc/resolv.conf
{ echo 127.0.0.1 localhost; for n in 1 2 3 4 5; do echo "$NET.1$n wlm$n"; done; } > /run/hosts
mount --bind /run/hosts /etc/hosts
echo "export PATH=$BIN:\$PATH" > "$HOME/.bashrc"
cp "$HOME/.bashrc" "$HOME/.profile"
if [ -z "$SSHD" ]; then
  touch "$STATE/$HOST.up"
  sleep infinity &
  while kill -0 $! 2> /dev/null; do wait -n || sleep 0.2; done
fi
mkdir -p /run/sshd "$HOME/.ssh"
cp "$STATE/key.pub" "$HOME/.ssh/authorized_keys"
cp "$STATE/hostkey" /run/hostkey
chmod 700 "$HOME/.ssh"
chmod 600 /run/hostkey
$SSHD -D -e -f /dev/null -h /run/hostkey -o UsePAM=no -o StrictModes=no -o PasswordAuthentication=no \
  -o PidFile=none -o MaxStartups=100 -o Subsystem='sftp internal-sftp' &
# The shell stays: it is process 1 here, and gathers what Ray's daemons leave behind.
while kill -0 $! 2> /dev/null; do wait -n || sleep 0.2; done
"""


class Hosts:
    """Hosts by number, from 1; the first is `NET`.11.

    Args:
        folder: for keys and logs; seen by all.
        shared: the same on every host.
        number: of hosts.
        with_ssh: whether an sshd listens on each of them, for `run`.
        far: how good the line of a host is, where it is no plain cable.
    """

    def __init__(
        self,
        folder: Path,
        shared: Path,
        number: int,
        *,
        with_ssh: bool = True,
        far: Mapping[int, Quality] | None = None,
    ) -> None:
        self.folder, self.shared, self.number, self._with_ssh = folder, shared, number, with_ssh
        self.links: dict[int, SlowLink] = {}
        """Lines of the hosts that are far away."""
        self._far = dict(far or {})
        self.key = folder / "key"
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def address(self, host: int) -> str:
        return f"{NET}.{10 + host}"

    def run(self, host: int, command: str, *, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, over SSH."""
        options = ["-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i", str(self.key)]
        there = ["ssh", *options, f"root@{self.address(host)}", f"bash -lc {shlex.quote(command)}"]
        return subprocess.run(there, capture_output=True, text=True, timeout=timeout_s, check=False)

    def inside(self, host: int) -> list[str]:
        """What stands before a command that is to run on a host, without SSH."""
        [first] = children(self._processes[host].pid)
        return ["nsenter", f"--target={first}", "--mount", "--pid", "--uts", "--net", "--"]

    def unplug(self, host: int) -> None:
        """Cut a host off."""
        _ip("link", "set", f"wlmv{host}", "down")

    def plug(self, host: int) -> None:
        _ip("link", "set", f"wlmv{host}", "up")

    def crash(self, host: int) -> None:
        """Switch a host off and on again: all of its processes are gone, and what it had in /tmp and at home."""
        os.killpg(self._processes[host].pid, signal.SIGKILL)
        self._processes.pop(host).wait()
        self._boot(host)

    def start(self) -> None:
        for name in ("key", "hostkey") if self._with_ssh else ():
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for host in range(1, self.number + 1):
            self._connect(host)
            self._boot(host)

    def stop(self) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for link in self.links.values():
            link.stop()
        for host in range(1, self.number + 1):
            subprocess.run(["ip", "link", "del", f"wlmv{host}"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", f"wlm{host}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)

    def _connect(self, host: int) -> None:
        name, link = f"wlm{host}", f"wlmv{host}"
        _ip("netns", "add", name)
        if host in self._far:
            self.links[host] = SlowLink(link, f"wlmt{host}", self._far[host], seed=host)
            _ip("link", "set", f"wlmt{host}", "netns", name, "name", "eth0")
        else:
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", BRIDGE, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        # Ray finds its own address by asking for a route; clouds' metadata must fail at once instead of in seconds.
        _ip("-n", name, "route", "add", "default", "via", f"{NET}.1")
        _ip("-n", name, "route", "add", "unreachable", "169.254.0.0/16")

    def _boot(self, host: int) -> None:
        name = f"wlm{host}"
        keep = [str(path) for path in (self.folder, self.shared, *_needed())]
        environment = os.environ | {
            "HOST": name,
            "NET": NET,
            "KEEP": " ".join(keep),
            "PRIVATE": " ".join(PRIVATE),
            "STATE": str(self.folder),
            "BIN": str(Path(sys.executable).parent),
            "SSHD": str(shutil.which("sshd", path=_PATH)) if self._with_ssh else "",
        }
        (self.folder / f"{name}.up").unlink(missing_ok=True)
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "bash", "-c", BOOT]
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[host] = subprocess.Popen(
                ["ip", "netns", "exec", name, *unshare], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + BOOT_S
        while time.monotonic() < until:
            if self._is_up(host):
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name} did not boot: {(self.folder / f'{name}.log').read_text()}")

    def _is_up(self, host: int) -> bool:
        if not self._with_ssh:
            return (self.folder / f"wlm{host}.up").exists()
        with suppress(OSError), socket.create_connection((self.address(host), 22), timeout=1.0):
            return True
        return False


@contextmanager
def hosts(folder: Path, shared: Path, number: int, **options: Any) -> Iterator[Hosts]:
    """Start hosts, and stop them again."""
    made = Hosts(folder, shared, number, **options)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def why_not(*, tools: Sequence[str] = SSH_TOOLS) -> str:
    """Why this machine cannot have hosts; empty if it can.

    Args:
        tools: that a test needs beside those that make hosts.
    """
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    missing = [tool for tool in (*TOOLS, *tools) if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"hosts in namespaces need {', '.join(missing)} (packages iproute2, openssh-server, rsync, nftables)"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--uts", "--net", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _needed() -> list[Path]:
    """Where Python, its packages and this repository lie, as far as hosts would not see it."""
    places = {Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[2]}
    hidden = [place for place in places if any(place.is_relative_to(private) for private in PRIVATE)]
    return [place for place in hidden if not any(place != other and place.is_relative_to(other) for other in hidden)]


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
