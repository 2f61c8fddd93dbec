#!/usr/bin/env bash
# Checks and measures on one GPU, without a network:
#   benchmarks/run_gpu.sh first                  ends after 395 s (give it 440): the real script, the library calls, the
#                                                headline programs
#   benchmarks/run_gpu.sh next 330               what is still unmeasured, in order of worth, within 330 s
#   benchmarks/run_gpu.sh train/llama_1b         one case; train/ runs all that begin so; --list names and times them
#   benchmarks/run_gpu.sh --dry-run              the same programs at toy sizes, on any machine
# Results, log and compilation cache go to $OUT where it is set, else to benchmarks/results. What
# benchmarks/gpu/carry.sh left in carried/ (wheels, data, the cache of an earlier call) is used.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
BENCH_START=$(date +%s) # the seconds of a call count from here
export BENCH_START PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi -L >/dev/null 2>&1 || true # on some machines /dev/nvidia* appears only after a program has used the GPU
if compgen -G "carried/*.whl" >/dev/null; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  if "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" carried/*.whl; then
    export PYTHONPATH="$PYTHONPATH:$site"
    "$python" -c 'import tensorflow_datasets, grain, array_record' || echo "pretrain cases will fail: see the error above" >&2
  else
    echo "the wheels in carried/ do not fit this Python; continuing without them" >&2
  fi
fi
"$python" -m benchmarks.gpu.run "$@"
