"""Uniform: the plain mean loss, the baseline for all other methods."""

from metakern.methods.method import Method, always
from metakern.methods.weighted_step import weighted_step

UNIFORM = Method(
    "uniform",
    "the plain mean loss",
    "the baseline of Ren et al., ICML 2018",
    always(weighted_step()),
    handles="none",
)
