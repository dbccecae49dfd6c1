"""Data sets by name, from the formats they are published in, and the generators that bias them.

source = load("mnist-4v9", data_dir="~/data")          # METAKERN_DATA when data_dir is not given
task = binary_imbalance(source, majority=0.995, seed=0)
task.train, task.meta, task.test                       # Examples: inputs, targets, ids
"""

from metakern.data.augment import crop_and_flip
from metakern.data.biased import biased
from metakern.data.catalogue import NAMES, is_own, load, short_name
from metakern.data.contents import contents
from metakern.data.examples import Examples, Source, Task
from metakern.data.folder import DataNotFound, data_dir
from metakern.data.idx import read_idx
from metakern.data.imbalance import binary_imbalance
from metakern.data.long_tail import SHAPES
from metakern.data.nodes import GraphSource, NodeTask, node_task
from metakern.data.noise import NOISE_KINDS
from metakern.data.planetoid import GRAPHS, Graph, load_graph

__all__ = [
    "GRAPHS",
    "NAMES",
    "NOISE_KINDS",
    "SHAPES",
    "DataNotFound",
    "Examples",
    "Graph",
    "GraphSource",
    "NodeTask",
    "Source",
    "Task",
    "biased",
    "binary_imbalance",
    "contents",
    "crop_and_flip",
    "data_dir",
    "is_own",
    "load",
    "load_graph",
    "node_task",
    "read_idx",
    "short_name",
]
