"""Strictness for every test: CPU, no rank promotion, fixed seeds, as many devices as asked for.

And for all of them together: a test run leaves no container and no sandbox directory behind.
"""

import os
import pathlib
import random
import time
from collections.abc import Iterator

# Before anything imports jax: tests never wait for, or depend on, an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from rome.envs import SandboxError, owner, sandbox_cli

_BEFORE = pytest.StashKey[set[str]]()

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _seeds() -> None:
  """Global generators start equal in every test, whatever ran before it."""
  random.seed(0)
  np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _programs() -> Iterator[None]:
  """Lets go of compiled programs while there are memory maps left.

  Each holds a few, a process may have 65,530 (vm.max_map_count), and XLA aborts, or faults, where
  it can have no more: a worker that compiles for thousands of tests comes that far.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
    jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
  if item.get_closest_marker("devices8") and jax.device_count() != 8:
    pytest.fail(
      "needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest "
      f"-m devices8 (here: {jax.device_count()})",
      pytrace=False,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """With several workers, files that use sandboxes share one: some sweep what others leave."""
  mentions: dict[object, bool] = {}
  for item in items:
    if item.path not in mentions:
      mentions[item.path] = "sandbox" in item.path.read_text().lower()
    if mentions[item.path]:
      item.add_marker(pytest.mark.xdist_group("sandboxes"))


def _sandboxes() -> dict[str, str]:
  try:
    containers = sandbox_cli.owned_containers()
  except SandboxError:  # Podman is here but does not work; the tests that need it say so.
    containers = {}
  return {**sandbox_cli.owned_directories(), **containers}


def pytest_sessionstart(session: pytest.Session) -> None:
  session.config.stash[_BEFORE] = set(_sandboxes())


def _left_behind(before: set[str]) -> set[str]:
  return {
    name
    for name, label in _sandboxes().items()
    if name not in before and (label == owner.label() or owner.is_dead(label))
  }


@pytest.hookimpl(trylast=True)  # After the workers of pytest-xdist have ended.
def pytest_sessionfinish(session: pytest.Session) -> None:
  """Fails the run where sandboxes of this process, or of processes that are gone, are left.

  Those of other live processes on the machine are none of its business; what another run's tests
  have killed, that run removes soon.
  """
  if hasattr(session.config, "workerinput"):
    return
  before = session.config.stash[_BEFORE]
  end = time.monotonic() + 10.0
  while (ours := _left_behind(before)) and time.monotonic() < end:
    time.sleep(0.5)
  if ours:
    print(f"\nleft behind by the tests: {', '.join(sorted(ours))}")
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
