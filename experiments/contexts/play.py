"""One episode of a task with some techniques on, in a sandbox of its own."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

from experiments.contexts.families import FAMILIES, Task, filler
from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, Skill
from rome.agent.model import Model, ModelSettings
from rome.agent.skills import Compress, Detect, Environment, Lossless, Recall, Remind, Spill
from rome.agent.tools.builtin import builtin_tools
from rome.agent.tools.notes import read_todo
from rome.agent.workspace import Workspace
from rome.envs import Sandbox, make_sandbox
from rome.text import ByteTokenizer
from rome.text.render import Renderer

TECHNIQUES = (
  "compaction", "lossless", "todo", "reminders", "detection", "environment", "retrieval",
)  # fmt: skip
WINDOW, REPLY, TURNS = 9000, 500, 90
_TOOLS = ("read", "write", "shell")


@dataclasses.dataclass(frozen=True)
class Result:
  """Attributes:
  family, arm, seed: which episode.
  solved: whether the task was.
  reason: how it ended.
  turns: replies.
  rewrites: of the context.
  read, new, sampled: tokens of all requests; of these without what the request before had; of
    all replies, calls as JSON.
  """

  family: str
  arm: str
  seed: int
  solved: bool
  reason: str
  turns: int
  rewrites: int
  read: int
  new: int
  sampled: int


def arms() -> dict[str, frozenset[str]]:
  """Name -> techniques: none, compaction and one more, all but one, all."""
  every = frozenset(TECHNIQUES)
  others = [name for name in TECHNIQUES if name != "compaction"]
  found = {"none": frozenset[str](), "compaction": frozenset({"compaction"})}
  found |= {f"compaction + {name}": frozenset({"compaction", name}) for name in others}
  found |= {f"all - {name}": every - {name} for name in TECHNIQUES}
  return found | {"all": every}


def assemble(workspace: Workspace, on: Collection[str]) -> Loop:
  """A loop with these techniques."""
  recall, environment = Recall(workspace), Environment(workspace)
  wanted = (*_TOOLS, "todo") if "todo" in on else _TOOLS
  tools = [tool for tool in builtin_tools(workspace) if tool.name in wanted]
  if "retrieval" in on:
    tools.append(recall.tool())
  observers = [Spill(workspace, limit=1000, size=600)] if "lossless" in on else []
  gates = [environment.gate] if "environment" in on else []
  executor = Executor(tools, gates, observers)
  lossless = Lossless(workspace, executor.tools, limit=300) if "lossless" in on else None

  def todo() -> str:
    return read_todo(workspace) if "todo" in on else ""

  def archive(messages: Any) -> None:
    if "retrieval" in on:
      recall.archive(messages)

  parts: dict[str, Callable[[], Skill]] = {
    "environment": lambda: environment,
    "detection": lambda: Detect(repeats=2),
    "reminders": lambda: Remind(every=3, todo=todo),
    "compaction": lambda: Compress(lossless=lossless, todo=todo, archive=archive),
  }
  skills = [lossless] if lossless else []
  skills += [make() for name, make in parts.items() if name in on]
  context = Context(
    ModelSettings("policy", REPLY), executor.schemas(), WINDOW, Renderer(ByteTokenizer())
  )
  return Loop(context, executor, Limits(turns=TURNS), skills, "You work in a shell.")


def play(family: str, arm: str, seed: int, make_model: Callable[[Task, int], Model]) -> Result:
  """Plays one episode."""
  task = FAMILIES[family](seed)
  with _place(task) as workspace:
    loop = assemble(workspace, arms()[arm])
    model, steps = make_model(task, seed), loop.run(task.objective)
    read = new = sampled = 0
    before: list[int] = []
    changing = task.change
    request = next(steps)
    while True:
      ids = list(request.ids)
      read += len(ids)
      shared = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), None)
      new += len(ids) - (min(len(ids), len(before)) if shared is None else shared)
      reply = model.complete(request)
      sampled += len(reply.content) + sum(len(c.name + c.arguments) for c in reply.calls)
      if changing and any(changing[2] in str(m["content"]) for m in request.messages[-2:]):
        _somebody(workspace.sandbox, changing[0], changing[1])
        changing = None
      try:
        request = steps.send(reply)
      except StopIteration as end:
        outcome = end.value
        break
      before = ids
    solved = outcome.reason == "answered" and task.solved(outcome.text, workspace.sandbox)
  return Result(
    family, arm, seed, solved, outcome.reason, outcome.turns, loop.context.row, read, new, sampled
  )


@contextlib.contextmanager
def _place(task: Task) -> Iterator[Workspace]:
  with make_sandbox(None, "bubblewrap") as sandbox:
    for path, text in task.files.items():
      sandbox.write_file(path, text.encode())
    sandbox.write_file("notes", filler(random.Random(task.seed), 500).encode())
    workspace = Workspace(sandbox)
    try:
      yield workspace
    finally:
      workspace.close()


def _somebody(sandbox: Sandbox, path: str, text: str) -> None:
  """Another user of the same files."""
  sandbox.write_file(path, text.encode())
