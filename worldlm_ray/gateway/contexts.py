"""TLS 1.3 on both sides of the border: what a server and a member show, and what they accept."""

from __future__ import annotations

import ssl

from worldlm_ray.errors import GatewayError
from worldlm_ray.gateway.certificates import pem
from worldlm_ray.gateway.identity import Identity
from worldlm_ray.gateway.invitation import Invitation
from worldlm_ray.gateway.profile import Profile


def server_context(identity: Identity) -> ssl.SSLContext:
    """What the gateway's server shows and accepts.

    A client's certificate is optional, so that enrolment works on the same port; one that is shown must be of this
    world. `Authority.authorise` judges it at every request.

    Args:
        identity: the world's; its server's certificate is renewed if that is due. To renew it later, call
            `identity.renew_server()` and `reload(context, identity)`.

    Raises:
        GatewayError: the folder is damaged, or the issuing key is to be rotated.
    """
    identity.renew_server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    context.num_tickets = 0  # a resumed connection would show no certificate
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=pem(identity.root).decode())
    reload(context, identity)
    return context


def reload(context: ssl.SSLContext, identity: Identity) -> None:
    """Have new connections of a server show the certificate that the folder holds now.

    Raises:
        GatewayError: it cannot be loaded.
    """
    try:
        context.load_cert_chain(identity.server_file)
    except (OSError, ssl.SSLError) as error:
        raise GatewayError(f"{identity.server_file}: {error}; remove it, and it is made anew") from error


def client_context(profile: Profile) -> ssl.SSLContext:
    """What a member shows, and the one root that it accepts.

    After the handshake, `profile.check_server(certificate)` refuses a server of an older issuing key. A member that has
    renewed its certificate needs a new context.

    Raises:
        GatewayError: the profile is damaged.
    """
    context = _pinned(profile.root_pem)
    try:
        context.load_cert_chain(profile.identity_file)
    except (OSError, ssl.SSLError) as error:
        raise GatewayError(f"{profile.identity_file}: {error}; ask the world for a new invitation") from error
    return context


def unpinned_context() -> ssl.SSLContext:
    """For one question of a member that is about to join: the server's root, which is public.

    TLS checks nothing here. `joining_context` checks the answer against the invitation, and nothing else may be asked
    over this connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def joining_context(invitation: Invitation, root_pem: bytes) -> ssl.SSLContext:
    """For enrolment: no certificate yet, and the root that the invitation pins.

    Args:
        invitation: pins the root by its digest.
        root_pem: what the server has answered over `unpinned_context`.

    Raises:
        Refused: bad_certificate or wrong_world: it is another root.
    """
    return _pinned(invitation.check_root(root_pem))


def _pinned(root: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # it checks host names, and asks for a certificate
    _harden(context)
    context.load_verify_locations(cadata=root)
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
