#!/usr/bin/env bash
# All benchmarks. TRL gets an environment of its own, made on the first run. Usage: benchmarks/run.sh VENV_BIN
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath -s "$1")
peer=.venv-peer
if [ ! -f "$peer/.installed" ]; then
    python3 -m venv "$peer"
    "$peer/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
    "$peer/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt \
        trl==1.16.0 peft bitsandbytes transformers accelerate datasets
    touch "$peer/.installed"
fi
"$bin/python" benchmarks/job_vs_trl.py --peer-python "$PWD/$peer/bin/python" --write docs/benchmarks.md
