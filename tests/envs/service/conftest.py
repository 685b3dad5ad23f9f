"""A real service in a process of its own, with bubblewrap sandboxes and two tenants."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import httpx
import pytest

from rome.envs import remote

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
_QUOTAS = {"alice": "", "bob": "sandboxes = 2\ncpus = 3.0\nmemory_mb = 600\n"}


@dataclasses.dataclass
class Running:
  """A service that runs."""

  url: str
  process: subprocess.Popen
  log: pathlib.Path

  def client(self, token=ALICE, **arguments):
    return remote.Client(self.url, token, **arguments)

  def http(self, token=ALICE):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

  def stop(self, timeout=60):
    """Ends it and returns its status; one that does not end is told to say where it stands."""
    if self.process.poll() is None:
      self.process.send_signal(signal.SIGTERM)
    try:
      return self.process.wait(timeout)
    except subprocess.TimeoutExpired:
      self.process.send_signal(signal.SIGABRT)
      self.process.wait()
      raise AssertionError(f"it did not end within {timeout} s:\n{self.errors()}") from None

  def errors(self):
    """The end of what it logged."""
    return self.log.read_text(errors="replace")[-8000:]


@contextlib.contextmanager
def running(*arguments, environ=None):
  """Starts `rome sandbox serve` on a free port, and ends it whatever happens."""
  command = [sys.executable, "-m", "rome.cli", "sandbox", "serve", "--port=0"]
  environ = {k: v for k, v in os.environ.items() if not k.startswith("ROME_")} | (environ or {})
  with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
    process = subprocess.Popen(
      [*command, "--sandbox=bubblewrap", *arguments],
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
      env=environ | {"PYTHONFAULTHANDLER": "1"},
    )
    service = Running("", process, pathlib.Path(log.name))
    try:
      line = process.stdout.readline()
      found = re.fullmatch(r"serving on (\S+) \(pid (\d+)\)\n", line)
      assert found and int(found[2]) == process.pid, (line, process.poll(), service.errors())
      service.url = found[1]
      yield service
    finally:
      process.stdout.close()
      service.stop()


@pytest.fixture(scope="session")
def tokens_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
  tables = []
  for name, token in (("alice", ALICE), ("bob", BOB)):
    digest = hashlib.sha256(token.encode()).hexdigest()
    tables.append(f'[{name}]\nsha256 = "{digest}"\n{_QUOTAS[name]}')
  path.write_text("\n".join(tables))
  return path


@pytest.fixture(scope="session")
def service(tokens_file):
  with running(f"--tokens={tokens_file}") as found:
    yield found


@pytest.fixture
def client(service):
  with service.client() as found:
    yield found


@pytest.fixture(scope="session")
def _shared(service):
  """One sandbox for the tests that leave it as they found it, or reset it."""
  with service.client() as found, found.create(idle_ttl=3000) as sandbox:
    yield sandbox


@pytest.fixture
def sandbox(_shared):
  _shared.reset()
  return _shared
