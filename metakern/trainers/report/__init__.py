"""Reports: a self-contained HTML page for a run, for several runs side by side, or for a comparison."""

from metakern.trainers.report.comparison import write_comparison
from metakern.trainers.report.runs import write_report

__all__ = ["write_comparison", "write_report"]
