"""The model that an agent talks to: an endpoint, a checkpoint of this machine, or a script.

--model script:FILE     replies of a file (`rome.agent.scripted`)
--model DIR             `rome serve` is started for it, and ends with the agent
--model NAME            what the API at --endpoint calls it
"""

import os
import pathlib
import secrets
import selectors
import signal
import subprocess
import sys
import time
from typing import Protocol

from rome.agent.model import Model, ModelError
from rome.agent.openai_model import OpenAIModel, Shown
from rome.agent.scripted import ScriptedModel
from rome.text.render import Renderer
from rome.text.tokenizer import Tokenizer

SCRIPT = "script:"
_START = 600.0  # seconds until a checkpoint has to be up
# Whatever ends this process, the kernel ends the server (PR_SET_PDEATHSIG).
_SERVE = """
import ctypes, sys
from rome.cli import main
ctypes.CDLL(None).prctl(1, 15)
sys.exit(main(sys.argv[1:]))
"""


class Opened(Model, Protocol):
  """A model that is to be closed."""

  shown: Shown | None

  def close(self) -> None:
    """Ends what it holds."""


def open_model(
  model: str, endpoint: str, key: str, context: int, shown: Shown | None
) -> tuple[Opened, str]:
  """Opens a model.

  Args:
    model, endpoint: as said above.
    key: of the endpoint, "" for none.
    context: tokens of a request and its reply, which a checkpoint is served with.
    shown: gets replies in pieces, None for whole ones.
  Returns:
    The model, and what requests call it.
  Raises:
    ModelError: it cannot be had; the message says what to change.
  """
  if model.startswith(SCRIPT):
    return ScriptedModel.load(model.removeprefix(SCRIPT), shown), "script"
  if not endpoint and pathlib.Path(model).exists():
    return Served(model, context, shown), Served.NAME
  if not endpoint:
    raise ModelError(f"there is no directory {model!r}; for a model of an API, give its --endpoint")
  return OpenAIModel(endpoint, key, shown), model


def open_renderer(model: str, endpoint: str, tokenizer: str) -> Renderer | None:
  """What counts the tokens of a conversation exactly, None where they are estimated.

  Args:
    model, endpoint: as said above.
    tokenizer: where the model's is, "" for the checkpoint's own.
  Raises:
    ValueError: `tokenizer` cannot be read, or its template refuses what a context needs.
  """
  own = not endpoint and not model.startswith(SCRIPT) and pathlib.Path(model).exists()
  path = tokenizer or (model if own else "")
  if not path:
    return None
  try:
    renderer = Renderer(Tokenizer.from_dir(path))
    renderer.extend([{"role": "tool", "tool_call_id": "call", "content": "."}])
  except ValueError as error:
    if tokenizer:
      raise ValueError(f"tokenizer: {error}; leave it out to have tokens estimated") from None
    return None  # `rome serve` says what is wrong, or its way of rendering is not refused
  return renderer


class Served(OpenAIModel):
  """A checkpoint behind a server of its own, which dies with this process."""

  NAME = "checkpoint"

  def __init__(self, path: str, context: int, shown: Shown | None):
    key = secrets.token_hex(16)
    command = [sys.executable, "-c", _SERVE, "serve", "--model", path, "--name", self.NAME]
    self._process = subprocess.Popen(
      [*command, "--port", "0", "--slots", "2", "--max_length", str(context)],
      env={**os.environ, "ROME_API_KEY": key},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      start_new_session=True,  # Ctrl-C is the agent's
    )
    try:
      super().__init__(self._address(), key, shown)
    except BaseException:
      self._end()
      raise

  def close(self) -> None:
    super().close()
    self._end()

  def _address(self) -> str:
    """Waits for the line that names it."""
    assert self._process.stdout is not None and self._process.stderr is not None
    os.set_blocking(self._process.stderr.fileno(), False)
    deadline = time.monotonic() + _START
    with selectors.DefaultSelector() as selector:
      selector.register(self._process.stdout, selectors.EVENT_READ)
      while time.monotonic() < deadline:
        if not selector.select(1.0):
          continue
        line = self._process.stdout.readline().decode(errors="replace")
        if not line:
          self._process.wait(timeout=30)
          said = (self._process.stderr.read() or b"").decode(errors="replace").strip()
          last = said.splitlines()[-1] if said else f"status {self._process.returncode}"
          raise ModelError(f"the checkpoint cannot be served: {last}")
        if line.startswith("serving "):
          return line.split(" on ")[1].split()[0] + "/v1"
    raise ModelError(f"the checkpoint was not up in {_START:g} s")

  def _end(self) -> None:
    if self._process.poll() is None:
      self._process.send_signal(signal.SIGTERM)
      try:
        self._process.wait(timeout=5)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()
    for stream in (self._process.stdout, self._process.stderr):
      if stream is not None:
        stream.close()
