"""Ways to start a rocklet: in a Podman container, in bubblewrap, or as a plain process."""

import pathlib
import shutil
import socket
from collections.abc import Mapping
from typing import Protocol

from rome.envs.common import BackendUnavailable, HostDirectory, Limits

# What rocklet needs, in its user namespace alone. Its children keep at most the first six,
# CHILD_CAPABILITIES (process.c). The rest: mounting and entering the root, dropping privileges,
# keeping set-group-id bits in a restore, sockets below port 1024, looking at other processes.
CHILD_CAPABILITIES = ("SETUID", "SETGID", "KILL", "CHOWN", "DAC_OVERRIDE", "FOWNER")
CAPABILITIES = (
  *CHILD_CAPABILITIES,
  *("SYS_ADMIN", "SYS_CHROOT", "SETPCAP", "FSETID", "NET_BIND_SERVICE", "SYS_PTRACE"),
)
SCRATCH = ("/tmp", "/dev/shm")  # writable beside the work directory; reset empties them


class Launched(Protocol):
  """A started rocklet.

  Attributes:
    pid: the host's pid of rocklet, whose end is the end of the sandbox.
    workdir: the work directory as commands see it.
    variables: of every session, beside those of rocklet's.
  """

  pid: int
  workdir: str
  variables: Mapping[str, str]

  def reason(self) -> str:
    """Why it ended, as far as the host knows; '' if nothing is known."""

  def stop(self) -> None:
    """Ends whatever is left of it. Idempotent."""


class Backend(Protocol):
  """Starts rocklets of one kind."""

  name: str

  def probe(self) -> None:
    """Raises BackendUnavailable, saying what to install, where nothing can start."""

  def image(self, image: str | None) -> str:
    """Resolves the image's name. Raises ImageError."""

  def launch(
    self,
    name: str,
    image: str,
    limits: Limits,
    home: pathlib.Path,
    directory: HostDirectory | None = None,
  ) -> Launched:
    """Starts a rocklet whose socket will be `home/sock`.

    Args:
      name: of the sandbox.
      image: as `image` resolved it.
      limits: upper bounds.
      home: its own directory on the host.
      directory: what it works in; None for a work directory of its own.
    """

  def stop_many(self, launched: list[Launched]) -> None:
    """Ends several at once, cheaper than one by one."""

  def sweep(self) -> list[str]:
    """Removes what dead owners left behind. Returns the names."""


def listen(home: pathlib.Path, name: str = "sock") -> socket.socket:
  """Makes the listening socket `home/sock`, which a rocklet is to have."""
  listener = socket.socket(socket.AF_UNIX)
  listener.bind(str(home / name))
  listener.listen(160)
  return listener


def rocklet_args(limits: Limits, workdir: str, scratch: tuple[str, ...]) -> list[str]:
  """The arguments of rocklet that follow from the limits."""
  disk = limits.disk_mb << 20
  return [
    f"work={workdir}",
    *(f"clean={path}" for path in scratch),
    f"output={limits.output_bytes}",
    f"fsize={2 * disk}",  # above the tmpfs's size, so that a full disk says ENOSPC first
    f"nofile={limits.open_files}",
  ]


def overlay_args(limits: Limits) -> list[str]:
  """Further arguments, where rocklet is to mount a writable root of its own (root.c)."""
  return [f"disk={limits.disk_mb}"]


def process_bounds(limits: Limits) -> list[str]:
  """Further arguments, where no cgroup bounds the sandbox: rocklet bounds each process instead."""
  return [f"nproc={limits.pids}", f"as={limits.memory_mb << 20}"]


def install_hint(packages: str, what: str) -> BackendUnavailable:
  """The error for a missing program, with the command that installs it."""
  if shutil.which("apt-get"):
    return BackendUnavailable(f"{what}: apt-get install {packages}")
  return BackendUnavailable(f"{what}: install {packages.split()[0]} with your package manager")
