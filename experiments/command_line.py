"""Flags of the programs: a mistake in one is a single line, never a traceback."""

import sys

from absl import flags


def parse(argv: list[str]) -> list[str]:
  """Parses all flags, for `app.run(main, flags_parser=command_line.parse)`.

  Returns:
    The program's name and what is no flag.

  Raises:
    SystemExit: a flag, or a setting that it names, does not exist or has a value of another type.
  """
  try:
    rest = list(flags.FLAGS(argv))
    flags.FLAGS.config.keys()  # a file that could not be read says so only when it is asked
    return rest
  except (AttributeError, KeyError) as error:  # of ml_collections, one inside the other
    cause: object = error
    while isinstance(cause, BaseException) and cause.args:
      cause = cause.args[0]
    message = f"unknown setting under --config: {cause}"
  except (flags.Error, OSError) as error:
    message = str(error)
  print(f"error: {' '.join(message.split())}; see --help", file=sys.stderr)
  sys.exit(1)
