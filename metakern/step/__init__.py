"""Stage 5: use the weighted gradient. One public function per family of methods."""

from metakern.step.label_net import LabelNet as LabelNet
from metakern.step.logit_tangents import LogitTangents as LogitTangents
from metakern.step.logit_tangents import logit_tangents as logit_tangents
from metakern.step.metabalance import MetaBalanceResult as MetaBalanceResult
from metakern.step.metabalance import metabalance_step as metabalance_step
from metakern.step.mlc import CorrectionResult as CorrectionResult
from metakern.step.mlc import mlc_step as mlc_step
from metakern.step.mwnet import MetaStepResult as MetaStepResult
from metakern.step.mwnet import mwnet_step as mwnet_step
from metakern.step.programs.captured import CapturedStep as CapturedStep
from metakern.step.programs.captured import capture_step as capture_step
from metakern.step.programs.compiled import CompiledStep as CompiledStep
from metakern.step.programs.compiled import compile_step as compile_step
from metakern.step.programs.compiled_mlc import CompiledCorrectionStep as CompiledCorrectionStep
from metakern.step.programs.compiled_mlc import compile_mlc_step as compile_mlc_step
from metakern.step.programs.compiled_mwnet import CompiledMetaStep as CompiledMetaStep
from metakern.step.programs.compiled_mwnet import compile_mwnet_step as compile_mwnet_step
from metakern.step.result import Dots as Dots
from metakern.step.result import StepResult as StepResult
from metakern.step.reweight import grad_dots as grad_dots
from metakern.step.reweight import l2rw_step as l2rw_step
from metakern.step.reweight import reweight_step as reweight_step
