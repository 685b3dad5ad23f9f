"""One episode of a task with some techniques on, in a sandbox of its own."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

from experiments.contexts import families, vocabulary
from experiments.contexts.families import FAMILIES, Size, Task, filler
from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, Skill
from rome.agent.model import Model, ModelSettings
from rome.agent.skills import Compress, Detect, Environment, Lossless, Recall, Remind, Spill
from rome.agent.tools.builtin import builtin_tools
from rome.agent.tools.notes import read_todo
from rome.agent.workspace import Workspace
from rome.envs import Sandbox, make_sandbox
from rome.text import ByteTokenizer, Tokenizer
from rome.text.render import Renderer

TECHNIQUES = (
  "compaction", "lossless", "todo", "reminders", "detection", "environment", "retrieval",
)  # fmt: skip
TURNS = 90
_TOOLS = ("read", "write", "shell")


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large tasks are, and what goes with it.

  Attributes:
    size: of the tasks.
    tokenizer: counts tokens.
    window: tokens of a request and its reply.
    reply: tokens of a reply.
    spill: characters that an output may have, and how many of a longer one are shown.
    lossless: characters that a result of an older turn may keep.
    recall: pieces that an answer of `recall` shows, and characters of each.
    at, goal: shares of the window at which a context is rewritten, and that it then may have.
  """

  size: Size
  tokenizer: Callable[[], Tokenizer]
  window: int
  reply: int
  spill: tuple[int, int]
  lossless: int
  recall: tuple[int, int]
  at: float
  goal: float


LARGE = Scale(families.LARGE, ByteTokenizer, 9000, 500, (1000, 600), 300, (5, 800), 0.8, 0.4)
# For small policies. What comes in a turn is a large part of the window, so it acts early.
SMALL = Scale(families.SMALL, vocabulary.tokenizer, 768, 96, (450, 150), 250, (1, 400), 0.6, 0.45)
SCALES = {"large": LARGE, "small": SMALL}


@dataclasses.dataclass(frozen=True)
class Result:
  """Attributes:
  family, arm, seed: which episode.
  solved: whether the task was.
  reason: how it ended.
  turns: replies.
  rewrites: of the context.
  read, new, sampled: tokens of all requests; of these without what the request before had; of
    all replies (the script's: characters, with calls as JSON).
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


def assemble(workspace: Workspace, on: Collection[str], scale: Scale) -> Loop:
  """A loop with these techniques."""
  recall, environment = Recall(workspace, *scale.recall), Environment(workspace)
  wanted = (*_TOOLS, "todo") if "todo" in on else _TOOLS
  tools = [tool for tool in builtin_tools(workspace) if tool.name in wanted]
  if "retrieval" in on:
    tools.append(recall.tool())
  observers = [Spill(workspace, *scale.spill)] if "lossless" in on else []
  gates = [environment.gate] if "environment" in on else []
  executor = Executor(tools, gates, observers)
  lossless = Lossless(workspace, executor.tools, limit=scale.lossless) if "lossless" in on else None

  def todo() -> str:
    return read_todo(workspace) if "todo" in on else ""

  def archive(messages: Any) -> None:
    if "retrieval" in on:
      recall.archive(messages)

  parts: dict[str, Callable[[], Skill]] = {
    "environment": lambda: environment,
    "detection": lambda: Detect(repeats=2),
    "reminders": lambda: Remind(every=3, todo=todo),
    "compaction": lambda: Compress(
      scale.at, scale.goal, lossless=lossless, todo=todo, archive=archive
    ),
  }
  skills: list[Skill] = [lossless] if lossless else []
  skills += [make() for name, make in parts.items() if name in on]
  context = Context(
    ModelSettings("policy", scale.reply),
    executor.schemas(),
    scale.window,
    Renderer(scale.tokenizer()),
  )
  return Loop(context, executor, Limits(turns=TURNS), skills, "You work in a shell.")


def play(
  family: str, arm: str, seed: int, make_model: Callable[[Task, int], Model], scale: Scale = LARGE
) -> Result:
  """Plays one episode."""
  task = FAMILIES[family](seed, scale.size)
  with _place(task) as workspace:
    loop = assemble(workspace, arms()[arm], scale)
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
      said = len(reply.content) + sum(len(c.name + c.arguments) for c in reply.calls)
      sampled += len(reply.ids) or said
      if changing and any(f"FACT {changing[2]} =" in m["content"] for m in request.messages[-2:]):
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
