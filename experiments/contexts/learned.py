"""A trained policy in the place of the scripted one: weights, an engine, and nothing else."""

import functools
import os

from experiments.contexts.families import Task
from experiments.contexts.play import SMALL
from rome import models
from rome.agent.managed import read_reply
from rome.agent.model import ModelReply, ModelRequest
from rome.rollout.engine import Engine, Request
from rome.text.render import Renderer


def check(path: str | os.PathLike[str], scale: str) -> None:
  """Raises ValueError: there are no weights that can be read, or they are for another scale."""
  config, _ = models.load(path)
  if scale != "small" or config.vocab_size != SMALL.tokenizer().vocab_size:
    raise ValueError("only weights of experiments.contexts.train, with --scale=small, can be used")


class Learned:
  """Answers the requests of one episode by the most probable tokens.

  Args:
    path: the directory of the weights.
    task, seed: of the episode; it is told nothing of them.
  Raises:
    ValueError: there are no weights that can be read.
  """

  def __init__(self, path: str | os.PathLike[str], task: Task, seed: int):
    self._engine = _engine(os.fspath(path))

  def complete(self, request: ModelRequest) -> ModelReply:
    asked = Request(tuple(request.ids), request.settings.max_tokens, greedy=True)
    self._engine.submit(asked)
    while True:
      for update in self._engine.step():
        if update.reply is not None:
          renderer = Renderer(SMALL.tokenizer())
          return read_reply(renderer, request, update.reply.tokens, _end())


def _end() -> int:
  return SMALL.tokenizer().specials["<|end|>"]


@functools.lru_cache(1)
def _engine(path: str) -> Engine:
  """One for all episodes of a process: prefixes are shared, and nothing else is."""
  config, params = models.load(path)
  engine = Engine(config, slots=1, max_length=SMALL.window, stop_tokens=(_end(),))
  engine.publish(params, 0)
  return engine
