#!/usr/bin/env bash
# Trains a small ViT on scikit-learn's digits, compresses it, evaluates both; writes everything to demo-output/.
# PYTHON names another Python than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .venv-demo --editable '.[demo]'
.venv-demo/bin/hf-vit-lowrank demo --output demo-output --overwrite "$@"
