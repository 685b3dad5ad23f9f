"""Files that are whole or not there, one error for a disk that takes no more, files of strangers.

Left out: files of rows, where half of the last one may stand; see `rome.train.metrics.JsonlFile`.
"""

import contextlib
import errno
import io
import os
import pathlib
import stat
from collections.abc import Iterator


class WriteError(OSError):
  """A file cannot be written; the message names it and what to do. `strerror` is the reason."""

  def __init__(self, path: pathlib.Path, reason: str):
    super().__init__(
      f"{path} could not be written ({reason}); see to the free space and the permissions of "
      f"{path.parent}, then start the same command again"
    )
    self.strerror = reason


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an OSError of the block, which writes `path`, into a WriteError."""
  try:
    yield
  except WriteError:
    raise
  except OSError as error:
    raise WriteError(pathlib.Path(path), error.strerror or str(error)) from error


def append(file: io.FileIO, data: bytes) -> None:
  """Writes all of `data` to a file opened without a buffer, which a full disk would keep filled.

  Raises:
    WriteError: a part may have been written.
  """
  with writing(file.name):
    rest = memoryview(data)
    while rest:
      rest = rest[file.write(rest) :]


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
  """A file that anybody may have put there: a pipe is not waited for, nor a device read to its end.

  Args:
    path: links are followed.
    most: bytes that it may have.
  Raises:
    OSError: it is not there, is no regular file, or has more; `strerror` says so.
  """
  with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    data = file.read(most + 1)
  if len(data) > most:
    raise OSError(errno.EFBIG, f"it has more than {most} bytes", os.fspath(path))
  return data


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
  """Replaces a file in one step: after a kill or a power cut it is the old one or the new one.

  Args:
    path: in an existing directory.
    data: all of the file; text is written as UTF-8.
  Raises:
    WriteError: the old file, if any, is intact.
  """
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  with writing(path):
    try:
      with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(partial, path)
    except OSError:
      with contextlib.suppress(OSError):
        partial.unlink()  # a full disk needs the room
      raise
