"""The mathematics of each layer: what it does with a direction V and with weighted output gradients."""

from metakern.layers.rule import Gradients as Gradients
from metakern.layers.rule import LayerRule as LayerRule
from metakern.layers.rule import Tangents as Tangents
from metakern.layers.rule import Weights as Weights
from metakern.layers.table import register_layer as register_layer
from metakern.layers.table import rule_for as rule_for
