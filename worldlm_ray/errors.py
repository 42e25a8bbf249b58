"""Every error that worldlm_ray raises on purpose.

    WorldLMError                 catch this to catch them all; the command line prints it as one line
    ├── ConfigError              a configuration key: names the dotted key, what was got, what to do
    │   └── ConfigErrors     several of them, a line each
    ├── DataError                a text file, corpus or tokenizer cannot be used
    ├── MessageError             an update or a model that arrived is malformed (carries a `Refusal`)
    ├── AggregationError         an aggregation was asked for with nothing to aggregate
    ├── PrivacyError             a privacy budget or its ledger does not allow what was asked for
    ├── CheckpointError          a checkpoint is missing, damaged or of another run
    ├── GatewayError             a gateway's folder, a profile or an invitation cannot be used
    │   └── Refused              what a member or a stranger asks at the border is refused (carries the refusal's name)
    └── RunError                 a run cannot start, continue or be found
        ├── OutputError          stdout or stderr cannot be written
        └── Interrupted          the user left before the run had begun

Messages say what was got, what was expected and how to mend it, in one line.
All of them survive pickling, since Ray carries errors between processes.
"""

from __future__ import annotations

from collections.abc import Sequence


class WorldLMError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(WorldLMError):
    """A configuration value cannot be used.

    Args:
        key: dotted key of the value, such as `world.children[0].training.lr`.
        problem: what was got and what was expected.
        cure: what the user should write instead; may be empty when the problem says it.
    """

    def __init__(self, key: str, problem: str, cure: str = "") -> None:
        super().__init__(key, problem, cure)
        self.key = key
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}" + (f"; {self.cure}" if self.cure else "")

    @property
    def each(self) -> list[ConfigError]:
        """The problems: this one, or each of several."""
        return [self]


class ConfigErrors(ConfigError):
    """Several values of a configuration cannot be used. `key`, `problem` and `cure` are those of the first.

    Args:
        found: the problems, at least one.
    """

    SHOWN = 10
    """So many are shown, at most."""

    def __init__(self, found: Sequence[ConfigError]) -> None:
        super().__init__(found[0].key, found[0].problem, found[0].cure)
        self.found = list(found)

    def __reduce__(self) -> tuple[type[ConfigErrors], tuple[list[ConfigError]]]:
        return ConfigErrors, (self.found,)

    def __str__(self) -> str:
        more = len(self.found) - self.SHOWN
        lines = [str(error) for error in self.found[: self.SHOWN]]
        return "\n".join([*lines, f"and {more:,} more"] if more > 0 else lines)

    @property
    def each(self) -> list[ConfigError]:
        """The problems."""
        return self.found


class DataError(WorldLMError):
    """A text file, a corpus or a tokenizer cannot be used."""


class NamedError(WorldLMError):
    """A refusal that has a name.

    Args:
        reason: the name, as counted and shown in TensorBoard.
        detail: who, what was got, and what was expected or the cure.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def detail_of(error: WorldLMError) -> str:
    """What an error says, without the name of a refusal."""
    return error.detail if isinstance(error, NamedError) else str(error)


class MessageError(NamedError):
    """A message is malformed."""


class AggregationError(WorldLMError):
    """An aggregation was asked for with nothing to aggregate."""


class PrivacyError(WorldLMError):
    """A privacy budget does not allow what was asked for, or its ledger cannot be read or written."""


class CheckpointError(WorldLMError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class SupersededError(WorldLMError):
    """A newer process plays this node: the one that hears this is a leftover and must end, without a trace."""


class GatewayError(WorldLMError):
    """A gateway's folder, a member's profile or an invitation cannot be used."""


class Refused(NamedError, GatewayError):
    """What a peer asks at the border is refused; nothing has changed."""


class RunError(WorldLMError):
    """A run cannot start, cannot continue, or cannot be found."""


class OutputError(RunError):
    """What a command prints cannot be written, such as to a full disk."""


class Interrupted(RunError):
    """The user asked to leave (Ctrl-C, SIGTERM) before there was anything to keep."""
