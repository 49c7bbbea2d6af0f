"""Merging: spaces, the registry of methods, planning, the engine and its executors.

The walk: ``planning`` turns a request into a ``plan`` from headers; ``run`` has ``engine`` execute
it, task by task, through ``executors``, and publishes the output.
"""

from orthomerge.merging.registry import MergeMethod, all_methods, get_method, merge_method
from orthomerge.merging.spaces import Space

__all__ = ["MergeMethod", "Space", "all_methods", "get_method", "merge_method"]
