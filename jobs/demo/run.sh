#!/usr/bin/env bash
# The demo: a base model that is trained from nothing, then four QLoRA adapters that are trained together on it.
# Usage: jobs/demo/run.sh BIN, the bin folder of the environment. DEMO names the folder to work in.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(realpath -s "$1")
export DEMO=${DEMO:-$PWD/runs/demo} HF_HUB_OFFLINE=1
raytune_ft=$bin/raytune-ft

if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; else bold='' plain=''; fi
step() { printf '\n%s%s%s\n' "$bold" "$1" "$plain"; }

rm -rf "$DEMO"
step "1 of 5: arithmetic in words, and a model with random weights"
# DeepSpeed, which transformers loads to save a model, would print which device it found.
DS_ACCELERATOR=cpu "$bin/python" jobs/demo/arithmetic.py --to "$DEMO"
step "2 of 5: train every weight of the base on adding, copying and comparing"
"$raytune_ft" train jobs/demo/base.yaml --output "$DEMO/runs/base"
"$raytune_ft" catalog pull demo-base --catalog "$DEMO/catalog" --to "$DEMO/base"
step "3 of 5: teach it four new tasks at once, with a fleet of QLoRA adapters on one 4-bit base"
"$raytune_ft" fleet jobs/demo/fleet.yaml --output "$DEMO/runs/fleet"
step "4 of 5: every adapter at every task"
"$bin/python" jobs/demo/cross_table.py jobs/demo/fleet.yaml
step "5 of 5: ask a published adapter"
"$raytune_ft" generate --adapter subtraction@candidate --catalog "$DEMO/catalog" "What is 41 minus 17?"
"$raytune_ft" catalog ls --catalog "$DEMO/catalog"
report=$DEMO/runs/fleet/report.html
printf '\nThe report: %s\n' "$report"
if [ -n "${DISPLAY:-}" ] && command -v xdg-open > /dev/null; then xdg-open "$report" > /dev/null 2>&1 || true; fi
