"""A client whose model DeepSpeed trains over several workers. The rest of the world notices nothing of it.

The actor owns one run of Ray Train, whose workers live as long as the client does.
"""

from __future__ import annotations

import secrets
import threading
from typing import Any

from actors.client import ClientActor
from actors.shared import Address
from actors.zero.tasks import Group, Task, TaskQueue
from actors.zero.train_run import TrainRun
from actors.zero.trainer import ZeroTrainer
from worldlm_ray.privacy.account import Account
from worldlm_ray.training.trainer import Trainer


class ZeroClientActor(ClientActor):
    """A client with workers. Its own process holds no model, only what is exchanged.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        self._token = secrets.token_hex(4)
        self._queue = TaskQueue(self._token, name=address.path)
        super().__init__(address)

    def _make_trainer(self, account: Account | None) -> Trainer:
        noise = 0.0 if account is None else account.noise
        run = TrainRun(self.plan, self.spec, self._address.namespace, self._token)
        threading.Thread(target=run.until_over, args=(self._queue, noise), daemon=True).start()
        return ZeroTrainer(
            self._queue, self.plan, self.spec, tell=lambda event, text: self._tell(self._life(event, text))
        )

    def incarnation_token(self) -> str:
        """A random text that no other incarnation of this client has."""
        return self._token

    # ---- called by the workers ---------------------------------------------------------------------------------

    def group_started(self, group: Group, workers: int) -> None:
        """See `TaskQueue.started`."""
        self._queue.started(group, workers)

    def next_task(self, group: Group, after: int, wait_s: float) -> int | None:
        """See `TaskQueue.next`."""
        return self._queue.next(group, after, wait_s)

    def task(self, group: Group, number: int) -> Task:
        """See `TaskQueue.task`."""
        return self._queue.task(group, number)

    def task_done(self, group: Group, number: int, result: Any) -> None:
        """See `TaskQueue.done`."""
        self._queue.done(group, number, result)

    def group_failed(self, group: Group, error: str) -> None:
        """See `TaskQueue.failed`."""
        self._queue.failed(group, error)
