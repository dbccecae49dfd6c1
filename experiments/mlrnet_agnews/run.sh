#!/bin/sh
# All cells of the experiment, into the folder OUT (default: runs/mlrnet_agnews); can be stopped and started again.
set -e
out=${1:-runs/mlrnet_agnews}
for seed in 0 1 2; do
    for cell in "20 0.4" "20 0" "1 0.4"; do
        factor=${cell% *} rate=${cell#* }
        noise="--noise uniform --noise-rate $rate"
        if [ "$rate" = 0 ]; then noise=; fi
        metakern compare --data ag-news --model transformer --methods uniform,random,mw-net,mlrnet --seeds $seed \
            --imbalance $factor $noise --train-size 10000 --meta-per-class 100 --steps 500 --batch-size 30 \
            --meta-batch-size 30 --optimizer adam --lr 5e-4 --warmup 0.1 --evaluations 1 --threads 1 \
            --out "$out/imbalance$factor-noise$rate"
    done
done
