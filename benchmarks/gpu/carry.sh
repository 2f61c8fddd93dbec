#!/usr/bin/env bash
# Fills carried/ with what a machine without a network needs besides this repository (git ignores it; let it travel along):
# wheels for Python 3.12 on x86-64 Linux of what scripts/pretrain.py needs and the machine lacks, and a corpus with its
# tokenizer; those that are there already stay (remove carried/ to get them again). From the folder given as argument,
# the $OUT of an earlier call on that kind of machine, it takes the compilation cache, and the results into
# benchmarks/results, so that `run_gpu.sh next` leaves out what was measured.
# The machine is taken to have jax, flax, optax, orbax, tokenizers, safetensors, pyarrow, matplotlib, torch, transformers.
#   bash benchmarks/gpu/carry.sh [FOLDER WITH gpu_*.json AND cache.tar.*]
set -euo pipefail
earlier="${1:+$(realpath "$1")}"
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
if ! compgen -G "carried/*.whl" >/dev/null; then
  new="$(mktemp -d)" # moved at the end, so that an interrupted download is not taken for a whole one
  trap 'rm -rf "$new"' EXIT
  platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$new" \
    tensorflow-datasets array_record dm-tree immutabledict simple-parsing docstring-parser tensorflow-metadata \
    googleapis-common-protos termcolor toml importlib-resources grain portpicker zstandard
  "$python" -m pip wheel -q --no-deps -w "$new" promise # has no wheel of its own
  PYTHONPATH="$PWD" "$python" -m benchmarks.gpu.corpus "$new"
  mkdir -p carried && mv "$new"/* carried/
fi
if [ -n "$earlier" ]; then
  if compgen -G "$earlier/gpu_*.json" >/dev/null; then install -m 644 "$earlier"/gpu_*.json benchmarks/results/; fi
  rm -f carried/cache.tar.* # parts of two caches do not fit together
  if compgen -G "$earlier/cache.tar.*" >/dev/null; then install -m 644 "$earlier"/cache.tar.* carried/; fi
fi
du -sh carried
