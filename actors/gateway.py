"""A border's end in the world's cluster: the server before a node, for the members below it.

    member's cluster                          world's cluster
    FederationActor -> ParentProxy  ==TLS==>  GatewayActor -> WorldActor

A gateway has a separate process: what strangers send never comes into the process of the node. It knows nothing that a
restart could lose, but for updates that are on their way, which lie in its staging folder. The other end is
actors/parent_proxy.py.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from actors.gateway_node import NodeBehind
from actors.graceful_shutdown import GracefulShutdown
from actors.shared import Address, once_storage_answers, was_restarted
from worldlm_ray.config.gateway import GatewayConfig
from worldlm_ray.errors import ConfigError, GatewayError, Refused
from worldlm_ray.gateway import renewal, report, terms
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.charter import impose
from worldlm_ray.gateway.contexts import server_context
from worldlm_ray.gateway.link import hello_of
from worldlm_ray.gateway.receipts import FOLDER, RECEIVED, Receipts, run_id
from worldlm_ray.gateway.registry import State
from worldlm_ray.gateway.renewal import ServerRenewal
from worldlm_ray.gateway.seals import ServerKey
from worldlm_ray.gateway.server import Gateway, Settings
from worldlm_ray.gateway.traffic import Traffic, TrafficLimits
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.storage.filesystem import expanded

STAGED_UPDATES = 4
"""Room in the staging folder, unless the configuration says how much."""
GOODBYE_S = 1.0
"""The last answers are on their way for so long before the server ends."""


class _Children:
    """Members of a world that are children of one node: another node's gateway lets in the others.

    Args:
        authority: of the world.
        node: path of the node.
    """

    def __init__(self, authority: Authority, node: str) -> None:
        self._authority, self._node = authority, node
        self.enrol, self.renew, self.resign = authority.enrol, authority.renew, authority.resign
        self.check_invited = authority.check_invited

    def authorise(self, certificate: bytes) -> str:
        """See server.Authority."""
        path = self._authority.authorise(certificate)
        if parent_path(path) != self._node:
            raise Refused("wrong_path", f"{path} is no child of {self._node}, which this gateway speaks for")
        return path


class GatewayActor(GracefulShutdown):
    """The server for the members of one node.

    Args:
        address: the run, and the path of the node.
    """

    def __init__(self, address: Address) -> None:
        self._plan, self._address = address.logged_plan("gateway"), address
        gateway = self._plan.config.gateway
        self._authority = once_storage_answers(
            partial(Authority, expanded(gateway.dir), most_members=gateway.max_members), "the gateway"
        )
        self._seal, self._receipts = ServerKey(self._authority.identity), self._plan.run_dir / FOLDER
        self._run = once_storage_answers(partial(run_id, self._receipts), "the gateway")
        self._gateway: Gateway | None = None
        self._port, self._starts = 0, asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        self.loop = asyncio.get_running_loop()
        if was_restarted():
            self._restart = asyncio.create_task(self._start_again())

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            GatewayError: it cannot listen there.
        """
        async with self._starts:
            if self._gateway is None:
                await self._listen()
        return self._port

    async def _listen(self) -> None:
        plan, identity, node = self._plan, self._authority.identity, self._plan.node(self._address.path)
        sizes, config = terms.sizes_of(plan, node), plan.config.gateway
        alike = await asyncio.get_running_loop().run_in_executor(None, terms.alike, plan, node)
        staged = STAGED_UPDATES * plan.layout.nbytes if config.staging_gb is None else int(config.staging_gb * 1e9)
        settings = Settings(
            sizes=sizes,
            hello=hello_of(sizes),
            staging_dir=_staging(plan),
            staging_bytes=staged,
            world=identity.world,
            run=self._run,
            root_pem=identity.root_pem,
            charter=impose(identity, node.path, alike, terms.imposed(plan, node)).raw,
        )
        assert config.listen is not None, "a gateway is made for a run that has an address for it"
        host, _, port = config.listen.rpartition(":")
        self._context = server_context(identity)
        children = _Children(self._authority, node.path)
        self._parent = NodeBehind(self._address, self._authority.admissions)
        warn = self._address.warn
        kept: dict[str, Any] = {
            "seal": self._seal,
            "receipts": Receipts(self._receipts, RECEIVED, root=identity.root, warn=warn),
            "traffic": Traffic(_limits(config), folder=self._receipts, warn=warn),
        }
        gateway = Gateway(self._parent, children, settings, warn=warn, **kept)
        try:
            self._port = await gateway.start(self._context, host=host.strip("[]"), port=int(port))
        except OSError as error:
            got = f"cannot listen at {config.listen} ({error.strerror or error})"
            raise GatewayError(f"gateway.listen: {got}; give another address") from error
        certificate = ServerRenewal(identity, self._context, self._seal, partial(warn, node.path))
        self._gateway, self._renewal = gateway, asyncio.create_task(renewal.hourly(certificate.look))
        self._reports = asyncio.create_task(report.tell_often(self._report))

    async def process(self) -> int:
        """Id of this process."""
        return os.getpid()

    async def active(self) -> list[str]:
        """Paths of the members that may come now."""
        return [path for path, member in self._authority.registry.members().items() if member.state is State.ACTIVE]

    async def stop(self) -> None:
        """Give the last answers their time, and listen no more."""
        if self._gateway is not None:
            await asyncio.sleep(GOODBYE_S)
            self._reports.cancel()
            self._report()
            await self._gateway.stop()
            self._gateway = None

    def shut_down(self) -> None:
        """See GracefulShutdown: there is nothing to be saved."""

    def _report(self) -> None:
        """Have the run's files say how well the members' lines do."""
        assert self._gateway is not None
        freight, now_s = report.freight(self._plan), self._address.clock.now_s()
        records = [report.of_member(each, freight, now_s=now_s) for each in self._gateway.members.values()]
        self._address.recorder.record.remote(records)

    async def _start_again(self) -> None:
        """After a death: the port may be taken for a moment still."""
        while True:
            try:
                await self.start()
                return
            except (GatewayError, ConfigError) as error:
                print(f"worldlm: the gateway cannot go on yet: {error}", flush=True)
                await asyncio.sleep(1.0)


def _staging(plan: Plan) -> Path:
    """The folder for updates on their way; the same for each process of a run."""
    folder = plan.config.gateway.staging_dir
    return Path(folder or tempfile.gettempdir()) / f"worldlm-{os.getuid()}-staging-{plan.config.name}"


def _limits(config: GatewayConfig) -> TrafficLimits:
    return TrafficLimits(
        bytes_per_s=config.rate_mbps * 1e6 / 8.0,
        member_bytes_per_s=config.member_rate_mbps * 1e6 / 8.0,
        member_bytes_per_day=config.member_gb_per_day * 1e9,
    )
