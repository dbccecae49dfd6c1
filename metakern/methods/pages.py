"""The page of docs/methods that describes a method."""

from __future__ import annotations

_SHARED = {
    "baselines": """uniform random proportion proportion-as-shipped resample hard-mining hard-mining-as-shipped
        uniform-es uniform-ft uniform-es-ft random-ft reed-soft-es reed-hard-es clean-only gold-only weighted
        weighted-ft weighted-as-shipped""",
    "class-imbalance": """inverse-sqrt class-balanced focal focal-detached focal-sigmoid ldam ldam-drw ce-drw ce-drs
        logit-adjustment arb cdb cdb-cifar label-smoothing label-smoothing-by-class sam sam-a simplifying mixup
        ot-reweighting m2m""",
    "noisy-labels": """self-paced self-paced-linear reed-soft reed-hard s-model s-model-conf s-model-conf-es
        s-model-conf-ft s-model-conf-es-ft noise-adaptation bottom-up top-down glc confusion-correction
        forward-correction mentornet-pd mentornet-pd-ft mentornet-dd mentornet-dd-ft""",
    "resampling": """oversample undersample smote borderline-smote svm-smote adasyn cluster-centroids near-miss all-knn
        smote-enn adaboost adaboost-networks self-training""",
    "mw-net": "mw-net mw-net-imbalance",
    "cmw-net": "cmw-net cmw-net-noise cmw-net-sl",
    "mlrnet": "mlrnet mlrnet-own-step",
    "metabalance": "metabalance metabalance-as-shipped",
    "mlc": "mlc mlc-gold-apart mlc-new-labels mlc-skip",
}
_PAGES = {name: page for page, names in _SHARED.items() for name in names.split()}


def page_of(method: str) -> str:
    """The name of the page: that of the method's family, or its own."""
    return _PAGES.get(method, method)
