#!/bin/sh
# All that needs a GPU, one after the other: build, tests, benchmarks, tiles. Whatever stops, the next one is run.
#
#     sh benchmarks/gpu.sh    takes under ten minutes
#
# OUT: where tables, logs and tiles go. TESTS: seconds for the tests. MINUTES, TUNING: minutes for benchmarks and tiles.
OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3}
export OUT
mkdir -p "$OUT"

architecture() { "$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())'; }
METAKERN_CUDA_ARCHS=${METAKERN_CUDA_ARCHS:-$(architecture)}
export METAKERN_CUDA_ARCHS

METAKERN_BUILD=cuda "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e . 2>&1 | tee "$OUT/build.log"
"$PYTHON" -m metakern.report | tee "$OUT/report.txt"
timeout "${TESTS:-180}" "$PYTHON" -m pytest -q -n 4 -m "gpu and not slow" 2>&1 | tee "$OUT/tests.log"
"$PYTHON" -m benchmarks.gpu --minutes "${MINUTES:-4}" 2>&1 | tee "$OUT/benchmarks.log"
"$PYTHON" -m benchmarks.tune --minutes "${TUNING:-1.5}" 2>&1 | tee "$OUT/tune.log"
