"""What a step would cost for a model and its batches, predicted per use: operations and peak memory."""

from metakern.planning.explain import explain as explain
from metakern.planning.explain import plan as plan
from metakern.planning.explanation import Explanation as Explanation
