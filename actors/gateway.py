"""Both ends of a border as actors: what stands for the parent at a member, and the server before the parent.

    member's cluster                          world's cluster
    FederationActor -> ParentProxy  ==TLS==>  GatewayActor -> WorldActor

A proxy has the parent's name and the parent's methods, so that a child does not know that its parent is elsewhere. A
gateway has a separate process: what strangers send never comes into the process of the node. Both know nothing that
a restart could lose, but for updates that are on their way, which lie in the gateway's staging folder.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from actors.graceful_shutdown import GracefulShutdown
from actors.shared import Address, Carried, once_storage_answers, was_restarted
from worldlm_ray.config.gateway import GatewayConfig
from worldlm_ray.errors import ConfigError, GatewayError, MessageError, Refused
from worldlm_ray.exchange.messages import Packed
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway import profile, renewal, report, terms
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.contexts import client_context, server_context
from worldlm_ray.gateway.link import Link, LinkSettings
from worldlm_ray.gateway.receipts import FOLDER, RECEIVED, SENT, Receipts, run_id
from worldlm_ray.gateway.registry import State
from worldlm_ray.gateway.renewal import MemberRenewal, ServerRenewal
from worldlm_ray.gateway.seals import MemberKey, ServerKey
from worldlm_ray.gateway.server import Gateway, Settings
from worldlm_ray.gateway.traffic import Traffic, TrafficLimits
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.records import LifeRecord
from worldlm_ray.storage.filesystem import expanded

STAGED_UPDATES = 4
"""Room in the staging folder, unless the configuration says how much."""
GOODBYE_S = 1.0
"""The last answers are on their way for so long before the server ends."""

T = TypeVar("T")


# ---- the member's side -------------------------------------------------------------------------------------------


class ParentProxy(GracefulShutdown):
    """The parent of a member, in the member's cluster.

    Args:
        address: the run, and the path of the member.
    """

    def __init__(self, address: Address) -> None:
        plan, path = address.plan, address.path
        above = plan.node(parent_path(path) or "")
        assert plan.config.joins is not None, "a proxy is made for a run that joins another world"
        self._profile = once_storage_answers(partial(profile.joined, expanded(plan.config.joins)), above.path)
        settings = LinkSettings(
            url=self._profile.url,
            path=path,
            sizes=terms.sizes_of(plan, above),
            hello=once_storage_answers(partial(terms.hello, plan, above), above.path),
            world=self._profile.world,
        )
        self._seal = MemberKey(self._profile)
        receipts = Receipts(plan.run_dir / FOLDER, SENT, root=self._profile.root, warn=partial(_warn, address))
        context, check = client_context(self._profile), self._profile.check_server
        warn = partial(_warn, address, path)
        self._link = Link(settings, context, seal=self._seal, receipts=receipts, say=warn, check_server=check)
        self._last: tuple[bytes, Any] = (b"", None)
        """Digest of the newest model, and its reference."""
        self._address, self._above, self._said = address, above.path, ""
        self._certificate = MemberRenewal(self._profile, self._link, self._seal, warn)
        self._renewal, self.loop = _spawn(renewal.hourly(self._certificate.look)), asyncio.get_running_loop()
        self._freight = report.freight(plan, is_member=True)
        self._reports = _spawn(report.tell_often(self._report))

    # ---- the parent's methods --------------------------------------------------------------------------------

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """See InnerActor."""
        try:
            await self._certificate.ready()
            welcome = await self._link.join(child, incarnation, seq)
        except MessageError as error:
            self._tell("lost", f"over the border: {error}")
            raise
        self._tell("training", f"over the border, at {self._profile.url}")
        return welcome

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, refs: list[Any]) -> Verdict:
        """See InnerActor."""
        return await self._link.push(sender, incarnation, to, header, await refs[0])

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Carried:
        """See InnerActor."""
        found = await self._link.pull(child, incarnation, to, started_tokens)
        digest = self._link.last_digest
        if digest != self._last[0]:
            ref = await asyncio.get_running_loop().run_in_executor(None, ray.put, found.values)
            self._last = (digest, ref)
            self._link.hold(digest, await ref)
        return found.header, [self._last[1]]

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """See InnerActor."""
        await self._link.done(child, incarnation, to)
        self._report()

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """See InnerActor."""
        return await self._link.left(child, incarnation, to)

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """See InnerActor."""
        await self._link.heartbeat(child, incarnation, to)

    async def published(self) -> tuple[int, list[Any]]:
        """See InnerActor; no model crosses the border to be measured, so that there is none."""
        return 0, []

    async def run_time_s(self) -> float | None:
        """The other cluster's clock is another one."""
        return None

    # ---- called by the launcher --------------------------------------------------------------------------------

    async def process(self) -> int:
        """Id of this process."""
        return os.getpid()

    async def greet(self) -> str:
        """Compare what both sides must have alike; returns why the parent cannot be reached, if so.

        Raises:
            MessageError: the parent refuses this member.
        """
        try:
            await self._certificate.ready()
            await self._link.greet()
        except MessageError as error:
            if error.reason != "unreachable":
                raise
            return error.detail
        return ""

    def shut_down(self) -> None:
        """See GracefulShutdown: there is nothing to be saved."""

    def _tell(self, event: str, detail: str) -> None:
        """Have the run's files say whether the parent can be reached, once it is otherwise than before."""
        if event != self._said:
            self._said = event
            record = LifeRecord(node=self._above, now_s=self._address.clock.now_s(), event=event, detail=detail)
            self._address.recorder.record.remote([record])

    def _report(self) -> None:
        """Have the run's files say how well the line does."""
        meter, now_s = self._link.transfer.meter, self._address.clock.now_s()
        record = report.of_parent(self._above, meter, self._profile, self._freight, now_s=now_s)
        self._address.recorder.record.remote([record])


# ---- the world's side --------------------------------------------------------------------------------------------


class _Parent:
    """The actor of a node, as the gateway's server calls it.

    Args:
        address: the run, and the path of the node.
        admissions: how often the member at a path was let in.
    """

    def __init__(self, address: Address, admissions: Callable[[str], int]) -> None:
        self._address, self._admissions = address, admissions
        self._handle: Any = None
        self._pulled: tuple[Any, Any] = (None, None)
        """The newest model's reference and buffer: all members get the same buffer of a version."""

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """See calls.Parent."""
        admission = self._admissions(f"{self._address.path}/{child}")
        welcome: Welcome = await self._call("join", child, incarnation, seq, admission)
        self._tell(child, "training", "has joined over the border")
        return welcome

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        """See calls.Parent."""
        ref = await asyncio.get_running_loop().run_in_executor(None, ray.put, values)
        verdict: Verdict = await self._call("push", sender, incarnation, to, header, [ref])
        return verdict

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Packed:
        """See calls.Parent."""
        header, [ref] = await self._call("pull", child, incarnation, to, started_tokens)
        if ref != self._pulled[0]:
            self._pulled = (ref, await self._answer(ref))
        return Packed(header, self._pulled[1])

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent."""
        await self._call("done", child, incarnation, to)
        self._tell(child, "finished", "")

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """See calls.Parent."""
        return bool(await self._call("left", child, incarnation, to))

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent."""
        await self._call("heartbeat", child, incarnation, to)

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._handle is None:
            try:
                self._handle = self._address.node(self._address.path)
            except ValueError as error:
                raise MessageError("unreachable", f"{self._address.path} is not there") from error
        return await self._answer(getattr(self._handle, method).remote(*arguments))

    async def _answer(self, ref: Any) -> Any:
        """The value behind a reference.

        Raises:
            MessageError: as the node refuses; unreachable: it has died.
        """
        try:
            return await ref
        except RayTaskError as error:
            if isinstance(error.cause, MessageError):
                raise error.cause from error
            raise
        except (RayActorError, GetTimeoutError, ObjectLostError) as error:
            self._handle = None
            raise MessageError("unreachable", f"{self._address.path} is away ({type(error).__name__})") from error

    def _tell(self, child: str, event: str, detail: str) -> None:
        now_s = self._address.clock.now_s()
        record = LifeRecord(node=f"{self._address.path}/{child}", now_s=now_s, event=event, detail=detail)
        self._address.recorder.record.remote([record])


class _Children:
    """Members of a world that are children of one node: another node's gateway lets in the others.

    Args:
        authority: of the world.
        node: path of the node.
    """

    def __init__(self, authority: Authority, node: str) -> None:
        self._authority, self._node = authority, node
        self.enrol, self.renew = authority.enrol, authority.renew

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
        self._plan, self._address = address.plan, address
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
            self._restart = _spawn(self._start_again())

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
        staged = STAGED_UPDATES * plan.layout.nbytes if config.staging_gb is None else int(config.staging_gb * 1e9)
        settings = Settings(
            sizes=sizes,
            hello=await asyncio.get_running_loop().run_in_executor(None, terms.hello, plan, node),
            staging_dir=_staging(plan),
            staging_bytes=staged,
            world=identity.world,
            run=self._run,
            root_pem=identity.root_pem,
        )
        assert config.listen is not None, "a gateway is made for a run that has an address for it"
        host, _, port = config.listen.rpartition(":")
        self._context = server_context(identity)
        children = _Children(self._authority, node.path)
        self._parent = _Parent(self._address, self._authority.admissions)
        warn = partial(_warn, self._address)
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
        self._gateway, self._renewal = gateway, _spawn(renewal.hourly(certificate.look))
        self._reports = _spawn(report.tell_often(self._report))

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


def _warn(address: Address, path: str, text: str) -> None:
    """Have the run's files and its operator's terminal say what a member meets at the border."""
    record = LifeRecord(node=path, now_s=address.clock.now_s(), event="warning", detail=text)
    address.recorder.record.remote([record])


def _spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.get_running_loop().create_task(work)
