#!/usr/bin/env bash
# The demo: a base model that is trained from nothing, then a QLoRA adapter that teaches it to subtract.
# Usage: jobs/demo/run.sh BIN, the bin folder of the environment. DEMO names the folder to work in.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(realpath -s "$1")
export DEMO=${DEMO:-$PWD/runs/demo} HF_HUB_OFFLINE=1
raytune_ft=$bin/raytune-ft

step() { printf '\n\033[1m%s\033[0m\n' "$1"; }

rm -rf "$DEMO"
step "1 of 4: arithmetic in words, and a model with random weights"
# DeepSpeed, which transformers loads to save a model, would print which device it found.
DS_ACCELERATOR=cpu "$bin/python" jobs/demo/arithmetic.py --to "$DEMO"
step "2 of 4: train every weight of the base on adding, copying and comparing"
"$raytune_ft" train jobs/demo/base.yaml --output "$DEMO/runs/base"
"$raytune_ft" catalog pull demo-base --catalog "$DEMO/catalog" --to "$DEMO/base"
step "3 of 4: teach it to subtract, with a QLoRA adapter on the 4-bit base"
"$raytune_ft" train jobs/demo/subtraction.yaml --output "$DEMO/runs/subtraction"
step "4 of 4: ask the published adapter"
"$raytune_ft" generate --adapter subtraction@candidate --catalog "$DEMO/catalog" "What is 41 minus 17?"
"$raytune_ft" catalog ls --catalog "$DEMO/catalog"
report=$DEMO/runs/subtraction/report.html
printf '\nThe report: %s\n' "$report"
if [ -n "${DISPLAY:-}" ] && command -v xdg-open > /dev/null; then xdg-open "$report" > /dev/null 2>&1 || true; fi
