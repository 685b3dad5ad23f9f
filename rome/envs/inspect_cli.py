"""`rome sandbox stats|logs|exec`: a look at sandboxes, of a service or of this machine.

With a URL the service is asked. Without one, `stats` and `exec` speak to the rocklets of this
user's sandboxes here, whoever owns them; state history and network attempts are kept by the
process that owns a sandbox, so `logs` needs a service.
"""

import argparse
import datetime
import os
import secrets
import sys
from typing import TYPE_CHECKING, Any, cast

from rome.envs import owner, session
from rome.envs.common import CommandResult, SandboxError, SandboxLost
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs import network, remote

TIMED_OUT = 124  # What timeout(1) exits with.


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  """Adds the three commands to those of `rome sandbox`."""
  stats = commands.add_parser("stats", help="processes, sessions and bytes of running sandboxes")
  stats.add_argument("sandbox", nargs="?", metavar="SANDBOX", help="all of them by default")
  logs = commands.add_parser("logs", help="a sandbox's states, and what it tried to reach")
  logs.add_argument("sandbox", metavar="SANDBOX")
  execute = commands.add_parser("exec", help="run a command in a running sandbox")
  execute.add_argument("sandbox", metavar="SANDBOX")
  execute.add_argument("shell", metavar="COMMAND", help="bash text, quoted as one argument")
  execute.add_argument("--timeout", type=float, default=60.0, help="seconds (%(default)s)")
  for parser, run in ((stats, _stats), (logs, _logs), (execute, _exec)):
    add_service(parser)
    parser.set_defaults(run=run)


def add_service(parser: argparse.ArgumentParser) -> None:
  """Adds --url and --token."""
  parser.add_argument(
    "--url",
    default=os.environ.get("ROME_SANDBOX_URL"),
    help="of a service ($ROME_SANDBOX_URL); this machine by default",
  )
  parser.add_argument("--token", help="for the service ($ROME_SANDBOX_TOKEN)")


def connect(arguments: argparse.Namespace) -> "remote.Client":
  """A client of the service that the arguments name."""
  from rome.envs import remote

  return remote.Client(arguments.url, arguments.token)


def report(result: CommandResult, timeout: float) -> int:
  """Writes a command's output. Returns the exit status for it."""
  sys.stdout.write(result.output)
  sys.stdout.flush()
  if result.exit_code is None:
    print(f"rome sandbox: stopped after {timeout:g} s", file=sys.stderr)
    return TIMED_OUT
  return result.exit_code


def print_table(rows: list[tuple[str, ...]]) -> None:
  """Prints rows of columns, as wide as they need to be; the first row is the heading."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  for row in rows:
    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    print("  ".join(cells).rstrip())


def print_views(views: list[dict[str, Any]]) -> None:
  """Prints what a service knows of its sandboxes."""
  rows: list[tuple[str, ...]] = [("SANDBOX", "STATE", "IMAGE", "HOST", "SINCE", "REASON")]
  for view in views:
    last = view["history"][-1]
    since = _time(last["time"])
    image = view["image"] or "base image"
    rows.append((view["id"], view["state"], image, view["host"], since, last["reason"]))
  print_table(rows)


def _time(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _stats(arguments: argparse.Namespace) -> int:
  found = _remote_stats(arguments) if arguments.url else _local_stats(arguments.sandbox)
  names = sorted({name for stats in found.values() for name in stats if " " not in name})
  rows: list[tuple[str, ...]] = [("SANDBOX", *(name.upper() for name in names))]
  for sandbox, stats in sorted(found.items()):
    rows.append((sandbox, *(str(stats.get(name, "")) for name in names)))
  print_table(rows)
  return 0


def _remote_stats(arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
  with connect(arguments) as service:
    if arguments.sandbox:
      return {arguments.sandbox: service.get(arguments.sandbox).stats()}
    found = {}
    for view in service.views():
      if view["state"] == "running":
        try:
          found[view["id"]] = service.get(view["id"]).stats()
        except SandboxLost:
          pass  # it has ended meanwhile
    return found


def _local_stats(sandbox: str | None) -> dict[str, dict[str, int]]:
  names = [sandbox] if sandbox else [path.name for path in owner.runtime_dir().glob("rome-*")]
  found = {}
  for name in names:
    try:
      connection = _attach(name)
    except SandboxLost:
      if sandbox:
        raise
      continue  # what does not answer has ended, or is being made
    text = connection.call(client.INFO).data.decode()
    connection.close()
    pairs = (line.split() for line in text.splitlines())
    found[name] = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
  return found


def _attach(name: str) -> client.Connection:
  """A connection to the rocklet of a sandbox of this user."""
  if name not in {path.name for path in owner.runtime_dir().glob("rome-*")}:
    raise SandboxError(f"there is no sandbox {name} here: see `rome sandbox ps`")
  return client.Connection(str(owner.runtime_dir() / name / "sock"), 5.0)


def _logs(arguments: argparse.Namespace) -> int:
  if not arguments.url:
    raise SandboxError(
      "logs are kept by the process that owns a sandbox: name a service with --url"
    )
  with connect(arguments) as service:
    view = service.view(arguments.sandbox)
    running = view["state"] == "running"
    attempts = service.get(arguments.sandbox).attempts() if running else []
  rows: list[tuple[str, ...]] = [("TIME", "EVENT", "WHY")]
  events = [(event["time"], event["state"], event["reason"]) for event in view["history"]]
  for attempt in attempts:
    verdict = "allowed" if attempt.allowed else "refused"
    events.append((attempt.time, f"{attempt.kind} {verdict}", _plain(attempt)))
  rows += [(_time(when), what, why) for when, what, why in sorted(events)]
  print_table(rows)
  return 0


def _plain(attempt: "network.Attempt") -> str:
  """Destination and reason, with whatever could steer a terminal made visible."""
  text = f"{attempt.destination} {attempt.reason}".strip()
  return "".join(char if char.isprintable() else "?" for char in text)


def _exec(arguments: argparse.Namespace) -> int:
  if not arguments.url:
    return report(_local_exec(arguments), arguments.timeout)
  with connect(arguments) as service:
    opened = service.get(arguments.sandbox).session(f"exec-{secrets.token_hex(4)}")
    try:
      result = opened.run(arguments.shell, arguments.timeout)
    finally:
      opened.close()
  return report(result, arguments.timeout)


class _Neighbour:
  """What a session needs of a sandbox that another process owns."""

  def __init__(self, name: str):
    self.id = name

  def _call(self, connection: client.Connection, op: int, *args: Any, **kwargs: Any) -> Any:
    return connection.call(op, *args, **kwargs)


def _local_exec(arguments: argparse.Namespace) -> CommandResult:
  """Runs a command in a session of its own in a sandbox of this user."""
  connection, sandbox = _attach(arguments.sandbox), _Neighbour(arguments.sandbox)
  opened = session.Session(cast(Any, sandbox), connection, "exec")
  try:
    return opened.run(arguments.shell, arguments.timeout)
  finally:
    opened.close()
