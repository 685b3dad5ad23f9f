"""The one tool layer: every call, whatever its tool, goes through these steps.

  known? -> arguments fit the schema? -> gates (hooks, permission) -> run -> observers (hooks)

What goes wrong on the way is a result that the model can act on, in one line that names the
argument. Calls of one reply that may run beside each other do, in the order of the reply as far as
anybody can see; results come in that order.
"""

import concurrent.futures as cf
import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jsonschema

from rome.agent.model import Call, ModelReply, ModelRequest
from rome.agent.tools.base import MODEL, Tool, ToolResult

MAX_CALLS = 16  # of one reply
MAX_ARGUMENTS = 1 << 20  # characters of one call
_THREADS = 8

# Says what becomes of a call before it runs: None to go on, or the result in its place.
Gate = Callable[[Tool, dict[str, Any]], ToolResult | None]
# Sees a result and may replace it.
Observer = Callable[[Tool, dict[str, Any], ToolResult], ToolResult]
Results = Generator[ModelRequest, ModelReply, list[ToolResult]]


class Executor:
  """Runs calls.

  Args:
    tools: what there is; names are unique.
    gates: asked in order; the first answer counts.
    observers: shown every result of a tool that ran, in order.
    max_calls: calls of one reply that are run; the rest is told so.
  """

  def __init__(
    self,
    tools: Sequence[Tool],
    gates: Sequence[Gate] = (),
    observers: Sequence[Observer] = (),
    max_calls: int = MAX_CALLS,
  ):
    self.tools = {tool.name: tool for tool in tools}
    if len(self.tools) < len(tools):
      names = [tool.name for tool in tools]
      twice = sorted({name for name in names if names.count(name) > 1})
      raise ValueError(f"two tools have the same name: {', '.join(twice)}")
    self._validators = {
      name: jsonschema.Draft202012Validator(dict(tool.parameters))
      for name, tool in self.tools.items()
    }
    self._gates, self._observers, self._max_calls = gates, observers, max_calls

  def schemas(self) -> list[dict[str, Any]]:
    """Of all tools, as a request has them."""
    return [tool.schema() for tool in self.tools.values()]

  def run(self, calls: Sequence[Call]) -> Results:
    """Runs the calls of one reply; a generator, as some tools ask the model.

    Returns:
      A result for each call, in order.
    Raises:
      SandboxError: the infrastructure failed.
    """
    results: list[ToolResult | None] = [None] * len(calls)
    beside: dict[cf.Future[ToolResult], int] = {}
    several = len(calls) > 1
    with cf.ThreadPoolExecutor(_THREADS, "tool") if several else _nothing() as pool:
      for i, call in enumerate(calls):
        if i >= self._max_calls:
          text = f"not run: a reply may have {self._max_calls} calls; call again for the rest"
          results[i] = ToolResult(text, "skipped")
          continue
        ready = self._prepare(call)
        if isinstance(ready, ToolResult):
          results[i] = ready
          continue
        tool, arguments = ready
        if several and tool.parallel:
          beside[pool.submit(self._work, tool, arguments)] = i
          continue
        self._gather(beside, results)  # what came before it has ended before it begins
        if tool.kind == MODEL:
          asking = tool.run(arguments)
          assert not isinstance(asking, ToolResult)
          results[i] = self._observed(tool, arguments, (yield from asking))
        else:
          results[i] = self._work(tool, arguments)
      self._gather(beside, results)
    return [result for result in results if result is not None]

  def _gather(self, beside: dict[cf.Future[ToolResult], int], results: list) -> None:
    for future, i in beside.items():
      results[i] = future.result()
    beside.clear()

  def _prepare(self, call: Call) -> tuple[Tool, dict[str, Any]] | ToolResult:
    """The tool and its arguments, or the result where it does not come to that."""
    tool = self.tools.get(call.name)
    if tool is None:
      known = ", ".join(self.tools)
      return ToolResult(f"error: no tool {call.name[:64]!r}; there are: {known}", "unknown_tool")
    arguments = self._arguments(tool, call.arguments)
    if isinstance(arguments, ToolResult):
      return arguments
    for gate in self._gates:
      if (verdict := gate(tool, arguments)) is not None:
        return verdict
    return tool, arguments

  def _arguments(self, tool: Tool, text: str) -> dict[str, Any] | ToolResult:
    if len(text) > MAX_ARGUMENTS:
      why = f"its arguments have {len(text)} characters, at most {MAX_ARGUMENTS} may be"
      return ToolResult(f"error: {tool.name}: {why}", "invalid_arguments")
    try:
      found = json.loads(text or "{}", parse_constant=_refuse)
    except (RecursionError, ValueError) as error:
      why = f"its arguments are no JSON: {str(error)[:200]}"
      return ToolResult(f"error: {tool.name}: {why}", "invalid_arguments")
    try:
      wrong = next(iter(self._validators[tool.name].iter_errors(found)), None)
    except Exception as error:  # a schema of somebody else's, with references in a circle
      text = f"error: {tool.name}: its schema cannot be applied: {type(error).__name__}"
      return ToolResult(text, "error")
    if wrong is not None:
      where = "".join(f".{part}" for part in wrong.absolute_path)
      wanted = ", ".join(tool.parameters.get("properties", ()))
      why = f"arguments{where}: {wrong.message[:300]}; it takes: {wanted or 'nothing'}"
      return ToolResult(f"error: {tool.name}: {why}", "invalid_arguments")
    return found

  def _work(self, tool: Tool, arguments: dict[str, Any]) -> ToolResult:
    result = tool.run(arguments)
    assert isinstance(result, ToolResult)
    return self._observed(tool, arguments, result)

  def _observed(self, tool: Tool, arguments: dict[str, Any], result: ToolResult) -> ToolResult:
    for observer in self._observers:
      result = observer(tool, arguments, result)
    return result


def _refuse(value: str) -> None:
  """NaN passes every bound of a schema."""
  raise ValueError(f"{value} is no JSON")


class _nothing:
  """In place of a pool where there is one call."""

  def __enter__(self) -> Any:
    return None

  def __exit__(self, *_: object) -> None:
    pass
