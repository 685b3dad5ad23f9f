"""What a run's scaffold says, as a hash: the file that `agent.scaffold` names, and its prompt.

A setting holds the file's name alone, and its words make the episodes. So a run that goes on asks
whether they are still those it began with.

Left out: what hooks run, which are programs of this machine; copies of the file on other hosts
(`workers`).
"""

import hashlib
import pathlib

from rome.agent.custom import CustomError
from rome.agent.world import AgentConfig


def scaffold_digest(config: AgentConfig) -> str:
  """SHA-256 of the scaffold's file and of its system prompt; "" where there is no scaffold.

  Raises:
    CustomError: a file cannot be read.
  """
  if not config.scaffold:
    return ""
  from rome.agent.settings import load_file  # with the libraries of the extra [agent]

  try:
    prompt = load_file(config.scaffold).system("")
    parts = [pathlib.Path(config.scaffold).read_bytes(), prompt.encode()]
  except (OSError, ValueError) as error:
    raise CustomError(f"config.agent.scaffold: {error}") from None
  digest = hashlib.sha256()
  for part in parts:
    digest.update(hashlib.sha256(part).digest())
  return digest.hexdigest()
