"""`rome sandbox`: run a command in a fresh sandbox, list the sandboxes here, remove leftovers."""

import argparse
import shutil
import sys
from collections.abc import Sequence

from rome.envs import images_cli, owner
from rome.envs import sandbox as sandbox_lib
from rome.envs.backends import podman_containers

TIMED_OUT = 124  # What timeout(1) exits with.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `rome sandbox ...` and returns the exit status.

  `run` has that of its command, 124 where the time ran out. Otherwise 0, or 2 for bad input or no
  sandbox, with one line on standard error.
  """
  arguments = _parser().parse_args(argv)
  try:
    return arguments.run(arguments)
  except (sandbox_lib.SandboxError, ValueError) as error:
    print(f"rome sandbox: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="rome sandbox", description=__doc__)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  run = commands.add_parser("run", help="start a sandbox, run one command in it, remove it")
  run.add_argument("shell", metavar="COMMAND", help="bash text, quoted as one argument")
  run.add_argument("--image", help="local image with bash; the base image by default")
  run.add_argument(
    "--sandbox", default="auto", choices=["auto", *sandbox_lib.BACKENDS], help="(%(default)s)"
  )
  run.add_argument("--i_accept_no_isolation", action="store_true", help="for --sandbox=process")
  run.add_argument("--timeout", type=float, default=60.0, help="seconds (%(default)s)")
  run.set_defaults(run=_run)
  ps = commands.add_parser("ps", help="sandboxes of this user on this machine, and their owners")
  ps.set_defaults(run=_ps)
  gc = commands.add_parser("gc", help="remove what runs left behind that are no longer alive")
  gc.set_defaults(run=_gc)
  images_cli.add_parser(commands)
  return parser


def _run(arguments: argparse.Namespace) -> int:
  with sandbox_lib.make_sandbox(
    arguments.image,
    arguments.sandbox,
    accept_no_isolation=arguments.i_accept_no_isolation,
  ) as sandbox:
    result = sandbox.run(arguments.shell, arguments.timeout)
  sys.stdout.write(result.output)
  sys.stdout.flush()
  if result.exit_code is None:
    print(f"rome sandbox: stopped after {arguments.timeout:g} s", file=sys.stderr)
    return TIMED_OUT
  return result.exit_code


def _ps(arguments: argparse.Namespace) -> int:
  del arguments
  containers, directories = owned_containers(), owned_directories()
  print(_ROW.format("SANDBOX", "CONTAINER", "OWNER", "STATE"))
  for name, label in sorted({**directories, **containers}.items()):
    pid = label.split(":")[2] if label.count(":") == 3 else "?"
    state = "left over" if owner.is_dead(label) else "in use"
    print(_ROW.format(name, "yes" if name in containers else "no", f"pid {pid}", state))
  return 0


_ROW = "{:20} {:10} {:12} {}"


def owned_containers() -> dict[str, str]:
  """Owner label of every container of this project here; none where there is no Podman."""
  return dict(podman_containers.list_containers()) if shutil.which("podman") else {}


def owned_directories() -> dict[str, str]:
  """Owner label of every sandbox directory of this user; "" where its owner wrote none."""
  found = {}
  for path in owner.runtime_dir().iterdir():
    if path.name.startswith("rome-"):
      try:
        found[path.name] = (path / "owner").read_text()
      except OSError:
        found[path.name] = ""
  return found


def _gc(arguments: argparse.Namespace) -> int:
  del arguments
  swept = sandbox_lib.sweep()
  print("\n".join([*swept, f"{len(swept)} removed"]))
  return 0
