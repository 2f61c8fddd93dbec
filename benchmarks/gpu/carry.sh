#!/usr/bin/env bash
# Fills wheels/ with what a machine that has jax, flax, optax, orbax, torch and transformers, but no network, lacks for
# the GPU tests and scripts/pretrain.py. Without pyarrow and matplotlib, for their size: no Parquet files are read there
# and no curve is drawn. For Python 3.12 on x86-64 Linux. Run it where there is a network
# (bash benchmarks/gpu/carry.sh), then carry wheels/ along (git ignores it).
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p wheels && rm -f wheels/*.whl # two versions of a package would stop the whole installation
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64
  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" -d wheels \
  tensorflow-datasets array_record dm-tree immutabledict simple-parsing docstring-parser tensorflow-metadata \
  googleapis-common-protos termcolor toml importlib-resources grain portpicker pydantic==2.12.5 pydantic-core==2.41.5 \
  annotated-types typing-inspection six cloudpickle jaxtyping wadler-lindig wrapt zstandard \
  pytest pluggy iniconfig pygments packaging
"${PYTHON:-python3}" -m pip wheel -q --no-deps -w wheels promise # has no wheel of its own
du -sh wheels
