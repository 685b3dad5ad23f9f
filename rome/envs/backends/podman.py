"""Sandboxes in Podman containers, rootless or root, through the `podman` command.

Commands never go through Podman: rocklet gets a listening socket of the host's, so the client talks
to it directly, and Podman only starts and removes containers. They carry the labels `io.rome.owner`
and `io.rome.run`.

The OCI runtime is found by trial: crun refuses hosts with hybrid cgroups, where runc works.
"""

import functools
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import threading
import warnings
from collections.abc import Callable

from rome.envs import image as image_lib
from rome.envs import owner, rocklet
from rome.envs.backends import (
  CAPABILITIES,
  SCRATCH,
  Launched,
  install_hint,
  listen,
  process_bounds,
  rocklet_args,
)
from rome.envs.common import BackendUnavailable, ImageError, Limits, SandboxError, SandboxLost

PACKAGES = "podman runc uidmap slirp4netns fuse-overlayfs"
OWNER, RUN = "io.rome.owner", "io.rome.run"
WORKDIR = "/work"
_SPARE_PIDS = 32  # room in the container for rocklet and its shells beside the agent's processes


def _podman(
  *args: str, timeout: float = 60.0, cwd: pathlib.Path | None = None
) -> subprocess.CompletedProcess[str]:
  try:
    return subprocess.run(
      ["podman", *args],
      capture_output=True,
      text=True,
      timeout=timeout,
      stdin=subprocess.DEVNULL,
      cwd=cwd,
    )
  except FileNotFoundError as error:
    raise install_hint(PACKAGES, "podman is not installed") from error
  except subprocess.TimeoutExpired as error:
    raise SandboxError(f"`podman {args[0]}` took longer than {timeout:.0f} s") from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
  return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


class Container:
  """A running container."""

  workdir = WORKDIR

  def __init__(self, name: str, pid: int):
    self.name = name
    self.pid = pid

  def reason(self) -> str:
    done = _podman("inspect", "--format", "{{json .State}}", self.name)
    if done.returncode:
      return "its container is gone"
    state = json.loads(done.stdout)
    return "out of memory" if state.get("OOMKilled") else f"its container is {state.get('Status')}"

  def stop(self) -> None:
    remove([self.name])


def _hand_over(boot: socket.socket, listener: socket.socket, name: str) -> int:
  """Waits for the rocklet of a new container and gives it its socket. Returns its pid."""
  boot.settimeout(3)
  for _ in range(10):
    try:
      connection, _ = boot.accept()
      break
    except TimeoutError:
      if _podman("container", "exists", name).returncode:
        raise ConnectionError("its container ended at once") from None
  else:
    raise TimeoutError("nothing answers in its container")
  with connection:
    socket.send_fds(connection, [b"1"], [listener.fileno()])
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
  return int(struct.unpack("3i", peer)[0])


def _settle_root(pid: int) -> None:
  """Sets time and mode of the root directory, which `ls -la` in the work directory shows as `..`.

  They are those of the overlay's upper directory, made a moment ago; the kernel names it in the
  container's mounts. With other storage drivers they stay as they are.
  """
  try:
    mounts = pathlib.Path(f"/proc/{pid}/mountinfo").read_text()
    root = next(line for line in mounts.splitlines() if line.split()[4] == "/")
    upper = next(o[9:] for o in root.split()[-1].split(",") if o.startswith("upperdir="))
    os.chmod(upper, 0o755)  # as in the image; Podman makes it 0555
    os.utime(upper, (image_lib.EPOCH, image_lib.EPOCH))
  except (OSError, StopIteration):
    pass


def remove(names: list[str]) -> None:
  """Removes containers at once; those that are gone already do not matter."""
  if names:
    _podman("rm", "--force", "--ignore", "--time", "0", *names, timeout=60 + len(names))


class Podman:
  """See the module. One instance serves the process."""

  name = "podman"

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._runtime: list[str] | None = None
    self._bounds: Callable[[Limits], list[str]] = lambda limits: []
    self._images: dict[str, str] = {}

  def probe(self) -> None:
    """Finds a runtime that can really run a container; done once.

    Raises:
      BackendUnavailable: none can.
      ImageError: the base image cannot be built.
    """
    with self._lock:
      if self._runtime is not None:
        return
      if not shutil.which("podman"):
        raise install_hint(PACKAGES, "podman is not installed")
      tag = self._base()
      failures = []
      for runtime in _runtimes():
        # As the agent: a user without subordinate ids can start containers, but only for root.
        flags = self._flags(Limits(), "rome-probe", user="1000:1000")
        done = _podman("run", "--rm", *runtime, *flags, "--entrypoint", "/bin/true", tag)
        if done.returncode == 0:
          if "ignored on cgroups" in done.stderr.lower():  # rootless on cgroups v1
            self._bounds = process_bounds
            warnings.warn(
              "podman has no cgroup for this user: memory and processes are bounded as with "
              "bubblewrap, processors are not (cgroups v2 mends this)",
              stacklevel=2,
            )
          self._runtime = runtime
          return
        failures.append(_last_line(done))
      raise install_hint(PACKAGES, f"podman cannot run containers here ({failures[-1][:300]})")

  def image(self, image: str | None) -> str:
    """Returns the name under which Podman has the image.

    Raises:
      ImageError: it is not on this machine. Nothing is ever pulled behind the user's back.
    """
    with self._lock:
      if image is None or image == image_lib.NAME:
        return self._base()
      if image not in self._images:
        if _podman("image", "exists", image).returncode:
          pull = f"get it with `podman pull {image}`"
          mend = "build it" if image.startswith("localhost/") else pull
          raise ImageError(f"image {image!r} is not on this machine: {mend} first")
        self._images[image] = image
      return self._images[image]

  def _base(self) -> str:
    if image_lib.NAME not in self._images:
      archive, tag = image_lib.base_archive()
      if _podman("image", "exists", tag).returncode:
        done = _podman("import", "--quiet", str(archive), tag, timeout=120)
        if done.returncode == 0:
          done = _podman("tag", tag, image_lib.NAME)
        if done.returncode:
          raise ImageError(f"podman cannot import the base image: {_last_line(done)}")
      self._images[image_lib.NAME] = tag
    return self._images[image_lib.NAME]

  def _flags(self, limits: Limits, name: str, user: str = "0:0") -> list[str]:
    memory = f"{limits.memory_mb}m"
    size = f"size={limits.disk_mb}m"
    flags = (
      "--pull never --network none --read-only --read-only-tmpfs=false --cap-drop all "
      "--security-opt no-new-privileges --ipc private --hostname rome --no-hosts "
      "--workdir / --systemd false --sdnotify ignore --log-driver none --image-volume ignore "
      "--no-healthcheck --http-proxy=false --unsetenv-all --env LC_ALL=C --env TZ=UTC "
      "--env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "
      "--ulimit nproc=4096:4096"
    ).split()
    flags += [f"--user={user}"]
    flags += [f"--cap-add={capability}" for capability in CAPABILITIES]
    flags += [f"--memory={memory}", f"--memory-swap={memory}", f"--cpus={limits.cpus}"]
    flags += [f"--pids-limit={limits.pids + _SPARE_PIDS}", f"--shm-size={limits.disk_mb}m"]
    # Podman's own defaults for both ulimits may exceed the host's hard limits, so both are set.
    flags += [f"--ulimit=nofile={limits.open_files}:{limits.open_files}"]
    flags += [f"--tmpfs={WORKDIR}:rw,exec,nosuid,nodev,{size}"]
    flags += [f"--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777,{size}"]
    return [*flags, f"--label={OWNER}={owner.label()}", f"--label={RUN}={name}"]

  def launch(self, name: str, image: str, limits: Limits, home: pathlib.Path) -> Launched:
    """Starts a container whose rocklet listens at `home/sock`.

    Raises:
      SandboxLost: Podman did not start it.
    """
    assert self._runtime is not None, "probe() comes first"
    mounts = [f"--volume={home}:/run/rome:ro", f"--volume={rocklet.build()}:/run/rocklet:ro"]
    with listen(home) as listener, listen(home, "boot") as boot:
      done = _podman(
        "run", "--detach", "--rm", "--name", name, *self._runtime, *self._flags(limits, name),
        *mounts, "--entrypoint", "/run/rocklet", image,
        "boot=/run/rome/boot", *rocklet_args(limits, WORKDIR, SCRATCH),
        *self._bounds(limits), cwd=home,  # where the container's monitor notes that memory ran out
      )  # fmt: skip
      if done.returncode:
        remove([name])
        raise SandboxLost(f"podman could not start a sandbox of {image!r}: {_last_line(done)}")
      try:
        pid = _hand_over(boot, listener, name)
      except OSError as error:
        remove([name])
        raise SandboxLost(f"the sandbox {name} of {image!r} does not start: {error}") from error
    _settle_root(pid)
    return Container(name, pid)

  def stop_many(self, launched: list[Launched]) -> None:
    remove([container.name for container in launched if isinstance(container, Container)])

  def sweep(self) -> list[str]:
    if not shutil.which("podman"):
      return []
    names = {name: label for name, label in list_containers() if owner.is_abandoned(name, label)}
    remove(list(names))
    return list(names)


def list_containers() -> list[tuple[str, str]]:
  """Names and owner labels of this project's containers on this machine, whatever their state."""
  form = f'{{{{.Names}}}} {{{{index .Labels "{OWNER}"}}}}'
  done = _podman("ps", "--all", "--filter", f"label={OWNER}", "--format", form)
  if done.returncode:
    raise BackendUnavailable(f"`podman ps` fails: {_last_line(done)}")
  rows = (line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
  return [(name, label) for name, label in rows]


@functools.cache
def _runtimes() -> list[list[str]]:
  """Runtimes in the order to try them: on hybrid cgroups crun would only waste a start."""
  named = [["--runtime", name] for name in ("runc", "crun") if shutil.which(name)]
  hybrid = os.path.isdir("/sys/fs/cgroup/unified") or os.path.isdir("/sys/fs/cgroup/memory")
  return [*named, []] if hybrid else [[], *named]
