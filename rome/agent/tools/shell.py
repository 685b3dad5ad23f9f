"""The shell: one persistent bash, a command at a time.

What a command leaves running goes on and holds nothing up; what it prints later comes with the next
result. Left out: typing at a program that runs (the shell has no terminal, its stdin is closed).
"""

from typing import Any

from rome.agent.tools import show
from rome.agent.tools.base import EXECUTE, Tool, ToolResult, parameters
from rome.agent.workspace import Refused, Workspace

MAX_TIMEOUT = 600  # seconds

_DESCRIPTION = """Runs a command in a bash shell and returns what it prints (stdout and stderr).
Directory, variables and functions last from call to call. There is no terminal and no input:
interactive programs do not work. Start what should go on running with `command > log 2>&1 &`.
A command that takes longer than its timeout is stopped; the shell lives on."""


def shell_tool(workspace: Workspace) -> Tool:
  """The tool `shell`."""

  def run(arguments: dict[str, Any]) -> ToolResult:
    timeout = arguments.get("timeout", workspace.shell_timeout)
    try:
      result = workspace.run(arguments["command"], timeout)
    except Refused as error:
      return ToolResult(f"error: not run: {error}", error.outcome)
    text, cut = show.cut(show.screen(result.output).rstrip("\n"), workspace.shown)
    outcome = "ok"
    if result.timed_out:
      most = workspace.together
      why = f"after {timeout:g} s" if timeout < most else f"at the {most:g} s of a reply's calls"
      text += f"\n[timed out {why} and stopped; the shell lives on]"
      outcome = "timeout"
    elif result.exit_code:
      text += f"\n[exit code {result.exit_code}]"
      outcome = "error"
    facts: dict[str, Any] = {"exit_code": result.exit_code, "truncated": cut or result.truncated}
    if result.truncated and (path := show.spilled(result.output)):
      facts["spilled"] = path
    return ToolResult(text.lstrip("\n") or "[no output]", outcome, facts)

  limit = {
    "type": "number",
    "minimum": 0.1,
    "maximum": MAX_TIMEOUT,
    "description": f"seconds, {workspace.shell_timeout:g} by default",
  }
  command = {"type": "string", "description": "bash, of several lines too"}
  schema = parameters({"command": command}, timeout=limit)
  return Tool("shell", _DESCRIPTION, schema, run, EXECUTE, subject=lambda a: str(a["command"]))
