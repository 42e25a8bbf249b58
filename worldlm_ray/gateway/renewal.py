"""Certificates that are renewed while a run goes on: a member's over its present one, the server's by the issuing key.

Both sides look once an hour, from their start on. Nothing is cut: requests under way end on the connections that
they have, and new ones show the new certificate. Pushes come with the certificates of their signer, so that one which
was signed a moment before counts.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

from worldlm_ray.errors import MessageError, WorldLMError
from worldlm_ray.gateway import certificates, contexts, joining
from worldlm_ray.gateway.certificates import DAY_S
from worldlm_ray.gateway.identity import Identity
from worldlm_ray.gateway.link import Link
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.seals import MemberKey, ServerKey

EVERY_S = 3_600.0
"""Between two looks."""
WARNED_DAYS = 7
"""Days before its end from which on a certificate that could not be renewed is worth a warning."""
ROTATED_DAYS = 30
"""The same of the issuing key, which the world's operator rotates."""


async def hourly(
    look: Callable[[], Awaitable[None]], *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Look now, and once an hour, without end.

    Args:
        look: at a certificate; it raises nothing of ours.
        sleep: waits some seconds.
    """
    while True:
        await look()
        await sleep(EVERY_S)


class MemberRenewal:
    """The certificate of a member whose run goes on.

    Args:
        profile: the member's.
        link: to its parent.
        seal: signs its pushes.
        warn: hears what its operator should know.
    """

    def __init__(self, profile: Profile, link: Link, seal: MemberKey, warn: Callable[[str], None]) -> None:
        self._profile, self._link, self._seal, self._warn = profile, link, seal, warn
        self._shown = profile.identity()[1]
        """The certificate that new connections show."""

    async def ready(self) -> None:
        """Take up a certificate that `worldlm gateway join` has put there meanwhile, and refuse to go on with one that
        is over: TLS would say so in words that help no operator.

        Raises:
            MessageError: expired.
            GatewayError: the profile is damaged.
        """
        if self._profile.identity()[1] != self._shown:
            await self._show()
        over = -self._profile.days_left()
        if over >= 0.0:
            cure = f"ask the world's operator for a new invitation, and run `{self._join}` with it: the run takes it up"
            text = f"the certificate of {self._profile.path} is over for {over:.1f} days"
            raise MessageError("expired", f"{text}; {cure}")

    async def look(self) -> None:
        """Renew the certificate if that is due; `ready` before."""
        try:
            await self.ready()
            if await joining.renew_if_due(self._profile, self._link):
                await self._show()
        except (WorldLMError, OSError) as error:
            if isinstance(error, MessageError) and error.reason == "expired":
                self._warn(error.detail)
            elif self._profile.days_left() < WARNED_DAYS:
                days = self._profile.days_left()
                self._warn(f"{self._profile.path}: its certificate ends in {days:.0f} days, not renewed yet: {error}")

    async def _show(self) -> None:
        self._seal.reload()
        await self._link.use(contexts.client_context(self._profile))
        self._shown = self._profile.identity()[1]

    @property
    def _join(self) -> str:
        return f"worldlm gateway join LINE --dir {self._profile.folder}"


class ServerRenewal:
    """The certificate of a gateway's server.

    Args:
        identity: the world's.
        context: of its server.
        seal: signs its verdicts.
        warn: hears what the world's operator should know.
    """

    def __init__(
        self, identity: Identity, context: ssl.SSLContext, seal: ServerKey, warn: Callable[[str], None]
    ) -> None:
        self._identity, self._context, self._seal, self._warn = identity, context, seal, warn
        self._shown = identity.server()[1]

    async def look(self) -> None:
        """Renew the certificate if that is due, or show the one that `worldlm gateway rotate` has made meanwhile."""
        try:
            self._identity.renew_server()
            _, found = self._identity.server()
            if found != self._shown:
                contexts.reload(self._context, self._identity)
                self._seal.reload()
                self._shown = found
            days = self._identity.issuing_days()
            if days < ROTATED_DAYS:
                self._warn(f"the issuing key is over in {max(days, 0.0):.0f} days; run `worldlm gateway rotate`")
        except (WorldLMError, OSError) as error:
            days = (certificates.end_of(self._shown) - self._identity.clock()) / DAY_S
            self._warn(f"the gateway's certificate ends in {days:.0f} days, not renewed yet: {error}")
