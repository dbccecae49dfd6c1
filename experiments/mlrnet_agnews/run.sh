#!/bin/sh
# All cells of the experiment, into the folder OUT (default: runs/mlrnet_agnews); can be stopped and started again.
set -e
out=${1:-runs/mlrnet_agnews}
model=transformer

run() {  # folder, methods, clean texts of each class, and the bias
    folder=$1 methods=$2 clean=$3
    shift 3
    metakern compare --data ag-news --model "$model" --methods "$methods" --seeds 0-2 "$@" \
        --train-size 10000 --meta-per-class "$clean" --steps 500 --batch-size 30 --meta-batch-size 30 \
        --optimizer adam --lr 5e-4 --warmup 0.1 --evaluations 1 --threads 1 --out "$out/$folder"
}

all=uniform,random,mw-net,mlc,glc,mlrnet
run imbalance10 $all 100 --imbalance 10
run imbalance50 $all 100 --imbalance 50
run uniform0.2 $all 100 --noise uniform --noise-rate 0.2
run imbalance20 $all 100 --imbalance 20
run imbalance100 $all 100 --imbalance 100
run imbalance200 $all 100 --imbalance 200
run uniform0.4 $all 100 --noise uniform --noise-rate 0.4
run imbalance20-uniform0.4 $all 100 --imbalance 20 --noise uniform --noise-rate 0.4
run flip0.4 $all 100 --noise flip --noise-rate 0.4
for clean in 10 50 200; do
    run imbalance20-uniform0.4-meta$clean mlrnet $clean --imbalance 20 --noise uniform --noise-rate 0.4
done

if [ ! -f "$out/encoder/config.json" ]; then
    python "$(dirname "$0")/pretrain.py" "$out/encoder"
fi
model=transformers:$out/encoder
all=uniform,random,mw-net,mlrnet
run pretrained-imbalance20-uniform0.4 $all 100 --imbalance 20 --noise uniform --noise-rate 0.4
run pretrained-imbalance20 $all 100 --imbalance 20
run pretrained-uniform0.4 $all 100 --noise uniform --noise-rate 0.4
run pretrained-flip0.4 $all 100 --noise flip --noise-rate 0.4
