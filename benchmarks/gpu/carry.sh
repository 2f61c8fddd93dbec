#!/usr/bin/env bash
# Fills carried/ with what a machine without a network needs besides this repository (git ignores it; let it travel along):
# wheels for Python 3.12 on x86-64 Linux of what scripts/pretrain.py needs and the machine lacks, a corpus with its
# tokenizer, and the compilation cache of an earlier call on that kind of machine, from the folder given as argument.
# The machine is taken to have jax, flax, optax, orbax, tokenizers, safetensors, pyarrow, matplotlib, torch, transformers.
#   bash benchmarks/gpu/carry.sh [FOLDER WITH cache.tar.*]
set -euo pipefail
cache="${1:+$(realpath "$1")}"
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
rm -rf carried && mkdir carried # two versions of a package would stop the whole installation
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64
  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" -d carried \
  tensorflow-datasets array_record dm-tree immutabledict simple-parsing docstring-parser tensorflow-metadata \
  googleapis-common-protos termcolor toml importlib-resources grain portpicker zstandard
"$python" -m pip wheel -q --no-deps -w carried promise # has no wheel of its own
PYTHONPATH="$PWD" "$python" -m benchmarks.gpu.corpus carried
if [ -n "$cache" ]; then cp "$cache"/cache.tar.* carried/; fi
du -sh carried
