"""Every layer and structure the library answers for, declared once: tests judge each engine by it."""

from metakern.testing.catalogue.case import Case, Setup
from metakern.testing.catalogue.layers import LAYERS
from metakern.testing.catalogue.layouts import LAYOUTS
from metakern.testing.catalogue.structures import STRUCTURES

CASES: list[Case] = [*LAYERS, *STRUCTURES, *LAYOUTS]

__all__ = ["CASES", "LAYERS", "LAYOUTS", "STRUCTURES", "Case", "Setup"]
