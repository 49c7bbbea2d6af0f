"""Measurements of checkpoints for people to look at; nothing here changes a file."""

from orthomerge.diagnostics.difference import TensorDifference, diff_checkpoints
from orthomerge.diagnostics.geometry import diagnose
from orthomerge.diagnostics.inspection import Inspection, inspect_source
from orthomerge.diagnostics.measurements import Diagnosis, LayerGeometry, ModelGeometry
from orthomerge.diagnostics.plots import plot_diagnosis
from orthomerge.diagnostics.verdict import Verdict, judge

__all__ = [
    "Diagnosis",
    "Inspection",
    "LayerGeometry",
    "ModelGeometry",
    "TensorDifference",
    "Verdict",
    "diagnose",
    "diff_checkpoints",
    "inspect_source",
    "judge",
    "plot_diagnosis",
]
