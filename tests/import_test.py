"""What importing rome costs: a sandbox host must not pay for jax, nobody for tensorflow."""

import json
import subprocess
import sys

import pytest

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "chex", "tensorflow", "torch", "matplotlib")


def loaded_modules(statement: str) -> set[str]:
  """Top-level names of the modules that a fresh interpreter holds after `statement`."""
  program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 0, done.stderr
  return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
  "module",
  ["rome", "rome.agent", "rome.cli", "rome.envs", "rome.envs.sandbox", "rome.envs.terminal"]
  + ["rome.evals.metrics", "rome.text", "rome.trajectory"],
)
def test_import_stays_light(module: str):
  assert not loaded_modules(f"import {module}") & set(HEAVY)


def test_the_count_sees_what_it_should():
  assert "jax" in loaded_modules("import rome.ipa")


@pytest.mark.parametrize("module", ["rome.train", "rome.rollout", "rome.models"])
@pytest.mark.slow
def test_training_never_loads_tensorflow(module: str):
  assert not loaded_modules(f"import {module}") & {"tensorflow", "torch"}


def test_gymnasium_environment_is_registered_by_the_import():
  loaded_modules("import rome.envs, gymnasium; gymnasium.spec('rome/Terminal-v0')")
