"""One client's noise, rate and budget: what a local round costs, and whether it may begin."""

from __future__ import annotations

from pathlib import Path

from worldlm_ray.config.schema import PrivacyConfig
from worldlm_ray.errors import PrivacyError
from worldlm_ray.privacy.accounting import Spend, epsilon, noise_for, rounds_left
from worldlm_ray.privacy.ledger import Ledger
from worldlm_ray.storage.filesystem import expanded

LEDGERS = "ledgers"
"""Folder of a run's ledgers."""


class Account:
    """What a client may spend on its text, and what it has spent.

    Args:
        privacy: the rules in force at the client.
        ledger: of its text.
        rate: probability with which a step takes any one record.
        steps: optimizer steps of a local round.
        rounds: local rounds that the run means to make; they share the budget where the noise is not given.
        node: path of the client, for the ledger.
        run: name of the run, for the ledger.
        key: dotted key of the privacy section, for messages.

    Raises:
        PrivacyError: no noise keeps the rounds within the budget, or the ledger is damaged.
    """

    def __init__(
        self,
        privacy: PrivacyConfig,
        ledger: Ledger,
        *,
        rate: float,
        steps: int,
        rounds: int | None,
        node: str,
        run: str,
        key: str,
    ) -> None:
        self.privacy, self.ledger, self.rate, self.steps = privacy, ledger, rate, steps
        self.node, self.run, self.key = node, run, key
        self.noise = self._noise(rounds)

    def _noise(self, rounds: int | None) -> float:
        if self.privacy.noise_multiplier is not None:
            return self.privacy.noise_multiplier
        entries = self.ledger.entries()
        for entry in entries:
            if entry["node"] == self.node and entry["run"] == self.run and entry["rate"] == self.rate:
                return float(entry["noise"])  # chosen when the run began: a restart keeps to it
        assert self.privacy.target_epsilon is not None
        if rounds is None:
            raise PrivacyError(
                f"{self.key}.noise_multiplier: a budget of seconds does not say how many steps there are"
            )
        spent = [Spend(entry["noise"], entry["rate"], entry["steps"]) for entry in entries]
        return noise_for(
            self.privacy.target_epsilon,
            spent=spent,
            rate=self.rate,
            steps=rounds * self.steps,
            delta=self.privacy.delta,
            accountant=self.privacy.accountant,
            key=self.key,
        )

    @property
    def round(self) -> Spend:
        """What one local round costs."""
        return Spend(self.noise, self.rate, self.steps)

    def epsilon(self, *, rounds: int = 0) -> float:
        """Spent by everybody on this text, with so many more rounds of this client."""
        return self._epsilon([*self.ledger.history(), *[self.round] * rounds])

    def left(self) -> int | None:
        """Whole rounds that the budget still holds; None without a budget."""
        target = self.privacy.target_epsilon
        if target is None:
            return None
        return rounds_left(
            self.ledger.history(),
            noise=self.noise,
            rate=self.rate,
            per_round=self.steps,
            target_epsilon=target,
            delta=self.privacy.delta,
            accountant=self.privacy.accountant,
        )

    @property
    def is_exhausted(self) -> bool:
        """Whether the next round would break the budget."""
        return not self._allowed([*self.ledger.history(), self.round])

    def charge(self, round_: int, *, steps: int | None = None) -> bool:
        """Pay for a round before it begins; False if the budget does not hold it.

        Args:
            round_: number of the round, from 1.
            steps: of a round that goes on, those that are left.

        Raises:
            PrivacyError: the ledger is damaged or cannot be written.
        """
        noise, rate, whole = self.round
        entry = {
            "node": self.node,
            "run": self.run,
            "round": round_,
            "unit": self.privacy.unit,
            "noise": noise,
            "rate": rate,
            "steps": whole if steps is None else steps,
            "delta": self.privacy.delta,
            "accountant": self.privacy.accountant,
            "target_epsilon": self.privacy.target_epsilon,
        }
        return self.ledger.charge(entry, allowed=self._allowed)

    def _allowed(self, history: list[Spend]) -> bool:
        target = self.privacy.target_epsilon
        return target is None or self._epsilon(history) <= target

    def _epsilon(self, history: list[Spend]) -> float:
        return epsilon(history, delta=self.privacy.delta, accountant=self.privacy.accountant)


def weak_delta(privacy: PrivacyConfig, protected: int | None, *, named: bool = True) -> str:
    """What to say of a delta that promises next to nothing; empty of any other.

    A mechanism that publishes one of n records whole, drawn at random, has delta 1 / n and epsilon 0 (Dwork and Roth,
    The Algorithmic Foundations of Differential Privacy, section 2.3).

    Args:
        privacy: the rules in force.
        protected: records, or clients, that it protects; None if that is not known.
        named: whether the text may name that number. Epsilon does not cover how many records a client has.
    """
    if privacy.unit == "none" or not protected or privacy.delta * protected < 1.0:
        return ""
    number = f"{protected:,}" if named else "the number of"
    cure = f", such as {0.1 / protected:.0e}" if named else ""
    return (
        f"privacy.delta is {privacy.delta:g}, at or above 1 / {number} {privacy.unit}s: "
        f"that allows to publish one of them whole; set it well below{cure}"
    )


def ledger_folder(privacy: PrivacyConfig, run_dir: Path) -> Path:
    """Where the ledgers of a node's clients lie."""
    return expanded(privacy.ledger_dir) if privacy.ledger_dir else run_dir / LEDGERS
