#!/usr/bin/env bash
# .cache/libtpu: the TPU compiler for the tests of `rome plan`. Not in .venv, where every jax process would look for a TPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e .cache/libtpu/libtpu/libtpu.so ]; then
  .venv/bin/pip install --quiet --no-deps --upgrade --target .cache/libtpu -c constraints.txt libtpu
fi
