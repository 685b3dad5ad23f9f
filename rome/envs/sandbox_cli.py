"""`rome sandbox`: run a command in a fresh sandbox, serve sandboxes, look at them, clean up.

Here are run, ps and gc; serve is in `serve_cli`, stats, logs and exec in `inspect_cli`.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence

from rome.envs import images_cli, inspect_cli, owner, serve_cli
from rome.envs import sandbox as sandbox_lib
from rome.envs.backends import podman_containers

INTERRUPTED = 130  # 128 + SIGINT, as a shell counts it


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `rome sandbox ...` and returns the exit status.

  `run` and `exec` have that of their command, 124 where the time ran out. Otherwise 0, or 2 for bad
  input or no sandbox, with one line on standard error; 130 after Ctrl-C.
  """
  arguments = _parser().parse_args(argv)
  try:
    return arguments.run(arguments)
  except (sandbox_lib.SandboxError, ValueError) as error:
    print(f"rome sandbox: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("rome sandbox: interrupted", file=sys.stderr)
    return INTERRUPTED


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
  inspect_cli.add_service(run)
  run.set_defaults(run=_run)
  serve_cli.add(commands)
  ps = commands.add_parser("ps", help="sandboxes of a service, or of this user on this machine")
  inspect_cli.add_service(ps)
  ps.set_defaults(run=_ps)
  inspect_cli.add(commands)
  gc = commands.add_parser("gc", help="remove what runs left behind that are no longer alive")
  gc.set_defaults(run=_gc)
  images_cli.add_parser(commands)
  return parser


def _run(arguments: argparse.Namespace) -> int:
  if arguments.url:
    with inspect_cli.connect(arguments) as service, service.create(arguments.image) as remote:
      result = remote.run(arguments.shell, arguments.timeout)
  else:
    with sandbox_lib.make_sandbox(
      arguments.image,
      arguments.sandbox,
      accept_no_isolation=arguments.i_accept_no_isolation,
    ) as sandbox:
      result = sandbox.run(arguments.shell, arguments.timeout)
  return inspect_cli.report(result, arguments.timeout)


def _ps(arguments: argparse.Namespace) -> int:
  if arguments.url:
    with inspect_cli.connect(arguments) as service:
      inspect_cli.print_views(service.views())
    return 0
  containers, directories = owned_containers(), owned_directories()
  rows: list[tuple[str, ...]] = [("SANDBOX", "CONTAINER", "OWNER", "STATE")]
  for name, label in sorted({**directories, **containers}.items()):
    pid = label.split(":")[2] if label.count(":") == 3 else "?"
    state = "left over" if owner.is_dead(label) else "in use"
    rows.append((name, "yes" if name in containers else "no", f"pid {pid}", state))
  inspect_cli.print_table(rows)
  return 0


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
