"""metakern: meta-gradients for PyTorch without double backward, in a few passes of the model.

Five stages, in the order in which data flows:

    capture        one forward and backward pass, which records input A and output gradient B of every parameter use
    dots           dots_n = <g_n, g_meta>, from these records and the meta gradient
    weights        dots -> weights, by a small pure rule
    weighted_grad  sum_n w_n g_n from the same records, without a second backward pass
    step           .grad, or a step of any torch optimizer

Published methods are compositions of these stages. Learning to re-weight (Ren et al., 2018) is

    dots = <g_n, g_meta> at theta;  weights = clip_normalise(dots);  step with sum_n weights_n g_n

which is `l2rw_step`. Selecting the k most helpful examples of a batch is the same with another rule,

    reweight_step(model, batch, meta_batch, rule=functools.partial(metakern.weights.top_k, k=8))

and in-run data attribution stops after stage two: sum lr * `grad_dots(model, batch, meta_batch).dots` over training.

Three steps have a virtual step, after which the meta loss is taken:

    mwnet_step        a weight net turns losses into weights; it is trained by dots with the meta gradient at theta^
    mlc_step          a label net turns given labels into soft ones; it is trained by logit tangents (`logit_tangents`)
    metabalance_step  parameters from which one step leads to a low loss on balanced data; a Hessian-vector product

`compile_step`, `compile_mwnet_step`, `compile_mlc_step` and `capture_step` turn whole steps into programs; `check` and
`explain` tell whether a step is exact for a model, and what it costs.
"""

from metakern import ops as ops
from metakern import weights as weights
from metakern.check import CheckReport as CheckReport
from metakern.check import check as check
from metakern.layers import LayerRule as LayerRule
from metakern.layers import register_layer as register_layer
from metakern.planning import Explanation as Explanation
from metakern.planning import explain as explain
from metakern.planning import plan as plan
from metakern.step import CapturedStep as CapturedStep
from metakern.step import CompiledCorrectionStep as CompiledCorrectionStep
from metakern.step import CompiledMetaStep as CompiledMetaStep
from metakern.step import CompiledStep as CompiledStep
from metakern.step import CorrectionResult as CorrectionResult
from metakern.step import Dots as Dots
from metakern.step import LogitTangents as LogitTangents
from metakern.step import MetaBalanceResult as MetaBalanceResult
from metakern.step import MetaStepResult as MetaStepResult
from metakern.step import StepResult as StepResult
from metakern.step import capture_step as capture_step
from metakern.step import compile_mlc_step as compile_mlc_step
from metakern.step import compile_mwnet_step as compile_mwnet_step
from metakern.step import compile_step as compile_step
from metakern.step import grad_dots as grad_dots
from metakern.step import l2rw_step as l2rw_step
from metakern.step import logit_tangents as logit_tangents
from metakern.step import metabalance_step as metabalance_step
from metakern.step import mlc_step as mlc_step
from metakern.step import mwnet_step as mwnet_step
from metakern.step import reweight_step as reweight_step

__version__ = "0.1.0"
