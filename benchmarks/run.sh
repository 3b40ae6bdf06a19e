#!/usr/bin/env bash
# All benchmarks. The peers get environments of their own, made on the first run. Usage: benchmarks/run.sh VENV_BIN
# Writes the tables of docs/benchmarks.md, and all figures as JSON into runs/benchmarks.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath -s "$1")
peer=.venv-peer streaming=.venv-streaming mlflow=.venv-mlflow

if [ ! -f "$peer/.complete" ]; then
    python3 -m venv "$peer"
    "$peer/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
    "$peer/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt \
        trl==1.16.0 peft bitsandbytes transformers accelerate datasets==5.2.0 deepspeed
    touch "$peer/.complete"
fi
# It refuses this project's numpy and tokenizers.
if [ ! -f "$streaming/.installed" ]; then
    python3 -m venv "$streaming"
    "$streaming/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
    "$streaming/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 mosaicml-streaming==0.13.0 tokenizers==0.22.2
    touch "$streaming/.installed"
fi
if [ ! -f "$mlflow/.installed" ]; then
    python3 -m venv "$mlflow"
    "$mlflow/bin/pip" install --quiet --disable-pip-version-check mlflow==3.17.2
    touch "$mlflow/.installed"
fi

write=(--write docs/benchmarks.md --results runs/benchmarks)
peer_python=(--peer-python "$PWD/$peer/bin/python")
"$bin/python" benchmarks/data_throughput.py "${peer_python[@]}" \
    --streaming-python "$PWD/$streaming/bin/python" "${write[@]}"
"$bin/python" benchmarks/data_stream.py "${write[@]}"
"$bin/python" benchmarks/catalog.py --mlflow-python "$PWD/$mlflow/bin/python" "${write[@]}"
"$bin/python" benchmarks/job_vs_trl.py "${peer_python[@]}" --repeats 2 "${write[@]}"
"$bin/python" benchmarks/sharded.py "${peer_python[@]}" --repeats 2 "${write[@]}"
"$bin/python" benchmarks/fleet.py "${peer_python[@]}" --repeats 2 "${write[@]}"
"$bin/python" benchmarks/fleet_queue.py "${write[@]}"
# Alone where there is a GPU: it needs no Ray, and the other benchmarks are for CPUs.
if "$bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$bin/python" benchmarks/fleet_gpu.py "${write[@]}"
fi
