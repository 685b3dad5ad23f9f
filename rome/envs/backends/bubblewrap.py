"""Sandboxes in bubblewrap: namespaces without a container engine, for machines without Podman.

Differences to Podman: no cgroup, so memory is bounded for each process alone and processors are
not; only rocklet's small seccomp filter; only the base image. The rest is the same rocklet over the
same root file system.

The user namespace maps two users, root and the agent, if the caller is root or has subordinate ids
(`newuidmap`, /etc/subuid). With one user only, rocklet and the agent share it by two numbers: then
the verifier is protected by having ended every other process, not by file permissions.

The listening socket is made by the host and passed in, so that no host directory is mounted.
"""

import json
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping

from rome.envs import image as image_lib
from rome.envs import owner, rocklet
from rome.envs.backends import (
  CAPABILITIES,
  SCRATCH,
  Launched,
  install_hint,
  listen,
  overlay_args,
  process_bounds,
  rocklet_args,
)
from rome.envs.backends import host as host_lib
from rome.envs.common import BackendUnavailable, HostDirectory, ImageError, Limits, SandboxLost

WORKDIR = "/work"
# Parts of /proc that act on the whole machine. The sandbox's root may be the host's root by number,
# which the kernel takes as leave enough to write some of them, so they are read-only.
_KERNEL_FILES = "sys sysrq-trigger irq bus fs acpi scsi mtrr driver asound dynamic_debug".split()
# Parts that tell of the whole machine to whoever has root's number. They read as empty.
_KERNEL_VIEWS = (
  "kcore kmsg keys timer_list sched_debug latency_stats kpagecount kpageflags kpagecgroup slabinfo "
  "vmallocinfo pagetypeinfo lock_stat"
).split()
_SUB_BASE = 1 << 30  # host ids that stand for the agent's where the caller is root


class Process:
  """A rocklet started by this process, in whatever surroundings.

  Attributes:
    process: what was started, bwrap for one.
    pid, workdir, variables: see `Launched`.
  """

  def __init__(
    self,
    process: subprocess.Popen[bytes],
    pid: int,
    workdir: str,
    home: pathlib.Path,
    variables: Mapping[str, str] | None = None,
  ):
    self.process = process
    self.pid = pid
    self.workdir = workdir
    self.variables = variables or {}
    self._lock = threading.Lock()
    self._said: str | None = None  # its last line on stderr, once read
    if process.stderr:
      os.set_blocking(process.stderr.fileno(), False)  # somebody else may hold the other end
    (home / "process").write_text(owner.label(pid))  # for the sweep

  def reason(self) -> str:
    try:
      status = self.process.wait(timeout=1)
    except subprocess.TimeoutExpired:
      return "its process runs but does not answer"
    last = self._last_line()
    return f"its process ended with status {status}" + (f": {last}" if last else "")

  def _last_line(self) -> str:
    """What it said last. Several threads may ask, also after `stop`."""
    with self._lock:
      if self._said is None:
        said = b""
        if self.process.stderr:
          said = self.process.stderr.read() or b""
          self.process.stderr.close()
        self._said = (said.decode(errors="replace").strip().splitlines() or [""])[-1]
      return self._said

  def stop(self) -> None:
    try:
      self.process.wait(timeout=5)  # it ends by itself when its owner's connection closes
    except subprocess.TimeoutExpired:
      os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
      self.process.wait(timeout=5)
    self._last_line()  # and with it the pipe is closed


class Bubblewrap:
  """See the module. One instance serves the process."""

  name = "bubblewrap"

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._works = False

  def probe(self) -> None:
    """Runs `true` in a sandbox, once.

    Raises:
      BackendUnavailable: bubblewrap is missing or namespaces are not allowed here.
    """
    with self._lock:
      if self._works:
        return
      if not shutil.which("bwrap"):
        raise install_hint("bubblewrap", "bubblewrap is not installed")
      process, _, error = _start(["/bin/true"], [])
      if process is not None:
        process.communicate(timeout=30)
      if process is None or process.returncode:
        raise BackendUnavailable(
          f"bubblewrap cannot make namespaces here ({error or 'see `bwrap --unshare-all true`'}): "
          "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
        )
      self._works = True

  def image(self, image: str | None) -> str:
    """Only the base image exists here. Raises ImageError for any other."""
    if image not in (None, image_lib.NAME):
      raise ImageError(
        f"image {image!r}: bubblewrap knows only {image_lib.NAME}; use backend='podman'"
      )
    return image_lib.NAME

  def launch(
    self,
    name: str,
    image: str,
    limits: Limits,
    home: pathlib.Path,
    directory: HostDirectory | None = None,
  ) -> Launched:
    """Starts a rocklet in new namespaces.

    Raises:
      SandboxError: the directory is not one to work in.
      SandboxLost: bubblewrap did not start it.
    """
    with listen(home) as listener:
      fd = listener.fileno()
      if directory is not None:
        args = [f"listen={fd}", *host_lib.arguments(directory, limits)]
        process, pid, error = _start(
          ["/run/rocklet", *args], [fd], host_lib.flags(directory, limits, home)
        )
        if process is None:
          raise SandboxLost(f"bubblewrap did not start: {error}")
        work, variables = str(host_lib.check(directory)), host_lib.variables(directory)
        return Process(process, pid, work, home, variables)
      args = [f"listen={fd}", *rocklet_args(limits, WORKDIR, SCRATCH)]
      args += [*overlay_args(limits), *process_bounds(limits)]
      if not _id_maps():
        args += ["single=1"]
      process, pid, error = _start(["/run/rocklet", *args], [fd])
    if process is None:
      raise SandboxLost(f"bubblewrap did not start: {error}")
    return Process(process, pid, WORKDIR, home)

  def stop_many(self, launched: list[Launched]) -> None:
    for one in launched:
      one.stop()

  def sweep(self) -> list[str]:
    return []  # the directories' sweep ends recorded processes


def _start(
  command: list[str], fds: list[int], host: list[str] | None = None
) -> tuple[subprocess.Popen[bytes] | None, int, str]:
  """Starts a command in new namespaces and maps its users.

  Args:
    command: what to run.
    fds: descriptors that it inherits.
    host: bwrap's arguments that make another root, for the caller as its one user.
  Returns:
    bwrap's process or None, the host's pid of the command, and why it failed or ''.
  """
  info_read, info_write = os.pipe()
  block_read, block_write = os.pipe()
  maps = _id_maps() if host is None else None
  flags = (
    "--unshare-user --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try "
    "--as-pid-1 --new-session --clearenv --hostname rome --cap-drop ALL"
  ).split()
  flags += ["--info-fd", str(info_write)]
  for capability in CAPABILITIES if host is None else host_lib.CAPABILITIES:
    flags += ["--cap-add", f"CAP_{capability}"]
  if host is not None:
    flags += ["--uid", str(os.getuid()), "--gid", str(os.getgid()), *host]
  else:
    if maps:
      flags += ["--userns-block-fd", str(block_read)]
    else:
      flags += ["--cap-add", "CAP_SETFCAP"]  # or the kernel refuses root a second number
    flags += ["--uid", "0", "--gid", "0", "--ro-bind", str(image_lib.base_rootfs()), "/"]
  flags += ["--ro-bind", str(rocklet.build()), "/run/rocklet", "--proc", "/proc", "--dev", "/dev"]
  for name in _KERNEL_FILES:
    if os.path.exists(f"/proc/{name}"):
      flags += ["--ro-bind", f"/proc/{name}", f"/proc/{name}"]
  for name in _KERNEL_VIEWS:
    if os.path.exists(f"/proc/{name}"):
      flags += ["--ro-bind", "/dev/null", f"/proc/{name}"]
  flags += [*(host_lib.SEALED if host is not None else ()), "--chdir", "/"]
  try:
    process = subprocess.Popen(
      ["bwrap", *flags, "--", *command],
      pass_fds=[*fds, info_write, block_read],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )
  finally:
    os.close(info_write)
    os.close(block_read)
  try:
    with os.fdopen(info_read) as info:
      text = info.read()
    child = json.loads(text)["child-pid"] if text else 0
    error = "" if child else "it ended at once"
    if child and maps:
      error = _map_ids(child, maps)
    if not error:
      os.write(block_write, b"1")
      return process, child, ""
    process.kill()
    assert process.stderr is not None
    return None, 0, (process.communicate(timeout=10)[1].decode(errors="replace").strip() or error)
  finally:
    os.close(block_write)


def _id_maps() -> tuple[int, int, int, int] | None:
  """Host ids of the sandbox's uid 0, uid 1, gid 0 and gid 1; None: only one user can be mapped."""
  if os.geteuid() == 0:
    return 0, _SUB_BASE, 0, _SUB_BASE
  if not shutil.which("newuidmap"):
    return None
  firsts = []
  names = [str(os.getuid()), *(e.pw_name for e in pwd.getpwall() if e.pw_uid == os.getuid())]
  for file in ("/etc/subuid", "/etc/subgid"):
    rows = [line.split(":") for line in _lines(file) if line.count(":") == 2]
    mine = [int(row[1]) for row in rows if row[0] in names]
    if not mine:
      return None
    firsts.append(mine[0])
  return os.geteuid(), firsts[0], os.getegid(), firsts[1]


def _lines(file: str) -> list[str]:
  try:
    return pathlib.Path(file).read_text().split()
  except OSError:
    return []


def _map_ids(pid: int, maps: tuple[int, int, int, int]) -> str:
  """Maps 0 and 1..65535 of the new user namespace. Returns why it failed, '' if it did not."""
  for kind, first, rest in (("gid", maps[2], maps[3]), ("uid", maps[0], maps[1])):
    if os.geteuid() == 0:
      try:
        pathlib.Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {first} 1\n1 {rest} 65535\n")
      except OSError as error:
        return f"{kind}_map: {error}"
      continue
    helper = [f"new{kind}map", str(pid), "0", str(first), "1", "1", str(rest), "65535"]
    done = subprocess.run(helper, capture_output=True, text=True, timeout=10)
    if done.returncode:
      return done.stderr.strip()
  return ""
