#!/usr/bin/env bash
# Puts jax's CUDA compiler, of the version of the jax that is installed, into gpu_compiler/ (git ignores it) for
# benchmarks/gpu/compiled.py and tests/structure. Not into the environment: without CUDA, jax would complain of it there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
version="$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("jaxlib"))')"
rm -rf gpu_compiler
"$python" -m pip install -q --no-deps --target gpu_compiler "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version"
du -sh gpu_compiler
