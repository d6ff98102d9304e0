"""One self-contained HTML file per run: what was made, how good it is, and what it was made from."""

from evaluation.report.inputs import (
    Command,
    DatasetInput,
    GateDecision,
    LineageNode,
    Prediction,
    ReportInputs,
    Stage,
    TrainingRun,
)
from evaluation.report.page import render, write

__all__ = [
    "Command",
    "DatasetInput",
    "GateDecision",
    "LineageNode",
    "Prediction",
    "ReportInputs",
    "Stage",
    "TrainingRun",
    "render",
    "write",
]
