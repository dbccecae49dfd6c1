"""Three ways to compute dots: the five stages (ghost), forward mode (jvp), and the classic double backward."""

from metakern.engines.choose import solve as solve
from metakern.engines.problem import Answer as Answer
from metakern.engines.problem import Problem as Problem
from metakern.engines.problem import pose as pose
from metakern.layers.forward.forms import twice_differentiable as twice_differentiable
