"""Stage 5: use the weighted gradient. One public function per family of methods."""

from metakern.step.mwnet import MetaStepResult as MetaStepResult
from metakern.step.mwnet import mwnet_step as mwnet_step
from metakern.step.result import Dots as Dots
from metakern.step.result import StepResult as StepResult
from metakern.step.reweight import grad_dots as grad_dots
from metakern.step.reweight import l2rw_step as l2rw_step
from metakern.step.reweight import reweight_step as reweight_step
