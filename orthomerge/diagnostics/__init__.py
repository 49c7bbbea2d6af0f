"""Measurements of checkpoints for people to look at; nothing here changes a file."""

from orthomerge.diagnostics.difference import TensorDifference, diff_checkpoints, diff_sources
from orthomerge.diagnostics.geometry import diagnose
from orthomerge.diagnostics.inspection import Inspection, inspect_source
from orthomerge.diagnostics.interference import (
    Comparison,
    ModuleComparison,
    SideComparison,
    TotalComparison,
)
from orthomerge.diagnostics.measurements import Diagnosis, LayerGeometry, ModelGeometry
from orthomerge.diagnostics.plots import plot_diagnosis
from orthomerge.diagnostics.update_totals import compared
from orthomerge.diagnostics.update_verdict import MergeVerdict, judge_updates
from orthomerge.diagnostics.updates import compare_updates
from orthomerge.diagnostics.verdict import Verdict, judge

__all__ = [
    "Comparison",
    "Diagnosis",
    "Inspection",
    "LayerGeometry",
    "MergeVerdict",
    "ModelGeometry",
    "ModuleComparison",
    "SideComparison",
    "TensorDifference",
    "TotalComparison",
    "Verdict",
    "compare_updates",
    "compared",
    "diagnose",
    "diff_checkpoints",
    "diff_sources",
    "inspect_source",
    "judge",
    "judge_updates",
    "plot_diagnosis",
]
