"""Plain processes, without any isolation, for machines that allow no namespaces at all.

The commands of the agent run as the user who runs this program, on the host's file system and
network. Only the work directory, in the sandbox's own directory, is cleared by a reset.
"""

import os
import pathlib
import subprocess

from rome.envs import rocklet
from rome.envs.backends import Launched, host, listen, rocklet_args
from rome.envs.backends.bubblewrap import Process
from rome.envs.common import HostDirectory, ImageError, Limits


class PlainProcess:
  """See the module.

  Attributes:
    prefix: a command that starts rocklet, in namespaces for one: ("unshare", "--net").
  """

  name = "process"

  def __init__(self, prefix: tuple[str, ...] = ()):
    self.prefix = prefix

  def probe(self) -> None:
    rocklet.build()

  def image(self, image: str | None) -> str:
    """There are no images here. Raises ImageError if one is named."""
    if image is not None:
      raise ImageError(f"image {image!r}: the process backend runs on the host and has no images")
    return ""

  def launch(
    self,
    name: str,
    image: str,
    limits: Limits,
    home: pathlib.Path,
    directory: HostDirectory | None = None,
  ) -> Launched:
    """Starts a rocklet on the host, with its work directory in `home` or in a directory given."""
    work, scratch = home / "work", home / "tmp"
    work.mkdir()
    kept = []
    if directory is not None:
      work, kept = host.check(directory), ["keep=1"]
    scratch.mkdir()
    with listen(home) as listener:
      args = [f"listen={listener.fileno()}", f"uid={os.getuid()}", *kept]
      args += rocklet_args(limits, str(work), (str(scratch),))
      process = subprocess.Popen(
        [*self.prefix, str(rocklet.build()), *args],
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
      )
    return Process(process, process.pid, str(work), home)

  def stop_many(self, launched: list[Launched]) -> None:
    for one in launched:
      one.stop()

  def sweep(self) -> list[str]:
    return []
