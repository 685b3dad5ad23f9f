"""Strictness for every test: CPU, no rank promotion, fixed seeds, as many devices as asked for."""

import os
import random

# Before anything imports jax: tests never wait for, or depend on, an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _seeds() -> None:
  """Global generators start equal in every test, whatever ran before it."""
  random.seed(0)
  np.random.seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
  if item.get_closest_marker("devices8") and jax.device_count() != 8:
    pytest.fail(
      "needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest "
      f"-m devices8 (here: {jax.device_count()})",
      pytrace=False,
    )
