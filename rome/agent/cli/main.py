"""Options of `rome agent`."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from rome.agent.cli import headless
from rome.agent.cli.headless import ERROR, FORMATS, STOPPED, USAGE
from rome.agent.cli.place import KINDS

if TYPE_CHECKING:
  from rome.agent.assemble import Parts
  from rome.agent.cli.terminal import Terminal
  from rome.agent.hooks import Hooks
  from rome.agent.mcp import Servers
  from rome.agent.sessions import Session
  from rome.agent.settings import AgentSettings

MODES = ("plan", "ask", "auto", "full")
# Options that are settings (`rome.agent.settings`).
_FLAGS = {
  "model": "model",
  "endpoint": "endpoint",
  "api_key_variable": "api_key_variable",
  "max_tokens": "max_tokens",
  "context": "context_tokens",
  "temperature": "temperature",
  "max_turns": "limits.turns",
  "permission_mode": "permissions.mode",
}
_NEEDED = ("jsonschema", "openai", "prompt_toolkit", "rich", "yaml")
_EPILOG = """\
Exit codes of -p: 0 answered, 1 error, 2 bad usage, 3 a limit was reached, 130 interrupted.
The agent works in the current directory, behind bubblewrap: what it writes there stays, of the
rest of the machine it sees programs alone, and no network. What is not said here comes from the
environment (ROME_AGENT_MODEL, ...), .rome/agent.toml and ~/.rome/agent.toml;
docs/guides/agent.md tells more."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the subcommand.

  Args:
    argv: arguments without the program's name; sys.argv where None.
  Returns:
    The exit code, see `_EPILOG`.
  """
  options = parser().parse_args(argv)
  missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
  if missing:
    headless.fail(f"needs {', '.join(missing)}: pip install 'rome[agent]'", "text")
    return ERROR
  from rome.agent.atif import AtifError
  from rome.agent.model import ModelError
  from rome.agent.sessions import SessionError
  from rome.envs.common import SandboxError

  output = options.output if options.print is not None else "text"
  try:
    return _run(options)
  except (AtifError, SessionError, ValueError) as error:
    headless.fail(str(error), output)
    return USAGE
  except (ModelError, SandboxError, OSError) as error:
    headless.fail(str(error), output)
    return ERROR
  except KeyboardInterrupt:
    print("rome agent: interrupted", file=sys.stderr)
    return STOPPED


def parser() -> argparse.ArgumentParser:
  """Of the options."""
  made = argparse.ArgumentParser(
    prog="rome agent",
    description="An agent that works in the current directory.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add(
    "-p",
    "--print",
    nargs="?",
    const="-",
    metavar="TEXT",
    help="one instruction, then end; -: stdin",
  )
  add("--output", choices=FORMATS, default="text", help="of -p (%(default)s)")
  add("--model", metavar="MODEL", help="NAME of the endpoint's, DIR of a checkpoint, script:FILE")
  add("--endpoint", metavar="URL", help="an OpenAI-compatible API")
  add("--api-key-variable", metavar="NAME", help="environment variable with the key")
  add("--max-tokens", type=_positive, metavar="N", help="of a reply")
  add("--context", type=_positive, metavar="N", help="tokens of a request and its reply together")
  add("--temperature", type=float, metavar="T", help="of sampling")
  add("--max-turns", type=_positive, metavar="N", help="of one instruction")
  add("--permission-mode", choices=MODES, help="what runs unasked")
  add("--tools", default="", metavar="NAMES", help="those to have, with commas (all)")
  add("--system", default="", metavar="TEXT", help="the system prompt, @FILE for a file's")
  add(
    "--continue", dest="go_on", action="store_true", help="with this directory's last conversation"
  )
  add("--resume", default="", metavar="ID", help="with another one")
  add("--export", default="", metavar="FILE", help="write a conversation as ATIF, and end")
  add("--import", dest="imported", default="", metavar="FILE", help="go on with one from ATIF")
  add("--sandbox", choices=KINDS, default="bubblewrap", help="(%(default)s)")
  add("--image", default="", help="of --sandbox=podman")
  add("--trust", action="store_true", help="let the directory's .rome/agent.toml say all it says")
  add("--i_accept_no_isolation", action="store_true", help="for --sandbox=none")
  add("--read", action="append", default=[], metavar="PATH", help="show this too, read-only")
  add(
    "--allow-host", action="append", default=[], metavar="HOST:PORT", help="reachable from inside"
  )
  return made


def _run(options: argparse.Namespace) -> int:
  from rome.agent.assemble import make_hooks
  from rome.agent.cli.conversation import Conversation
  from rome.agent.cli.models import open_model, open_renderer
  from rome.agent.cli.place import open_place
  from rome.agent.cli.planted import Planted
  from rome.agent.cli.terminal import Terminal
  from rome.agent.mcp import Servers

  if options.export:
    return _export(options)
  instruction = _instruction(options)
  view = headless.Headless(options.output) if options.print is not None else Terminal()
  settings = _settings(options, view)
  if not settings.model:
    raise ValueError(
      "no model: give --model NAME and --endpoint URL of an OpenAI-compatible API, "
      "--model DIR of a checkpoint, or --model script:FILE"
    )
  shown = view.piece if options.print is None or options.output == "stream-json" else None
  with contextlib.ExitStack() as stack:
    before = signal.signal(signal.SIGHUP, _hung_up)
    stack.callback(signal.signal, signal.SIGHUP, before)
    renderer = open_renderer(settings.model, settings.endpoint, settings.tokenizer)
    key = os.environ.get(settings.api_key_variable, "")
    model, name = open_model(settings.model, settings.endpoint, key, settings.context_tokens, shown)
    stack.callback(model.close)
    setting_up = make_hooks(settings, os.getcwd(), warn=view.note).fire("SetUpEnvironment")
    if refused := setting_up.blocked:
      raise ValueError(f"a hook refuses the environment: {refused}")
    planted = Planted(os.getcwd())
    stack.callback(planted.tell, view.note)  # once more when the sandbox, and all in it, has ended
    sandbox = stack.enter_context(open_place(options))
    servers = stack.enter_context(Servers(settings.mcp))
    for note in servers.notes:
      view.note(note)
    session = stack.enter_context(_session(options, name))
    hooks = make_hooks(settings, os.getcwd(), session.id, view.note)
    conversation = Conversation(
      dataclasses.replace(settings, model=name),
      sandbox,
      model,
      session,
      view,
      planted,
      dataclasses.replace(_parts(settings, hooks, servers), renderer=renderer),
      "" if options.system.startswith("@") else options.system,
      options.print is None,
    )
    stack.callback(conversation.close)
    stack.callback(lambda: conversation.session.close())  # it may have become another
    if isinstance(view, headless.Headless):
      return headless.run(conversation, instruction, options.output, view)
    return view.run(conversation)


def _settings(options: argparse.Namespace, view: "headless.Headless | Terminal") -> "AgentSettings":
  """Of all layers; of what a directory's file says for somebody's consent, a person is asked."""
  from rome.agent.settings import consent, load

  flags = {key: value for key in _FLAGS if (value := getattr(options, key)) is not None}
  flags = {_FLAGS[key]: value for key, value in flags.items()}
  if options.tools:
    flags["tools.only"] = [name for name in options.tools.split(",") if name]
  if options.system.startswith("@"):
    flags["system_prompt"] = os.path.abspath(options.system[1:])
  loaded = load(os.getcwd(), flags, trust=options.trust)
  if loaded.withheld and not isinstance(view, headless.Headless):
    said = json.dumps(loaded.withheld.sections, indent=1, default=str)
    if view.confirm(f"{loaded.withheld.file} says this; is it to count?\n{said}"):
      consent(loaded.withheld)
      loaded = load(os.getcwd(), flags)
  for note in loaded.notes:
    view.note(note)
  return loaded.settings


def _parts(settings: "AgentSettings", hooks: "Hooks", servers: "Servers") -> "Parts":
  """Plugs of the settings and of the directory."""
  from rome.agent.assemble import Parts
  from rome.agent.memory import memory
  from rome.agent.workflows import read_agents

  cwd = os.getcwd()
  return Parts(
    hooks=hooks,
    tools=servers.tools(),
    agents=list(read_agents(cwd).values()),
    memory=memory(cwd) if settings.memory else "",
  )


def _hung_up(number: int, frame: FrameType | None) -> None:
  """The terminal is gone: end in order, so that nothing is left."""
  raise SystemExit(128 + number)


def _instruction(options: argparse.Namespace) -> str:
  if options.print is None:
    if not sys.stdin.isatty():
      raise ValueError("this is no terminal: give -p TEXT, or -p - for an instruction on stdin")
    return ""
  text = sys.stdin.read() if options.print == "-" else options.print
  if not text.strip():
    raise ValueError("the instruction is empty")
  return text


@contextlib.contextmanager
def _session(options: argparse.Namespace, model: str) -> Iterator["Session"]:
  from rome.agent import sessions

  cwd = os.getcwd()
  if options.imported:
    records = _imported(options.imported)
    with sessions.Session.create(model, cwd, imported=records[0].get("id", "")) as session:
      session.write("messages", messages=sessions.repaired(records))
      yield session
  elif options.go_on or options.resume:
    with sessions.Session.resume(sessions.find(options.resume, cwd)) as session:
      yield session
  else:
    with sessions.Session.create(model, cwd) as session:
      yield session


def _imported(path: str) -> list[dict]:
  from rome.agent.atif import from_atif

  try:
    return from_atif(json.loads(pathlib.Path(path).read_text()))
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{path} is no JSON: {error}") from error


def _export(options: argparse.Namespace) -> int:
  from rome.agent import sessions
  from rome.agent.atif import to_atif
  from rome.files import write_atomic

  records = sessions.load(sessions.find(options.resume, os.getcwd()))
  text = json.dumps(to_atif(records), ensure_ascii=False, indent=1)
  write_atomic(pathlib.Path(options.export), text.encode("utf-8", "surrogatepass"))
  print(f"{records[0]['id']} is in {options.export}")
  return 0


def _positive(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be a number of at least 1, not {text!r}")
  return int(text)
