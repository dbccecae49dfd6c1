"""The training methods, one file per paper. A file holds what is particular to its paper.

method = find("l2rw")
step = method.begin(setup)
outcome = step(model, batch, meta_batch, optimizer=optimizer, setting=setting)
"""

from metakern.methods.catalogue import METHODS, find
from metakern.methods.method import Method, Outcome, Setting, Setup

__all__ = ["METHODS", "Method", "Outcome", "Setting", "Setup", "find"]
