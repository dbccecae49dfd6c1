"""Resample: class-balanced mini-batches, equal weights."""

from metakern.data.sampling import class_balanced
from metakern.methods.method import Method, always
from metakern.methods.weighted_step import weighted_step

RESAMPLE = Method(
    "resample",
    "class-balanced mini-batches",
    "the baseline of Ren et al., ICML 2018",
    always(weighted_step()),
    sampler=class_balanced,
)
