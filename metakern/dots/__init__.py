"""Stage 2: how much a step on example n helps the meta loss. dots_n = <g_n, g_meta>, summed over uses."""

from metakern.dots.direction import direction_dots as direction_dots
from metakern.dots.direction import extend_to_derived as extend_to_derived
from metakern.dots.direction import folded as folded
from metakern.dots.pairs import pair_dots as pair_dots
from metakern.dots.pairs import pairable as pairable
from metakern.dots.pairs import pairable_biases as pairable_biases
from metakern.dots.pairs import pairs_are_cheaper as pairs_are_cheaper
from metakern.dots.pairs import worth_tracing as worth_tracing
