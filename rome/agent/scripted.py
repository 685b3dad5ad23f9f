"""A policy in a file, for tests of what is around a model: `--model script:FILE`.

The file is YAML or JSON: a list of replies that are given in turn, or rules. A reply:

    - text: I look first.              # what it says; "" by default
      calls:                           # its tool calls
      - shell: {command: ls}
      finish: stop                     # or length
      delay: 0.5                       # seconds before it

Rules: the first whose `when`, a regular expression, is found in the last message gives the reply;
`\\1` and the like in texts and arguments stand for the groups found. A rule with `once` serves
once.

    rules:
    - when: "fix (\\w+)"
      calls: [{shell: {command: "cat \\\\1"}}]
    - when: "error"
      once: true
      text: It fails.
    - text: Done.                      # without `when`: always

What it decides depends on nothing but the request. Tokens are counted as words.
"""

import dataclasses
import json
import pathlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rome.agent.model import Call, ModelError, ModelReply, ModelRequest

_KEYS = {"text", "calls", "finish", "delay", "when", "once"}


@dataclasses.dataclass(frozen=True)
class Rule:
  """One reply, and when it is given.

  Attributes:
    text, calls, finish, delay: see the module; calls as pairs of a name and arguments.
    when: what the last message must hold; None: anything.
    once: whether it serves once.
  """

  text: str = ""
  calls: tuple[tuple[str, Any], ...] = ()
  finish: str = "stop"
  delay: float = 0.0
  when: re.Pattern[str] | None = None
  once: bool = False


class ScriptedModel:
  """See the module. Usable from several threads.

  Args:
    rules: in order.
    in_turn: whether they are replies given one after another.
    shown: as of `OpenAIModel`; gets texts word by word.
  """

  def __init__(
    self,
    rules: tuple[Rule, ...],
    in_turn: bool,
    shown: Callable[[str, str], None] | None = None,
  ):
    self.shown = shown
    self._rules, self._in_turn = rules, in_turn
    self._left = list(range(len(rules)))
    self._lock = threading.Lock()

  @classmethod
  def load(cls, path: str, shown: Callable[[str, str], None] | None = None) -> "ScriptedModel":
    """Reads a script.

    Raises:
      ModelError: it cannot be read, or is none; the message names the entry.
    """
    import yaml

    try:
      found = yaml.safe_load(pathlib.Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
      raise ModelError(f"script {path!r} cannot be read: {' '.join(str(error).split())}") from error
    in_turn = isinstance(found, list)
    entries = found if in_turn else found.get("rules") if isinstance(found, dict) else None
    if not isinstance(entries, list):
      raise ModelError(f"script {path!r} must be a list of replies, or have `rules`")
    rules = tuple(
      _rule(entry, f"script {path!r}, entry {i + 1}") for i, entry in enumerate(entries)
    )
    return cls(rules, in_turn, shown)

  def complete(self, request: ModelRequest) -> ModelReply:
    """The reply; see `rome.agent.model.Model`."""
    last = str(request.messages[-1].get("content") or "")
    with self._lock:
      rule, match = self._choose(last, request)
    time.sleep(rule.delay)
    calls = tuple(
      Call(f"script_{i}", name, _arguments(_filled(given, match)))
      for i, (name, given) in enumerate(rule.calls)
    )
    text = str(_filled(rule.text, match))
    if self.shown:
      for word in re.findall(r"\S+\s*|\s+", text):
        self.shown("text", word)
      for call in calls:
        self.shown("call", f"{call.name} {call.arguments}")
    words = len(text.split()) + sum(len(call.arguments.split()) for call in calls)
    prompt = sum(len(str(message.get("content") or "").split()) for message in request.messages)
    return ModelReply(text, calls, rule.finish, prompt, words)

  def close(self) -> None:
    """Nothing is open."""

  def _choose(self, last: str, request: ModelRequest) -> tuple[Rule, re.Match[str] | None]:
    if self._in_turn:
      # By the replies that the request shows, so that a conversation taken up again goes on.
      at = sum(message.get("role") == "assistant" for message in request.messages)
      if at >= len(self._rules):
        raise ModelError(f"the script has {len(self._rules)} replies, and one more is asked for")
      return self._rules[at], None
    for index in self._left:
      rule = self._rules[index]
      match = rule.when.search(last) if rule.when else None
      if rule.when and not match:
        continue
      if rule.once:
        self._left.remove(index)
      return rule, match
    raise ModelError(f"no rule of the script fits the last message: {last[:80]!r}")


def _rule(entry: Any, where: str) -> Rule:
  if not isinstance(entry, dict) or not entry or set(entry) - _KEYS:
    raise ModelError(f"{where} must be a mapping of {', '.join(sorted(_KEYS))}; it is {entry!r}")
  calls = []
  for call in entry.get("calls") or ():
    if not isinstance(call, dict) or len(call) != 1:
      raise ModelError(f"{where}: a call must be one name and its arguments; it is {call!r}")
    calls += list(call.items())
  try:
    return Rule(
      text=str(entry.get("text", "")),
      calls=tuple(calls),
      finish=str(entry.get("finish", "stop")),
      delay=float(entry.get("delay", 0)),
      when=re.compile(entry["when"], re.DOTALL) if "when" in entry else None,
      once=bool(entry.get("once", False)),
    )
  except (re.error, TypeError, ValueError) as error:
    raise ModelError(f"{where}: {error}") from error


def _filled(value: Any, match: re.Match[str] | None) -> Any:
  """The value with the groups of a match in its texts."""
  if match is None:
    return value
  if isinstance(value, str):
    return re.sub(r"\\(\d)", lambda found: match.group(int(found[1])) or "", value)
  if isinstance(value, Mapping):
    return {key: _filled(one, match) for key, one in value.items()}
  return [_filled(one, match) for one in value] if isinstance(value, list) else value


def _arguments(given: Any) -> str:
  """As JSON; a text is taken as it is, so that a script can be wrong."""
  return given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
