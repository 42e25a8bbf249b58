"""How a member gets its certificates: the first by the line of an invitation, the next ones over its connection."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from worldlm_ray.errors import GatewayError, MessageError, Refused
from worldlm_ray.gateway import certificates, contexts, link, profile, wire
from worldlm_ray.gateway import charter as charters
from worldlm_ray.gateway import policy as policies
from worldlm_ray.gateway.guard import judged
from worldlm_ray.gateway.http import checking
from worldlm_ray.gateway.invitation import ASKS_CHARTER, read_invitation
from worldlm_ray.gateway.keys import Clock
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.standing import Standing, State

ASK_AGAIN_S = 5.0
"""Seconds between two questions whether the world's operator has approved the key."""


async def join(
    folder: Path,
    line: str,
    *,
    on_waiting: Callable[[str], None],
    policy: Path | None = None,
    clock: Clock = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Profile:
    """Enrol by an invitation. Interrupted, it goes on from where it was: with the same key, and the same answer.

    The server shows its root first, over a connection that nothing is sent on. Only a root that is the invitation's is
    believed, and all else goes over connections that end there. Then it shows its charter: one that the policy refuses
    ends it, before the invitation is used and before anything is written.

    Args:
        folder: of the profile.
        line: the invitation.
        on_waiting: hears once that the key waits for its approval.
        policy: file of what this member refuses, of which the profile gets a copy; unless given, the profile's stays.
        clock: Unix seconds.
        sleep: waits some seconds before the next question.

    Raises:
        GatewayError: the line is damaged, the folder is another profile's, or the world cannot be reached.
        Refused: by the world, by the policy, or because it is another world.
    """
    invitation = read_invitation(line)
    known = Profile(folder, clock=clock) if (folder / profile.FACTS).exists() else None
    if known is not None and known.has_joined and known.invitation == invitation.id:
        return known  # it was interrupted after its end
    chosen = policies.of_profile(folder) if policy is None else policies.load(policy)
    try:
        root = await link.root_of(invitation.url, contexts.unpinned_context())
        asked = wire.Invited(invitation=invitation.id, proof=invitation.proof(ASKS_CHARTER))
        shown = await link.charter(invitation.url, contexts.joining_context(invitation, root), asked)
        [pinned, *_] = certificates.read_pem(root, invitation.url)
        charter = charters.checked(shown, pinned, where=invitation.url)
        chosen.judge(charter.charter)
        member = profile.begin(folder, invitation, root, clock=clock)
        judged(member, shown, chosen)
        if policy is not None:
            policies.install(policy, folder)
        context = checking(contexts.joining_context(invitation, root), member.check_server)
        request = member.request()
        message = wire.Enrol(request=request, invitation=invitation.id, proof=invitation.proof(request))
        has_said = False
        while (answer := await _asked(invitation.url, context, message, None if has_said else on_waiting)) is None:
            has_said = True
            await sleep(ASK_AGAIN_S)
    except MessageError as error:
        if error.reason != "unreachable":
            raise Refused(error.reason, error.detail) from error
        cure = "check that the gateway runs, that its port is open to you, and HTTPS_PROXY"
        raise GatewayError(f"{invitation.url}: {error.detail}; {cure}") from error
    member.install(answer.chain)
    standing = Standing(folder)
    standing.accept(charter)
    standing.become(State.ACTIVE)
    return member


async def renew_if_due(member: Profile, to: link.Link) -> bool:
    """Get the next certificate, with a new key, from two thirds of the present one's life on.

    Args:
        member: the profile.
        to: its link.

    Returns:
        Whether there is a new one: what shows the old one, or signs by its key, must read the profile again.

    Raises:
        MessageError: unreachable, or as the world refuses: try again later, the request is kept.
        GatewayError: the profile is damaged, or the answer is not for it.
    """
    if not member.wants_renewal():
        return False
    answer = await to.renew(member.request())
    member.install(answer.chain)
    return True


async def _asked(
    url: str, context: ssl.SSLContext, message: wire.Enrol, on_waiting: Callable[[str], None] | None
) -> wire.Enrolled | None:
    """The answer to an enrolment; None while the key waits for its approval."""
    try:
        return await link.enrol(url, context, message)
    except MessageError as error:
        if error.reason != "waiting":
            raise
        if on_waiting is not None:
            on_waiting(error.detail)
        return None
