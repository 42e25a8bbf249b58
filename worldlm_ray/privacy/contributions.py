"""Ledgers of an aggregator that promises client-level privacy: one per client, a line per update that was accepted."""

from __future__ import annotations

from pathlib import Path

from worldlm_ray.config.schema import PrivacyConfig
from worldlm_ray.errors import PrivacyError
from worldlm_ray.privacy.accounting import Spend
from worldlm_ray.privacy.gaussian import composed_epsilon, gaussian_noise, most_contributions
from worldlm_ray.privacy.ledger import Ledger


class Contributions:
    """What the clients directly below one node may contribute, and have contributed.

    Every update that is accepted costs its client one contribution, at any weight. Participation is not a secret
    here, so that nothing is won from chance: the rate is 1.

    Args:
        privacy: the rules in force at the node.
        folder: where ledgers lie.
        node: path of the node.
        clients: names of the clients directly below it.
        rounds: updates that each means to push; they share the budget where the noise is not given.
        run: name of the run.
        key: dotted key of the node, for messages.

    Raises:
        PrivacyError: no noise keeps the rounds within the budget, or a ledger is damaged.
    """

    def __init__(
        self,
        privacy: PrivacyConfig,
        folder: Path,
        *,
        node: str,
        clients: tuple[str, ...],
        rounds: int | None,
        run: str,
        key: str,
    ) -> None:
        self.privacy, self.run = privacy, run
        self.paths = {name: f"{node}/{name}" for name in clients}
        self.ledgers = {
            name: Ledger(folder, unit="client", text=path.replace("/", ".")) for name, path in self.paths.items()
        }
        self.noise = self._noise(rounds, key)

    def _noise(self, rounds: int | None, key: str) -> float:
        if self.privacy.noise_multiplier is not None:
            return self.privacy.noise_multiplier
        for ledger in self.ledgers.values():
            for entry in ledger.entries():
                if entry["run"] == self.run:
                    return float(entry["noise"])  # chosen when the run began: a restart keeps to it
        updates = min(n for n in (rounds, self.privacy.max_updates) if n is not None)
        assert self.privacy.target_epsilon is not None
        return gaussian_noise(
            updates, target_epsilon=self.privacy.target_epsilon, delta=self.privacy.delta, key=f"{key}.privacy"
        )

    def counts(self) -> dict[str, int]:
        """Contributions so far, by client."""
        return {name: len(ledger.entries()) for name, ledger in self.ledgers.items()}

    def noises(self) -> dict[str, list[float]]:
        """The noise of every contribution so far, by client."""
        return {name: [float(entry["noise"]) for entry in book.entries()] for name, book in self.ledgers.items()}

    def limits(self) -> dict[str, int]:
        """Updates that are accepted of each client at most, those before this run included; empty without a limit."""
        target, most, found = self.privacy.target_epsilon, self.privacy.max_updates, {}
        for name, noises in self.noises().items():
            limits = [] if most is None else [most]
            if target is not None:
                left = most_contributions(self.noise, target_epsilon=target, delta=self.privacy.delta, before=noises)
                limits.append(len(noises) + left)
            if limits:
                found[name] = min(limits)
        return found

    def charge(self, client: str) -> None:
        """Write a contribution down. When this returns it is on disk.

        Raises:
            PrivacyError: the ledger is damaged or cannot be written, or the budget does not hold it.
        """
        entry = {
            "node": self.paths[client],
            "run": self.run,
            "unit": "client",
            "noise": self.noise,
            "rate": 1.0,
            "steps": 1,
            "delta": self.privacy.delta,
            "accountant": "gaussian",
            "target_epsilon": self.privacy.target_epsilon,
        }
        if not self.ledgers[client].charge(entry, allowed=self._allowed):
            raise PrivacyError(f"{self.paths[client]}: its ledger holds no further contribution; nothing is published")

    def _allowed(self, history: list[Spend]) -> bool:
        target, most = self.privacy.target_epsilon, self.privacy.max_updates
        if most is not None and len(history) > most:
            return False
        noises = [spend.noise for spend in history]
        return target is None or composed_epsilon(noises, delta=self.privacy.delta) <= target
