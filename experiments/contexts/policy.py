"""A policy that knows only what a request shows, with the weaknesses that policies have.

It finds its task in the instruction and works unit by unit; a unit is done for it where the unit's
fact is to be seen. Its weaknesses, drawn by seed and by what it sees, never by a hidden state:

  - far from the objective it wanders: where the objective was last said more than `FAR` characters
    ago, it begins to read notes that have nothing to do with it, and goes on doing so;
  - it is stubborn: of most parts that do not answer it asks the same again, until it is told so;
  - its summaries lose things: each fact is kept with probability `KEPT`.

What helps it, where it has it: a todo list, in which it writes down facts, exactly; the pointer in
the place of a long output, which it searches; `recall`; words of the system about files that were
changed, which make it forget what it read there.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.contexts.families import FACT, Task, Unit
from rome.agent.model import Call, ModelReply, ModelRequest

FAR: float = 2500
WANDER, GO_ON = 0.15, 0.7  # probability of beginning to wander, of going on
STUBBORN: float = 0.75  # of parts
KEPT: float = 0.9
UNKNOWN = "unknown"  # value of a fact that a summary says to be stale
NOTE_EVERY = 3  # facts between two notes on the todo list
_POINTER = re.compile(r"all of it is in (\S+) \.\.\.\]")
_CHANGED = re.compile(r"(\S+) \((?:changed|gone)\)")
_WANTED = re.compile(r"WANTED ([a-z ]+)")
_WARNED = ("brought nothing new", "times in a row with the same error")


@dataclasses.dataclass
class View:
  """What a request shows.

  Attributes:
    facts: name -> value, as last seen.
    noted: facts that a todo list or a note of it holds.
    pointers: name of a unit that was done -> file that has its output.
    asked: names that recall was asked for since the context began.
    busy: names of units that did not answer.
    wanted: names that the last unit asks for.
    stale: facts that were changed and not looked at again.
    rewritten: whether turns are gone.
    far: characters since the objective was said.
    warned: whether the last words of the system warn of a loop.
    wandering: whether the last call was of no use.
  """

  facts: dict[str, str]
  noted: set[str]
  pointers: dict[str, str]
  asked: set[str]
  busy: set[str]
  wanted: tuple[str, ...] = ()
  stale: set[str] = dataclasses.field(default_factory=set)
  rewritten: bool = False
  far: int = 0
  warned: bool = False
  wandering: bool = False


class Scripted:
  """Answers the requests of one episode of a task.

  Attributes:
    far, stubborn, kept: `FAR`, `STUBBORN` and `KEPT`.
  """

  far, stubborn, kept = FAR, STUBBORN, KEPT

  def __init__(self, task: Task, seed: int):
    self._task, self._seed = task, seed

  def complete(self, request: ModelRequest) -> ModelReply:
    view = look(self._task, request.messages)
    if request.purpose == "summary":
      return ModelReply(self._summary(view, request))
    tools = {tool["function"]["name"] for tool in request.tools}
    action = self._act(view, tools, request)
    if isinstance(action, str):
      return ModelReply(action)
    tool, arguments = action
    return ModelReply("", (Call("", tool, json.dumps(dict(arguments))),), "tool_calls")

  def _chance(self, request: ModelRequest, what: str, probability: float) -> bool:
    """Drawn by the seed and by how the conversation ends."""
    end = json.dumps([m["content"] for m in request.messages[-2:]]) + str(len(request.messages))
    digest = hashlib.sha256(f"{self._seed} {what} {end}".encode()).hexdigest()
    return random.Random(digest).random() < probability

  def _summary(self, view: View, request: ModelRequest) -> str:
    kept = {n: v for n, v in view.facts.items() if self._chance(request, f"keep {n}", self.kept)}
    words = [f"FACT {name} = {value}" for name, value in kept.items()]
    if view.wanted:
      words.append(f"WANTED {' '.join(view.wanted)}")
    return "Found so far:\n" + "\n".join(words)

  def _act(
    self, view: View, tools: set[str], request: ModelRequest
  ) -> str | tuple[str, Mapping[str, Any]]:
    """The answer, or a call."""
    if view.far > self.far and not view.warned:
      if self._chance(request, "wander", GO_ON if view.wandering else WANDER):
        return "read", {"path": "notes"}
    task = self._task
    if "todo" in tools and len(view.facts.keys() - view.noted) >= NOTE_EVERY:
      return "todo", {"items": self._items(view)}
    unit = self._next(view)
    if unit is None:
      names = view.wanted if task.last else [unit.name for unit in task.units]
      return task.size.answer({name: view.facts.get(name, "?") for name in names})
    return self._do(unit, view, tools, request)

  def _next(self, view: View) -> Unit | None:
    """The first unit whose fact is needed and not to be seen."""
    if self._task.last and view.wanted:
      needed = [unit for unit in self._task.units if unit.name in view.wanted]
    else:
      needed = list(self._task.units)
    if self._task.last and not view.wanted:  # what was passed need not be seen any more
      seen = [i for i, unit in enumerate(needed) if unit.name in view.facts]
      needed = needed[seen[-1] + 1 :] if seen else needed
      needed = needed or [self._task.units[-1]]
    return next((unit for unit in needed if unit.name not in view.facts), None)

  def _do(
    self, unit: Unit, view: View, tools: set[str], request: ModelRequest
  ) -> tuple[str, Mapping[str, Any]]:
    if path := view.pointers.get(unit.name):
      return "shell", {"command": f"grep -h '^.*FACT {unit.name} ' {path}"}
    looked = unit.name in view.asked
    missed = view.rewritten and (not unit.again or (self._task.last and view.wanted))
    if "recall" in tools and missed and not looked:
      return "recall", {"query": f"FACT {unit.name}"}
    if unit.name in view.busy and unit.backup and (view.warned or not self._stubborn(unit)):
      return unit.tool, unit.backup
    return unit.tool, unit.arguments

  def _stubborn(self, unit: Unit) -> bool:
    return random.Random(f"{self._seed} {unit.name}").random() < self.stubborn

  def _items(self, view: View) -> list[dict[str, str]]:
    done = [{"text": f"FACT {n} = {v}", "state": "done"} for n, v in view.facts.items()]
    left = [unit.name for unit in self._task.units if unit.name not in view.facts]
    return done + ([{"text": f"then {left[0]}", "state": "pending"}] if left else [])


def look(task: Task, messages: Sequence[Mapping[str, Any]]) -> View:
  """Reads what a request shows, from its beginning to its end."""
  view = View({}, set(), {}, set(), set())
  of_call = {
    json.dumps(dict(arguments)): unit
    for unit in task.units
    for arguments in (unit.arguments, unit.backup)
    if arguments
  }
  of_path = {str(u.arguments.get("path")): u.name for u in task.units if u.tool == "read"}
  calls: dict[str, tuple[str, dict[str, Any]]] = {}
  for message in messages:
    text = message["content"]
    for call in message.get("tool_calls", ()):
      function = call["function"]
      calls[call["id"]] = function["name"], json.loads(function["arguments"])
    said = task.objective in text
    view.far = len(text) - text.rfind(task.objective) if said else view.far + len(text)
    if message["role"] == "tool":
      _result(view, text, *calls[message["tool_call_id"]], of_call)
      view.warned = False
    elif message["role"] == "user" and not text.startswith(task.objective):
      _words(view, text, of_path)
  return view


def _result(
  view: View, text: str, tool: str, arguments: dict[str, Any], of_call: Mapping[str, Unit]
) -> None:
  """Takes in what a call came to."""
  view.wandering = arguments.get("path") == "notes"
  found = dict(FACT.findall(text))
  if tool == "recall":
    name = arguments["query"].split()[-1]
    view.asked.add(name)
    found = {n: v for n, v in reversed(FACT.findall(text)) if n == name}
  if tool == "todo":
    view.noted = set(found)
  view.facts |= found
  view.stale -= found.keys()
  if wanted := _WANTED.search(text):
    view.wanted = tuple(wanted[1].split())
  command = str(arguments.get("command", ""))
  if command.startswith("grep "):  # what it looked for is not there
    view.pointers = {n: p for n, p in view.pointers.items() if not command.endswith(p)}
  unit = of_call.get(json.dumps(arguments))
  if unit is None:
    return
  view.pointers.pop(unit.name, None)
  if unit.name not in view.facts and (path := _POINTER.search(text)):
    view.pointers[unit.name] = path[1]
  if "busy" in text and unit.name not in view.facts:
    view.busy.add(unit.name)


def _words(view: View, text: str, of_path: Mapping[str, str]) -> None:
  """Takes in what the system says: notes of a compaction, warnings, changes."""
  if "removed from the context" in text:
    view.rewritten = True
    _, _, todo = text.partition("The todo list:")
    found = FACT.findall(text)
    view.stale = {name for name, value in found if value == UNKNOWN}
    view.facts |= {name: value for name, value in found if name not in view.stale}
    view.noted = {name for name, _ in FACT.findall(todo)} - view.stale
    if wanted := _WANTED.search(text):
      view.wanted = tuple(wanted[1].split())
  view.warned = any(words in text for words in _WARNED)
  if "Somebody else changed files" in text:
    for path in _CHANGED.findall(text):
      if path in of_path:
        view.facts.pop(of_path[path], None)
        view.stale.add(of_path[path])
        view.noted.discard(of_path[path])
