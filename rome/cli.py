"""The `rome` command: a table of subcommands, each parsed and run by the module that owns it.

Modules are imported when their subcommand runs, so that `rome --help` is instant and a sandbox host
never loads jax.

Left out until its part exists: data.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

import rome

# Subcommand -> (module with main(argv) -> exit code, what it does).
COMMANDS = {
  "agent": ("rome.agent.cli.main", "work with an agent in this directory, or give it one task"),
  "convert": ("rome.models.convert_cli", "write a model or GGUF file as a Hugging Face directory"),
  "plan": ("rome.train.plan_cli", "does a model fit on a TPU slice, and how fast could it be"),
  "replay": ("rome.train.replay", "make an update of a run again and compare it bit for bit"),
  "report": ("rome.train.report", "write WORKDIR/report.html from what a run left there"),
  "sandbox": ("rome.envs.sandbox_cli", "run a command in a sandbox, list or remove sandboxes"),
  "score": ("rome.models.score_cli", "logits or log-probs of token ids under a model"),
  "serve": ("rome.rollout.serve.cli", "serve a model over the OpenAI API"),
  "tasks": ("rome.envs.tasks_cli", "list, show and check shell tasks"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand.

  Args:
    argv: arguments without the program's name; sys.argv where None.

  Returns:
    The exit code of the subcommand; 2 where the arguments are wrong (argparse exits).
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  arguments = _parser().parse_args(argv[:1])
  module, _ = COMMANDS[arguments.command]
  return importlib.import_module(module).main(argv[1:])


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="rome",
    description="Agentic RL in JAX. To train: python -m experiments.train --help",
    epilog="rome COMMAND --help tells more.",
  )
  parser.add_argument("--version", action="version", version=f"rome {rome.__version__}")
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, (_, help_text) in COMMANDS.items():
    # The owner of the subcommand parses everything after the name, --help included.
    commands.add_parser(name, help=help_text, add_help=False)
  return parser


if __name__ == "__main__":
  sys.exit(main())
