"""What tests of skills share: a workspace in a real sandbox, tools over it, a scripted model."""

import contextlib
import json

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, drive
from rome.agent.model import Call, ModelReply, ModelSettings
from rome.agent.workspace import Workspace
from rome.envs import make_sandbox
from rome.text import ByteTokenizer
from rome.text.render import Renderer

BYTES = ByteTokenizer()


@contextlib.contextmanager
def workspace():
  with make_sandbox(None, "bubblewrap") as sandbox:
    place = Workspace(sandbox)
    try:
      yield place
    finally:
      place.close()


def call(name, **arguments):
  return Call("drawn", name, json.dumps(arguments))


def use(name, **arguments):
  return ModelReply("", (call(name, **arguments),))


class Script:
  """A model that gives these replies, callables of the request among them, and keeps requests."""

  def __init__(self, *replies):
    self.replies, self.requests = list(replies), []

  def complete(self, request):
    self.requests.append(request)
    reply = self.replies.pop(0)
    return reply(request) if callable(reply) else reply


def play(executor, skills, *replies, limit=100_000, max_tokens=50, limits=None, renderer=None):
  """An outcome, the requests, the context."""
  script = Script(*replies)
  context = Context(
    ModelSettings("m", max_tokens), executor.schemas(), limit, renderer or Renderer(BYTES)
  )
  loop = Loop(context, executor, limits or Limits(), skills, "Be brief.")
  return drive(loop.run("The objective."), script), script.requests, context


def texts(request):
  return [message["content"] for message in request.messages]


__all__ = [
  "BYTES",
  "Executor",
  "Script",
  "call",
  "play",
  "texts",
  "use",
  "workspace",
]
