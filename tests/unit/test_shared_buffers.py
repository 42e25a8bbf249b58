"""On Ray a node's models and updates move into shared memory: that changes no bit of a run.

A node then works on a read-only view of the same values, and uses its own buffer again for a later model. The test
does the same with copies, and overwrites every buffer that waits for its next use. Whatever still read one of them
would compute something else.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.golden import outcome

from worldlm_ray.aggregation.events import Command, Event, Exchange, Send, Serve, Shared
from worldlm_ray.aggregation.node import Node
from worldlm_ray.tensors.buffers import Flat, frozen

plain_handle = Node.handle
moved: dict[str, Any] = {}
"""The model of each node that lies in shared memory."""


def shared(node: Node, own: Flat) -> Flat:
    """Move a buffer of the node, as `ray.put` and `ray.get` do."""
    copy: Flat = frozen(own.copy())
    plain_handle(node, Shared(own=own, copy=copy))
    return copy


def as_on_ray(node: Node, event: Event) -> list[Command]:
    """Handle an event, and move what goes to a child or to the parent as actors/inner.py and federation.py do."""
    commands = plain_handle(node, event)
    for index, command in enumerate(commands):
        if isinstance(command, Serve | Exchange):
            if moved.get(node.path) is not node.theta:
                moved[node.path] = shared(node, node.theta)
            if isinstance(command, Serve):
                commands[index] = replace(command, model=replace(command.model, values=node.theta))
        elif isinstance(command, Send):
            shared(node, command.update.values)
            assert node.in_flight is not None
            commands[index] = Send(update=node.in_flight)
    for buffer in node.published._spare:
        buffer.fill(np.nan)
    return commands


@pytest.mark.parametrize("case", ["asynchronous", "overlap", "key_layers", "routed_key_layers", "int4_momentum"])
def test_shared_memory_changes_no_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / name for name in ("alone", "shared")]
    for place in places:
        place.mkdir()
    alone = outcome(case, places[0])
    moved.clear()
    monkeypatch.setattr(Node, "handle", as_on_ray)
    assert outcome(case, places[1]) == alone
