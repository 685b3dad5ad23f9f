"""One process at a time in a work directory.

The lock is flock's, on WORKDIR/lock: the kernel drops it when its process ends, however that ends,
so a killed run leaves nothing to tidy up. The file stays and says who held it last. Its descriptor
does not pass to programs that the process starts.

Left out: file systems on which flock does nothing between hosts; there the directory is unguarded.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from rome.train.config import ConfigError

NAME = "lock"


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a work directory, which is made if missing, during the block.

  Raises:
    ConfigError: another process holds it, which is named, or the directory cannot be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(open(workdir / NAME, "a+"))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
      file.flush()
    except BlockingIOError:
      file.seek(0)
      who = file.read().strip() or "a process that has just started"
      raise ConfigError(
        f"--workdir {workdir} is in use by another run ({who}); wait for its end or end it, or "
        "choose another --workdir"
      ) from None
    except OSError as error:
      raise ConfigError(
        f"cannot write to --workdir {workdir} ({error.strerror}); choose another"
      ) from None
    yield
