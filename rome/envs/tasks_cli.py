"""`rome tasks`: list the families, show a task, check tasks for admission in a real sandbox."""

import argparse
import sys
from collections.abc import Iterable, Sequence

from rome.envs import families, scoring
from rome.envs import sandbox as sandbox_lib
from rome.envs import task as task_lib


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `rome tasks ...` and returns the exit status.

  0: done. 1: `check` found a task that is not admitted. 2: bad input or no sandbox, with one line
  on standard error.
  """
  arguments = _parser().parse_args(argv)
  try:
    return arguments.run(arguments)
  except (task_lib.TaskError, sandbox_lib.SandboxError) as error:
    print(f"rome tasks: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="rome tasks", description=__doc__)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  listing = commands.add_parser("list", help="the families, with an example of each")
  listing.set_defaults(run=_list)
  show = commands.add_parser("show", help="print one task")
  show.add_argument("task", help="an id such as count/17, or a task directory")
  show.set_defaults(run=_show)
  check = commands.add_parser(
    "check", help="reference solution passes, doing nothing fails, the same on repeat"
  )
  check.add_argument(
    "tasks", nargs="*", help="families, ids or task directories; every family where none is given"
  )
  check.add_argument("--seeds", type=int, default=20, help="instances of each family (%(default)s)")
  check.add_argument(
    "--backend", default="auto", choices=["auto", "podman", "bubblewrap"], help="sandbox to use"
  )
  check.set_defaults(run=_check)
  return parser


def _list(arguments: argparse.Namespace) -> int:
  for family in families.FAMILIES:
    print(f"{family:12} {families.generate(family, 0).instruction}")
  return 0


def _show(arguments: argparse.Namespace) -> int:
  task = families.resolve_task(arguments.task)
  print(f"{task.id}: {task.instruction}")
  for path, file in sorted(task.files.items()):
    print(f"\n--- {path} (mode {file.mode:o}, {len(file.data)} bytes)")
    print(file.data.decode(errors="replace").removesuffix("\n"))
  print("\n--- reference solution", *task.solution, "\n--- tests", sep="\n")
  print(task.tests.removesuffix("\n"))
  return 0


def _check(arguments: argparse.Namespace) -> int:
  tasks = list(_named(arguments.tasks or list(families.FAMILIES), arguments.seeds))
  if not tasks:
    raise task_lib.TaskError(f"--seeds={arguments.seeds} leaves nothing to check; give 1 or more")
  refused = 0
  with sandbox_lib.make_sandbox(backend=arguments.backend) as sandbox:
    for task in tasks:
      reasons = scoring.check_task(task, sandbox)
      refused += bool(reasons)
      for reason in reasons:
        print(f"{task.id}: {reason}")
    print(f"{len(tasks) - refused} of {len(tasks)} tasks admitted ({sandbox.backend})")
  return 1 if refused else 0


def _named(names: Iterable[str], seeds: int) -> Iterable[task_lib.Task]:
  for name in names:
    if name in families.FAMILIES:
      yield from (families.generate(name, seed) for seed in range(seeds))
    else:
      yield families.resolve_task(name)
