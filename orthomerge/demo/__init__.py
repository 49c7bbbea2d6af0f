"""The demonstration: real digits, a small vision transformer, experts, and merges of them.

Everything is made on the spot and nothing is downloaded. No merging happens in this room: it
starts the command line a user would type and measures what comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.demo.results import DemoResult, DemoRow
    from orthomerge.demo.run import run_demo

__all__ = ["DemoResult", "DemoRow", "run_demo"]

_HOMES = {
    "DemoResult": "orthomerge.demo.results",
    "DemoRow": "orthomerge.demo.results",
    "run_demo": "orthomerge.demo.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
