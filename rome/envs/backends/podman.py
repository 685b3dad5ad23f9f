"""Sandboxes in Podman containers, rootless or root, through the `podman` command.

Commands never go through Podman: rocklet gets a listening socket of the host's, so the client talks
to it directly, and Podman only starts and removes containers. They carry the labels `io.rome.owner`
and `io.rome.run`.

Every sandbox has a user namespace: its root is nobody outside, and only there has rocklet the
capabilities to mount the writable root (rocklet/root.c). The container's own root is read-only.

The OCI runtime is found by trial: crun refuses hosts with hybrid cgroups, where runc works.
"""

import functools
import json
import os
import pathlib
import re
import secrets
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
  overlay_args,
  process_bounds,
  rocklet_args,
)
from rome.envs.common import BackendUnavailable, ImageError, Limits, SandboxError, SandboxLost
from rome.envs.rocklet import client

PACKAGES = "podman runc uidmap slirp4netns fuse-overlayfs"
OWNER, RUN = "io.rome.owner", "io.rome.run"
WORKDIR = "/work"
_HOST_IDS = 1 << 30  # host ids that stand for the sandbox's; they belong to nobody
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
    connection.settimeout(30)
    refusal = connection.recv(4096)  # nothing, once its root is mounted
  if refusal:
    raise BackendUnavailable(f"the sandbox {name} cannot run: {refusal.decode(errors='replace')}")
  return int(struct.unpack("3i", peer)[0])


def remove(names: list[str]) -> None:
  """Removes containers at once; those that are gone already do not matter."""
  if names:
    _podman("rm", "--force", "--ignore", "--time", "0", *names, timeout=60 + len(names))


def _user_namespace() -> list[str]:
  """Flags under which the container's users are nobody's here; rootless Podman needs none."""
  if os.geteuid():
    return []
  return [f"--uidmap=0:{_HOST_IDS}:65536", f"--gidmap=0:{_HOST_IDS}:65536"]


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
        flags = [*self._flags(Limits(), "rome-probe", user="1000:1000"), *_user_namespace()]
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
    flags = (
      "--pull never --network none --cap-drop all "
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
    return [*flags, f"--label={OWNER}={owner.label()}", f"--label={RUN}={name}"]

  def launch(self, name: str, image: str, limits: Limits, home: pathlib.Path) -> Launched:
    """Starts a container whose rocklet listens at `home/sock`.

    Raises:
      SandboxLost: Podman did not start it.
      BackendUnavailable: the kernel does not let rocklet mount the writable root.
    """
    flags = ["--read-only", "--read-only-tmpfs=false", *_user_namespace()]
    return self._start(name, image, limits, home, flags, overlay_args(limits))

  def _start(
    self,
    name: str,
    image: str,
    limits: Limits,
    home: pathlib.Path,
    flags: list[str],
    args: list[str],
  ) -> Container:
    assert self._runtime is not None, "probe() comes first"
    inlet = home / "inlet"
    inlet.mkdir()
    mounts = [f"--volume={inlet}:/run/rome:ro", f"--volume={rocklet.build()}:/run/rocklet:ro"]
    with listen(home) as listener, listen(inlet, "boot") as boot:
      for path in (inlet, inlet / "boot"):
        path.chmod(0o777)  # for the sandbox's root, who is nobody here; `home` keeps others out
      done = _podman(
        "run", "--detach", "--rm", "--name", name, *self._runtime, *self._flags(limits, name),
        *flags, *mounts, "--entrypoint", "/run/rocklet", image,
        "boot=/run/rome/boot", *rocklet_args(limits, WORKDIR, SCRATCH),
        *args, *self._bounds(limits),
        cwd=home,  # where the container's monitor notes that memory ran out
      )  # fmt: skip
      if done.returncode:
        remove([name])
        raise SandboxLost(f"podman could not start a sandbox of {image!r}: {_last_line(done)}")
      try:
        pid = _hand_over(boot, listener, name)
      except (OSError, BackendUnavailable) as error:
        remove([name])
        if isinstance(error, BackendUnavailable):
          raise
        raise SandboxLost(f"the sandbox {name} of {image!r} does not start: {error}") from error
    return Container(name, pid)

  def commit(
    self, image: str, tag: str, limits: Limits, snapshot: memoryview, timeout: float
  ) -> str:
    """Makes the image `localhost/TAG` of an image and a snapshot of it; returns that name.

    In the container that is committed runs nothing but rocklet, which restores the snapshot into
    the container's own root. It has no user namespace, since Podman 4 commits the owners as they
    are outside; so rocklet gives up all but four capabilities before it reads anything. The image
    has neither author nor entry point.

    Raises:
      ValueError: the tag is not one.
      SandboxError: the snapshot cannot be restored, or Podman refuses.
    """
    if not re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?", tag):
      raise ValueError(f"tag {tag!r} must be a name of small letters, digits, '-', '_' and '.'")
    name = f"rome-{secrets.token_hex(6)}"
    home = owner.new_dir(name)
    try:
      self._start(name, image, limits, home, [], ["apply=1"])
      connection = client.Connection(str(home / "sock"), 10.0)
      try:
        connection.send(client.RESTORE, snapshot, timeout=timeout)
        changes = ["ENTRYPOINT []", 'CMD ["/bin/bash"]', f"LABEL {OWNER}=", f"LABEL {RUN}="]
        flags = [f"--change={change}" for change in changes]
        target = f"localhost/{tag}"
        done = _podman("commit", "--quiet", "--pause=false", *flags, name, target, timeout=timeout)
      finally:
        connection.close()
      if done.returncode:
        raise SandboxError(f"podman cannot commit {target}: {_last_line(done)}")
    finally:
      remove([name])
      owner.remove_dir(home)
    return target

  def stop_many(self, launched: list[Launched]) -> None:
    remove([container.name for container in launched if isinstance(container, Container)])

  def sweep(self) -> list[str]:
    if not shutil.which("podman"):
      return []
    names = {name: label for name, label in list_containers() if owner.is_dead(label)}
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
