"""Resample: class-balanced mini-batches, equal weights."""

from metakern.data.sampling import class_balanced
from metakern.methods.method import Method, weighted_step
from metakern.methods.uniform import uniform_weights

RESAMPLE = Method(
    "resample",
    "class-balanced mini-batches",
    "the baseline of Ren et al., ICML 2018",
    weighted_step(uniform_weights),
    sampler=class_balanced,
)
