"""WorldLM as a runtime: language models trained across federations of federations, asynchronously, on Ray.

    import worldlm_ray as wr

    run = wr.train("quickstart", budget={"tokens": 1e6})    actors on Ray, wall clock
    run = wr.simulate("quickstart")                         one process, virtual clock
    run.summary, run.metrics(), run.model("world")
    wr.compare("federating", methods=["local", "worldlm"]).table()
    wr.load("quickstart")

What these are is imported when they are first used: an inner node must not load torch, and the core must not load Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldlm_ray.api.comparison import Comparison, compare
    from worldlm_ray.api.run import Run, load
    from worldlm_ray.api.runs import resume, simulate, train

__version__ = "0.1.0"
__all__ = ["Comparison", "Run", "compare", "load", "resume", "simulate", "train"]
_PLACES = {
    "Comparison": "comparison",
    "Run": "run",
    "compare": "comparison",
    "load": "run",
    "resume": "runs",
    "simulate": "runs",
    "train": "runs",
}


def __getattr__(name: str) -> Any:
    """Import a function of the Python interface at its first use."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """Names, with those that are not imported yet."""
    return sorted({*globals(), *__all__})
