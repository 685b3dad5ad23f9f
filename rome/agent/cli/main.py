"""Options of `rome agent`."""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rome.agent.cli import headless
from rome.agent.cli.headless import ERROR, FORMATS, STOPPED, USAGE
from rome.agent.cli.place import KINDS

if TYPE_CHECKING:
  from rome.agent.sessions import Session

MODES = ("plan", "ask", "auto", "full")
_NEEDED = ("jsonschema", "openai", "prompt_toolkit", "rich", "yaml")
_EPILOG = """\
Exit codes of -p: 0 answered, 1 error, 2 bad usage, 3 a limit was reached, 130 interrupted.
The agent works in the current directory, behind bubblewrap: what it writes there stays, of the
rest of the machine it sees programs alone, and no network. ROME_AGENT_MODEL and
ROME_AGENT_ENDPOINT stand for --model and --endpoint. docs/guides/agent.md tells more."""


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
  env = os.environ.get
  add("--model", default=env("ROME_AGENT_MODEL", ""), help="NAME, DIR of a checkpoint, script:FILE")
  add(
    "--endpoint",
    default=env("ROME_AGENT_ENDPOINT", ""),
    metavar="URL",
    help="OpenAI-compatible API",
  )
  add(
    "--api-key-variable",
    default="OPENAI_API_KEY",
    metavar="NAME",
    help="where the key is (%(default)s)",
  )
  add("--max-tokens", type=_positive, default=4096, metavar="N", help="of a reply (%(default)s)")
  add("--context", type=_positive, default=32768, metavar="N", help="tokens in all (%(default)s)")
  add("--temperature", type=float, metavar="T", help="of sampling (the endpoint's own)")
  add(
    "--max-turns", type=_positive, default=100, metavar="N", help="of one instruction (%(default)s)"
  )
  add("--permission-mode", choices=MODES, default="ask", help="what runs unasked (%(default)s)")
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
  add("--i_accept_no_isolation", action="store_true", help="for --sandbox=none")
  add("--read", action="append", default=[], metavar="PATH", help="show this too, read-only")
  add(
    "--allow-host", action="append", default=[], metavar="HOST:PORT", help="reachable from inside"
  )
  return made


def _run(options: argparse.Namespace) -> int:
  from rome.agent.cli.conversation import SYSTEM, Conversation, Plan
  from rome.agent.cli.models import open_model
  from rome.agent.cli.place import open_place
  from rome.agent.cli.terminal import Terminal
  from rome.agent.loop import Limits
  from rome.agent.model import ModelSettings

  if options.export:
    return _export(options)
  instruction = _instruction(options)
  if not options.model:
    raise ValueError(
      "no model: give --model NAME and --endpoint URL of an OpenAI-compatible API, "
      "--model DIR of a checkpoint, or --model script:FILE"
    )
  view = headless.Headless(options.output) if options.print is not None else Terminal()
  streams = options.print is None or options.output == "stream-json"
  with contextlib.ExitStack() as stack:
    key = os.environ.get(options.api_key_variable, "")
    model, name = open_model(options.model, options.endpoint, key, view.piece if streams else None)
    stack.callback(model.close)
    sandbox = stack.enter_context(open_place(options))
    session = stack.enter_context(_session(options, name))
    plan = Plan(
      ModelSettings(name, options.max_tokens, options.temperature),
      options.context,
      Limits(options.max_turns),
      options.permission_mode,
      tuple(filter(None, options.tools.split(","))),
      _system(options.system) or SYSTEM,
      options.print is None,
    )
    conversation = Conversation(plan, sandbox, model, session, view)
    stack.callback(conversation.close)
    stack.callback(lambda: conversation.session.close())  # it may have become another
    if isinstance(view, headless.Headless):
      return headless.run(conversation, instruction, options.output, view)
    return view.run(conversation)


def _instruction(options: argparse.Namespace) -> str:
  if options.print is None:
    if not sys.stdin.isatty():
      raise ValueError("this is no terminal: give -p TEXT, or -p - for an instruction on stdin")
    return ""
  text = sys.stdin.read() if options.print == "-" else options.print
  if not text.strip():
    raise ValueError("the instruction is empty")
  return text


def _system(text: str) -> str:
  return pathlib.Path(text[1:]).read_text() if text.startswith("@") else text


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
  except json.JSONDecodeError as error:
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
