#!/usr/bin/env bash
# Checks and measures on one GPU, without a network:
#   benchmarks/run_gpu.sh                        the first ten minutes: tests, ceilings, one case of each kind
#   benchmarks/run_gpu.sh minutes_bf16           another group of at most ten minutes; --list names and times them
#   benchmarks/run_gpu.sh train decode/1b        cases whose names begin so, as many as fit into --budget seconds
#   benchmarks/run_gpu.sh --dry-run              the same programs at toy sizes, on any machine
# Wheels that benchmarks/gpu/carry.sh left in wheels/ are installed for this run only.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "wheels/*.whl" >/dev/null; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  if "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl; then
    export PYTHONPATH="$PYTHONPATH:$site"
  else
    echo "the wheels in wheels/ do not fit this Python; going on without them" >&2
  fi
fi
"$python" -m benchmarks.gpu.run "$@"
