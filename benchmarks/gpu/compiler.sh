#!/usr/bin/env bash
# Puts jax's CUDA compiler, of the version of the jax that is installed, into gpu_compiler/ (git ignores it) for
# benchmarks/gpu/compiled.py and tests/structure. Not into the environment: without CUDA, jax would complain of it there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
version="$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("jaxlib"))')"
new="$(mktemp -d)"
trap 'rm -rf "$new"' EXIT
"$python" -m pip install -q --no-deps --target "$new" "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version"
rm -rf gpu_compiler && mkdir gpu_compiler && mv "$new"/* gpu_compiler/
du -sh gpu_compiler
