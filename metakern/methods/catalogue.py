"""The methods that can be named on the command line."""

from __future__ import annotations

from metakern.methods.boosting import ADABOOST, ADABOOST_NETWORKS
from metakern.methods.bootstrapping import REED_HARD, REED_SOFT
from metakern.methods.class_aware_meta_weight_net import CMW_NET, CMW_NET_NOISE
from metakern.methods.class_difficulty import CDB, CDB_CIFAR
from metakern.methods.class_weights import CLASS_BALANCED, INVERSE_SQRT
from metakern.methods.clean_only import CLEAN_ONLY, GOLD_ONLY
from metakern.methods.curve_net import CURVE_NET
from metakern.methods.feature_resampling import RESAMPLING_METHODS
from metakern.methods.focal import FOCAL, FOCAL_DETACHED, FOCAL_SIGMOID
from metakern.methods.hard_mining import HARD_MINING, HARD_MINING_AS_SHIPPED
from metakern.methods.known_channel import CONFUSION, FORWARD, GLC, TOP_DOWN
from metakern.methods.label_smoothing import LABEL_SMOOTHING, LABEL_SMOOTHING_BY_CLASS
from metakern.methods.ldam import CE_DRS, CE_DRW, LDAM, LDAM_DRW
from metakern.methods.learned_channel import CHANNEL_METHODS
from metakern.methods.learning_to_reweight import L2RW
from metakern.methods.logit_adjustment import ARB, LOGIT_ADJUSTMENT
from metakern.methods.major_to_minor import M2M
from metakern.methods.majority_weight import WEIGHTED, WEIGHTED_AS_SHIPPED
from metakern.methods.mentored import MENTORNET_DD, MENTORNET_PD
from metakern.methods.meta_gcn import META_GCN
from metakern.methods.meta_label_correction import MLC_METHODS
from metakern.methods.meta_weight_net import MW_NET, MW_NET_IMBALANCE
from metakern.methods.metabalance import METABALANCE, METABALANCE_AS_SHIPPED, find_pools
from metakern.methods.method import Method
from metakern.methods.mlrnet import MLRNET, MLRNET_OWN_STEP
from metakern.methods.optimal_transport import OT_REWEIGHTING
from metakern.methods.phases import with_phases
from metakern.methods.proportion import PROPORTION, PROPORTION_AS_SHIPPED
from metakern.methods.random_weights import RANDOM
from metakern.methods.resample import RESAMPLE
from metakern.methods.self_paced import SELF_PACED, SELF_PACED_LINEAR
from metakern.methods.self_training import SELF_TRAINING
from metakern.methods.settings import with_settings
from metakern.methods.sharpness import MIXUP, SAM, SAM_A, SIMPLIFYING
from metakern.methods.soft_class_aware_meta_weight_net import CMW_NET_SL
from metakern.methods.uniform import UNIFORM

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        UNIFORM,
        RANDOM,
        PROPORTION,
        PROPORTION_AS_SHIPPED,
        RESAMPLE,
        HARD_MINING,
        HARD_MINING_AS_SHIPPED,
        L2RW,
        MW_NET,
        MW_NET_IMBALANCE,
        CMW_NET,
        CMW_NET_NOISE,
        CMW_NET_SL,
        CURVE_NET,
        MLRNET,
        MLRNET_OWN_STEP,
        *MLC_METHODS,
        METABALANCE,
        METABALANCE_AS_SHIPPED,
        META_GCN,
        INVERSE_SQRT,
        CLASS_BALANCED,
        FOCAL,
        LDAM,
        LDAM_DRW,
        CE_DRW,
        CE_DRS,
        LOGIT_ADJUSTMENT,
        ARB,
        CDB,
        LABEL_SMOOTHING,
        LABEL_SMOOTHING_BY_CLASS,
        SELF_PACED,
        SELF_PACED_LINEAR,
        REED_SOFT,
        REED_HARD,
        with_phases(UNIFORM, "es"),
        with_phases(UNIFORM, "ft"),
        with_phases(UNIFORM, "es", "ft"),
        with_phases(RANDOM, "ft"),
        with_phases(REED_SOFT, "es"),
        with_phases(REED_HARD, "es"),
        CLEAN_ONLY,
        GOLD_ONLY,
        WEIGHTED,
        with_phases(WEIGHTED, "ft"),
        WEIGHTED_AS_SHIPPED,
        *CHANNEL_METHODS,
        GLC,
        CONFUSION,
        FORWARD,
        TOP_DOWN,
        *RESAMPLING_METHODS,
        ADABOOST,
        ADABOOST_NETWORKS,
        SELF_TRAINING,
        SAM,
        SAM_A,
        SIMPLIFYING,
        MIXUP,
        OT_REWEIGHTING,
        M2M,
        MENTORNET_PD,
        with_phases(MENTORNET_PD, "ft"),
        MENTORNET_DD,
        with_phases(MENTORNET_DD, "ft"),
        FOCAL_DETACHED,
        FOCAL_SIGMOID,
        CDB_CIFAR,
    )
}


def find(name: str, settings: str = "") -> Method:
    """The method called `name`, one of METHODS or "metabalance-INNER-OUTER" with the names of two samplers.

    `settings`, as in "rule=floor", replace the default settings of the method.
    Raises: ValueError with the known names if there is no such method; as `with_settings`.
    """
    method = METHODS.get(name) or find_pools(name)
    if method is None:
        raise ValueError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return with_settings(method, settings)
