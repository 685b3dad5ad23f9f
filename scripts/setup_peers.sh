#!/usr/bin/env bash
# .peers: an environment with the libraries that benchmarks compare with (about 1 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .peers
.peers/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors numpy
