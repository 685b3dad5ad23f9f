#!/usr/bin/env bash
# The libraries that benchmarks compare with, each in an environment of its own.
#   .peers         torch and transformers (about 1 GB)
#   .peers-swerex  SWE-ReX
#   .peers-rock    ROCK (rl-rock) with what its sessions need
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .peers
.peers/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors numpy
python3 -m venv .peers-swerex
.peers-swerex/bin/pip install --quiet swe-rex==1.4.0
python3 -m venv .peers-rock
.peers-rock/bin/pip install --quiet rl-rock==1.11.0 fastapi uvicorn pexpect bashlex psutil twisted 'numpy<=2.2.6' gem-llm
