"""Every layer and structure the library answers for, declared once: tests judge each engine by it."""

from metakern.testing.catalogue.case import Case, Setup
from metakern.testing.catalogue.layers import LAYERS
from metakern.testing.catalogue.layouts import LAYOUTS
from metakern.testing.catalogue.networks import NETWORKS
from metakern.testing.catalogue.recurrent import RECURRENT
from metakern.testing.catalogue.scales import SCALES
from metakern.testing.catalogue.sparse import SPARSE
from metakern.testing.catalogue.spectral import SPECTRAL
from metakern.testing.catalogue.structures import STRUCTURES

CASES: list[Case] = [*LAYERS, *SCALES, *RECURRENT, *STRUCTURES, *LAYOUTS, *SPARSE, *SPECTRAL]

__all__ = [
    "CASES",
    "LAYERS",
    "LAYOUTS",
    "NETWORKS",
    "RECURRENT",
    "SCALES",
    "SPARSE",
    "SPECTRAL",
    "STRUCTURES",
    "Case",
    "Setup",
]
