"""Live servers in processes of their own: a random model of bytes, and SmolLM2."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import httpx
import openai
import pytest

from tests.pretrained import smollm2_gguf

KEY, OTHER = "first-key-of-the-tests", "second-key-of-the-tests"


@dataclasses.dataclass
class Running:
  """A server that runs."""

  url: str
  model: str
  process: subprocess.Popen
  log: pathlib.Path

  def openai(self, key=KEY, **arguments):
    """The official client. Without retries: tests want to see every answer."""
    arguments = {"max_retries": 0, "timeout": 120, **arguments}
    return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **arguments)

  def http(self, key=KEY):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False)

  def gauge(self, name):
    """One of the engine's figures, as /metrics shows it."""
    with self.http() as http:
      text = http.get("/metrics").text
    return float(re.search(rf"^rome_serve_{name}(?:_total)? (\S+)$", text, re.MULTILINE)[1])

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


def command(*arguments):
  return [sys.executable, "-m", "rome.cli", "serve", *arguments]


@contextlib.contextmanager
def running(*arguments):
  """Starts `rome serve` on a free port, waits until it is up, and ends it whatever happens."""
  environ = {k: v for k, v in os.environ.items() if not k.startswith("ROME_")}
  with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
    process = subprocess.Popen(
      command("--port=0", f"--api_key={KEY}", f"--api_key={OTHER}", *arguments),
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
      env=environ | {"PYTHONFAULTHANDLER": "1"},
    )
    server = Running("", "", process, pathlib.Path(log.name))
    try:
      line = process.stdout.readline()
      found = re.fullmatch(r"serving (\S+) on (\S+) \(pid (\d+)\)\n", line)
      assert found and int(found[3]) == process.pid, (line, process.poll(), server.errors())
      server.model, server.url = found[1], found[2]
      yield server
    finally:
      process.stdout.close()
      server.stop()


@pytest.fixture(scope="session")
def micro():
  """A random model of bytes: fast, and every token is possible."""
  with running("--model=micro", "--slots=8", "--max_length=1024", "--max_waiting=128") as found:
    yield found


@pytest.fixture(scope="session")
def smollm2():
  path = smollm2_gguf()
  with running(f"--model={path}", "--name=smollm2", "--slots=4", "--max_length=1024") as found:
    yield found


@pytest.fixture
def client(micro):
  with micro.openai() as found:
    yield found
