"""Ray's signal handlers and the output of its daemons, while this process is connected.

Ray has no public setting for either: `ray.init` takes `log_to_driver` for the output of workers alone.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import services, utils, worker


@contextmanager
def starting() -> Iterator[None]:
    """While Ray starts: it takes no signal handler of this process, and its processes get no signal of ours.

    A scheduler or `timeout` sends SIGTERM to the whole process group. The run needs Ray to write its checkpoints then,
    so Ray's processes have separate groups. They still end with this process (PR_SET_PDEATHSIG).
    """
    popen, setter = services.ConsolePopen, utils.set_sigterm_handler
    services.ConsolePopen = functools.partial(popen, process_group=0)
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = popen, setter
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Ray's C++ code has put a handler that prints a stack below Python's: this puts ours in its place.
                handler = signal.getsignal(number)
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def silent() -> Iterator[None]:
    """While this process is connected: what Ray's daemons report does not appear on the terminal.

    It tells of actors that are started again, which is their ordinary life here; `deaths` says what matters.
    """
    printer = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printer
