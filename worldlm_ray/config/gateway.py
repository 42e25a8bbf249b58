"""Settings of the border of a world that members in other clusters join."""

from __future__ import annotations

from dataclasses import dataclass, field

from worldlm_ray.config.federated import CodecName, PrivacyUnit


@dataclass(frozen=True, kw_only=True)
class LeastPrivacy:
    """Privacy that all clients of a member must have, at least."""

    unit: PrivacyUnit = "none"
    """`none` asks for nothing."""
    target_epsilon: float | None = None
    """The clients' `privacy.target_epsilon` may not be above this. Unless given, any."""


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The server for members: it runs where the world does, once `listen` is given."""

    listen: str | None = None
    """HOST:PORT at which members are listened to, such as 0.0.0.0:8443. Without it there is no server."""
    dir: str = "gateway"
    """Folder of the world's keys and members, made by `worldlm gateway init`."""
    staging_dir: str | None = None
    """Folder on a local disk, in which updates lie until they are whole. Unless given, one for temporary files."""
    staging_gb: float | None = None
    """Room in it, 10^9 bytes. Unless given: four updates."""
    codecs: list[CodecName] = field(default_factory=list)
    """Codecs of which each member may use one. Unless given: `exchange.codec` alone."""
    least_privacy: LeastPrivacy = field(default_factory=LeastPrivacy)
    """The charter says it, and a member's run compares its configuration: the world cannot see it."""
    rate_mbps: float = 0.0
    """10^6 bits a second that may cross the border, of all members and both ways together; 0 for no limit."""
    member_rate_mbps: float = 0.0
    """The same of one member; the charter says it."""
    member_gb_per_day: float = 0.0
    """10^9 bytes of leaves that one member may send and get in a day (UTC); 0 for no limit. The charter says it."""
    max_members: int = 100
    """Members that the registry takes, at most: one that would be too many is not enrolled."""
    linger_h: float = 1.0
    """Hours that a world at its end waits for members that are away, so that they hear of it. Ctrl-C ends that."""
