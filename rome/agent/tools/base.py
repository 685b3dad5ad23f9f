"""What a tool is, and what comes of a call.

A tool's work never raises for what the model did: bad arguments, missing files and failed commands
are results that the model reads and can act on. `SandboxError` passes through: then the
infrastructure failed and the episode is void.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

from rome.agent.model import ModelReply, ModelRequest

# What a tool does to the world; permission modes look at it.
READ, WRITE, EXECUTE, NETWORK, NOTE, MODEL = "read", "write", "execute", "network", "note", "model"

Asking = Generator[ModelRequest, ModelReply, "ToolResult"]


@dataclasses.dataclass(frozen=True)
class ToolResult:
  """What a call came to.

  Attributes:
    text: what the model reads.
    outcome: "ok", or why not, one word for metrics: "error" (the work failed), "invalid_arguments",
      "unknown_tool", "denied" (permission), "blocked" (a hook), "timeout", "lost" (its server
      died), "skipped" (too many calls at once).
    facts: what context engineering may use and the model does not see: "path" of a file read or
      written, "exit_code", "truncated", "spilled" (path with all of a long output), ...
  """

  text: str
  outcome: str = "ok"
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tool:
  """One tool.

  Attributes:
    name: letters, digits, _ and -, at most 64.
    description: for the model.
    parameters: JSON schema of the arguments, an object.
    run: does the work. Of a tool of kind MODEL it is a generator that asks the model.
    kind: READ (changes nothing), WRITE (files), EXECUTE (commands), NETWORK, NOTE (the agent's own
      todo and memory), MODEL (asks the model).
    parallel: whether calls may run beside others of one reply.
    subject: what a permission rule may match of the arguments, a command or a path.
  """

  name: str
  description: str
  parameters: Mapping[str, Any]
  run: Callable[[dict[str, Any]], ToolResult | Asking]
  kind: str
  parallel: bool = False
  subject: Callable[[Mapping[str, Any]], str] = lambda arguments: ""

  def schema(self) -> dict[str, Any]:
    """As the OpenAI API takes it."""
    function = {
      "name": self.name,
      "description": self.description,
      "parameters": dict(self.parameters),
    }
    return {"type": "function", "function": function}


def parameters(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
  """A schema of arguments by name; nothing else may be given."""
  return {
    "type": "object",
    "properties": {**required, **optional},
    "required": list(required),
    "additionalProperties": False,
  }
