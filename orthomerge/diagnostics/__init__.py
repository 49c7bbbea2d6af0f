"""Measurements of checkpoints for people to look at; nothing here changes a file."""

from orthomerge.diagnostics.difference import TensorDifference, diff_checkpoints
from orthomerge.diagnostics.inspection import Inspection, inspect_source

__all__ = ["Inspection", "TensorDifference", "diff_checkpoints", "inspect_source"]
