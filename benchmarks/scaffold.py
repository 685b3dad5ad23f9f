"""What the agent's scaffold costs a turn, beside the model and the tools: one JSON line.

  python -m benchmarks.scaffold [--tokens=32768 --episodes=256 --turns=20]

A turn is everything from a reply's arrival to the bytes of the next request: calls read and checked
against the schemas of all built-in tools, the result appended, rendered and counted, skills asked,
the request's ids and its wire made. The model answers at once, the tool gives 400 characters
without work, and all skills are on that need no command of a sandbox; contexts hold `--tokens`.
`wall_ms` is what a turn took, `cpu_ms` its time on a processor, for the byte tokenizer and for a
BPE tokenizer whose template has thinking and tools: `alone`, and `together` with as many episodes
as `--episodes` says, a thread each, as a trainer drives them, whose model takes `--model_seconds`
a reply. `look_ms` is the one command a turn that
`Environment` runs, in a bubblewrap sandbox with 20 files to watch.
"""

import concurrent.futures as cf
import dataclasses
import json
import os
import pathlib
import random
import statistics
import time
from collections.abc import Sequence

from absl import app, flags

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop
from rome.agent.model import Call, Message, ModelReply, ModelSettings
from rome.agent.skills import Compress, Detect, Environment, Lossless, Remind, Spill
from rome.agent.tools.base import Tool, ToolResult
from rome.agent.tools.builtin import builtin_tools
from rome.agent.workspace import Workspace
from rome.envs import make_sandbox
from rome.text import ByteTokenizer, Tokenizer
from rome.text.render import Renderer
from rome.train.summary import provenance

_TOKENS = flags.DEFINE_integer("tokens", 32768, "Of a context.", lower_bound=1000)
_EPISODES = flags.DEFINE_integer("episodes", 256, "At once.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 20, "Timed turns of an episode.", lower_bound=2)
_MODEL_SECONDS = flags.DEFINE_float("model_seconds", 1.0, "A reply, with 256 at once.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the words.")

GOLDENS = pathlib.Path(__file__).parents[1] / "tests" / "text" / "goldens"
_RESULT = 400  # characters
_RESULTS = 64  # different ones
_LOOKS = 50


def bpe() -> Tokenizer:
  """The tokenizer of the tests with a template in the manner of Qwen3."""
  tokenizer = Tokenizer.from_dir(GOLDENS / "tokenizer")
  source = (GOLDENS / "templates" / "thinking.jinja").read_text()
  tokenizer.chat_templates = {"default": source}
  return tokenizer


def words(rng: random.Random, size: int) -> str:
  """Text of so many characters that looks like listings."""
  text = " ".join(
    f"{rng.choice(('src', 'test', 'log'))}/{rng.randrange(9999)}.py" for _ in range(size // 9)
  )
  return text[:size]


class Episode:
  """One conversation with a full context, turn by turn.

  Args:
    tools: those of the executor; their work is nothing.
    workspace: of the skills; no turn touches it.
  """

  def __init__(self, tokenizer: Tokenizer, tools: Sequence[Tool], workspace: Workspace, seed: int):
    self.rng = random.Random(seed)
    self._results = [words(self.rng, _RESULT) for _ in range(_RESULTS)]
    self.tokenizer = tokenizer
    executor = Executor(
      [dataclasses.replace(tool, run=self._result) for tool in tools],
      observers=[Spill(workspace)],
    )
    lossless = Lossless(workspace, executor.tools)
    skills = [lossless, Compress(lossless=lossless), Remind(), Detect(patience=0)]
    limit = 4 * _TOKENS.value
    self.context = Context(ModelSettings("m", 512), executor.schemas(), limit, Renderer(tokenizer))
    self._fill()
    self.loop = Loop(self.context, executor, Limits(turns=1 << 30), skills, "Be brief.")
    self.steps = self.loop.run("Go on.")
    self.request = next(self.steps)

  def _result(self, arguments: dict) -> ToolResult:
    return ToolResult(self.rng.choice(self._results))

  def _call(self, n: int) -> Call:
    return Call(f"call_{n}", "shell", json.dumps({"command": f"grep -rn {words(self.rng, 30)}"}))

  def _fill(self) -> None:
    """A history of `--tokens`."""
    messages: list[Message] = [
      {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Find it."}
    ]  # fmt: skip
    self.context.begin(messages)
    size, n = 0, 0
    while size < _TOKENS.value:
      call = self._call(n)
      new = self.context.reply(self._reply(call))
      result = words(self.rng, _RESULT)
      self.context.append([{"role": "tool", "tool_call_id": new[0].id, "content": result}])
      size, n = self.context.tokens(), n + 1
    self.context.reply(ModelReply("done", ids=(*self.tokenizer.encode("done"),)))

  def _reply(self, call: Call) -> ModelReply:
    text = f"I look. {call.name} {call.arguments}"
    return ModelReply("I look.", (call,), ids=tuple(self.tokenizer.encode(text)))

  def turn(self) -> tuple[float, float]:
    """Seconds of a turn: by the wall, and on a processor."""
    reply = self._reply(self._call(self.context.turns))
    wall, cpu = time.perf_counter(), time.thread_time()
    self.request = self.steps.send(reply)
    self.request.wire()
    tuple(self.request.ids)
    return time.perf_counter() - wall, time.thread_time() - cpu


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
  """Quantiles."""
  ordered = sorted(seconds)
  at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
  return {name: round(1e3 * ordered[int(q * (len(ordered) - 1))], 3) for name, q in at.items()}


def both(times: Sequence[tuple[float, float]]) -> dict:
  walls, cpus = zip(*times, strict=True)
  return {"wall_ms": milliseconds(walls), "cpu_ms": milliseconds(cpus)}


def together(tokenizer: Tokenizer, tools: Sequence[Tool], workspace: Workspace) -> dict:
  """Many episodes, a thread each."""
  n = _EPISODES.value
  episodes = [Episode(tokenizer, tools, workspace, _SEED.value + i) for i in range(n)]

  def play(episode: Episode) -> list[tuple[float, float]]:
    found = []
    for _ in range(_TURNS.value):
      time.sleep(_MODEL_SECONDS.value * episode.rng.uniform(0.5, 1.5))
      found.append(episode.turn())
    return found

  start = time.perf_counter()
  with cf.ThreadPoolExecutor(n) as pool:
    times = [pair for some in pool.map(play, episodes) for pair in some]
  seconds = time.perf_counter() - start
  return {"episodes": n, **both(times), "turns_per_s": round(len(times) / seconds, 1)}


def looks(workspace: Workspace) -> list[float]:
  """Seconds of each look of `Environment`."""
  workspace.run("for i in $(seq 20); do echo $i > f$i; done")
  environment = Environment(workspace)
  environment._watched = {f"{workspace.root}/f{i}": None for i in range(1, 21)}
  times = []
  for _ in range(_LOOKS):
    start = time.perf_counter()
    if environment._look() is None:
      raise RuntimeError("a look told nothing")
    times.append(time.perf_counter() - start)
  return times


def main(_: list[str]) -> None:
  with make_sandbox(None, "bubblewrap") as sandbox:
    workspace = Workspace(sandbox)
    tools = builtin_tools(workspace)
    alone, many = {}, {}
    for name, tokenizer in (("byte", ByteTokenizer()), ("bpe", bpe())):
      episode = Episode(tokenizer, tools, workspace, _SEED.value)
      alone[name] = both([episode.turn() for _ in range(10 * _TURNS.value)])
      many[name] = together(tokenizer, tools, workspace)
    row = {
      "benchmark": "scaffold",
      "tokens": _TOKENS.value,
      "alone": alone,
      "together": many,
      "model_seconds": _MODEL_SECONDS.value,
      "look_ms": round(1e3 * statistics.median(looks(workspace)), 2),
      "seed": _SEED.value,
      **provenance(),
      "load_1min": round(os.getloadavg()[0], 2),
    }
  print(json.dumps(row), flush=True)


if __name__ == "__main__":
  app.run(main)
