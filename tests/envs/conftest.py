"""Sandboxes for the tests: one a backend, reset before each test. A missing backend fails."""

import tempfile

import pytest

from rome.envs.sandbox import make_sandbox

PODMAN = pytest.param("podman", marks=pytest.mark.slow)


@pytest.fixture
def own_runtime_dir(monkeypatch):
  """A directory for sandboxes into which no other process looks, for those that count sweeps."""
  with tempfile.TemporaryDirectory(dir="/tmp", prefix="rome-test-") as path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", path)
    yield


@pytest.fixture(scope="session")
def sandboxes():
  """Starts the sandbox of a backend at its first use."""
  started = {}

  def get(backend):
    if backend not in started or not started[backend].alive():
      started[backend] = make_sandbox(backend=backend, accept_no_isolation=backend == "process")
    started[backend].reset()
    return started[backend]

  yield get
  for sandbox in started.values():
    sandbox.close()


@pytest.fixture(params=[PODMAN, "bubblewrap", "process"])
def sandbox(request, sandboxes):
  return sandboxes(request.param)


@pytest.fixture(params=[PODMAN, "bubblewrap"])
def isolated(request, sandboxes):
  return sandboxes(request.param)
