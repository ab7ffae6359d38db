#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
imagenet.sh [--output FOLDER] [--models "ID ID …"] [--smoke] [OPTIONS of bench_accuracy.py]

Every method (but distillation: --methods mixed-rank/distill) × every size for DeiT-B, DeiT-S and ViT-B on full
ImageNet: calibrated on 1,024 training images, measured on all 50,000 validation images. Each model's tables and charts
go into a folder of its own under FOLDER (imagenet-accuracy). What is finished is kept: the same command goes on after an interruption.

  --output FOLDER    where to write
  --models "ID …"    hub ids or folders of other models, or fewer; one command per GPU shares the work out:
                     CUDA_VISIBLE_DEVICES=1 scripts/imagenet.sh --models facebook/deit-small-patch16-224
  --smoke            a dry run of the same path, without a network: a tiny model of handwritten digits, two sizes, few
                     methods
  others             go to bench_accuracy.py: --methods, --sizes, --images, --device; --calibration and --dataset for a
                     local copy of ImageNet, e.g. --calibration /data/imagenet/train --dataset /data/imagenet/val

ImageNet is gated: accept its terms on https://huggingface.co/datasets/imagenet-1k and run `hf auth login` once. The
validation images are prepared once and kept if memory allows (30 GB, of 60 GB free); else they are streamed again for each
cell, and a local copy is the better choice. PYTHON names another Python than python3; where it has this package it is
used as it is, else an environment is made with it.
TEXT
}

output=imagenet-accuracy
models="facebook/deit-base-patch16-224 facebook/deit-small-patch16-224 google/vit-base-patch16-224"
smoke=
options=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit
        ;;
    --output | --models)
        [ $# -ge 2 ] || { echo "$1 needs a value (see --help)." >&2; exit 2; }
        declare "${1#--}=$2"
        shift
        ;;
    --output=* | --models=*) declare "${1#--}" ;;
    --smoke) smoke=1 ;;
    *) options+=("$1") ;;
    esac
    shift
done

case $output in /*) ;; *) output=$PWD/$output ;; esac
start=$PWD
cd "$(dirname "$0")/.."
source scripts/environment.sh
if ! "$PYTHON" -c 'import importlib.metadata; importlib.metadata.version("hf-vit-lowrank")' 2>/dev/null; then
    make_environment .venv-bench --editable '.[bench]'
    PYTHON=$PWD/.venv-bench/bin/python
fi
bench=$PWD/scripts/bench_accuracy.py
cd "$start" # where the folders of the options are

read -ra sources <<<"$models"
calibration=imagenet-1k:train
dataset=imagenet-1k:validation
if [ -n "$smoke" ]; then
    "$PYTHON" - "$output/digits" <<'CODE'
import sys
from pathlib import Path
from hf_vit_lowrank.digits import SMALL, train_digits_model, write_digits_data
folder = Path(sys.argv[1])
write_digits_data(folder / "data")
train_digits_model(folder / "model", SMALL)
CODE
    sources=("$output/digits/model")
    calibration=$output/digits/data/train.parquet
    dataset=$output/digits/data/test.parquet
    options=(--smoke --sizes 0.6,0.8 --methods svd,svd-llm,mixed-rank/none,mixed-rank/closed-form ${options[@]+"${options[@]}"})
fi

for model in "${sources[@]}"; do
    echo "== $model"
    "$PYTHON" "$bench" "$model" --calibration "$calibration" --dataset "$dataset" \
        --samples 1024 --output "$output/$(basename "$model")" ${options[@]+"${options[@]}"}
done
