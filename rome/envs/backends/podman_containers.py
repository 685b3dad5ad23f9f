"""Containers through the private Podman service: made, started, awaited, listed, removed.

What a service that was killed while it started a container leaves behind (a monitor and a container
that wait for ever, which Podman no longer knows) is looked for in /proc.
"""

import datetime
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

from rome.envs.backends.podman_service import message, service
from rome.envs.backends.podman_spec import OWNER
from rome.envs.common import BackendUnavailable, SandboxError

if TYPE_CHECKING:
  import podman

_AT_ONCE = 8  # removals
_LISTINGS = 10  # tries
_REMOVE_TIMEOUT = 120.0  # seconds of one


def create(spec: dict[str, Any]) -> tuple[str, list[str]]:
  """Makes a container, not started yet. Returns its id and Podman's warnings.

  Raises:
    podman.errors.APIError: Podman refuses.
    Interrupted: the service ended meanwhile.
  """

  def action(client: "podman.PodmanClient") -> dict[str, Any]:
    kind = {"Content-Type": "application/json"}
    answer = client.api.post("/containers/create", data=json.dumps(spec), headers=kind)
    answer.raise_for_status()
    return dict(answer.json())

  made = service.call(action, repeat=False)
  return str(made["Id"]), list(made.get("Warnings") or [])


def start(name: str) -> None:
  """Starts a container that `create` made; raises as that does."""
  service.call(
    lambda client: client.api.post(f"/containers/{name}/start").raise_for_status(), repeat=False
  )


def wait(name: str, timeout: float) -> int:
  """Waits for a container's end. Returns its exit status.

  Raises:
    SandboxError: it took longer than `timeout` seconds.
  """

  def action(client: "podman.PodmanClient") -> int:
    answer = client.api.post(f"/containers/{name}/wait", timeout=timeout)
    answer.raise_for_status()
    return int(answer.text)

  return service.call(action)


def remove(names: list[str]) -> None:
  """Removes containers at once; those that are gone already do not matter."""

  def one(name: str) -> None:
    parameters = {"force": "true", "timeout": 0, "ignore": "true", "v": "true"}
    # Where the monitor was killed, the first attempt fails, having found that the container ended.
    # What is left after the second, or locked by its own clean-up, the sweep finds.
    for _ in range(2):
      answer = service.call(
        lambda client: client.api.delete(
          f"/containers/{name}", params=parameters, timeout=_REMOVE_TIMEOUT
        )
      )
      if answer.ok:
        return

  def work() -> None:
    while pending:
      try:
        one(pending.pop())
      except (IndexError, SandboxError) as error:  # another thread took it, or nobody can
        errors.append(error)

  pending, errors = list(names), list[Exception]()
  threads = [threading.Thread(target=work) for _ in range(min(_AT_ONCE, len(names)) - 1)]
  for i, thread in enumerate(threads):
    try:
      thread.start()
    except RuntimeError:  # the interpreter is ending: no more threads
      threads = threads[:i]
      break
  work()
  for thread in threads:
    thread.join()
  for error in errors:
    if isinstance(error, SandboxError):
      raise error


def purge(containers: dict[str, str]) -> None:
  """Removes containers whose start was interrupted, and what Podman does not know of them.

  Args:
    containers: ids by name; "" where Podman has not said that it made one.
  """
  for pid, container in _monitors():
    if container in containers.values():
      _kill_tree(pid)
  for container in filter(None, containers.values()):
    _delete(container)
  remove(list(containers))


def clear(containers: list[str]) -> None:
  """Removes what Podman leaves of removed containers whose monitor was killed.

  Args:
    containers: their ids.
  """
  for container in containers:
    if _groups(container):
      _delete(container)


def _groups(container: str) -> list[pathlib.Path]:
  """The control groups that Podman made for a container, where no systemd keeps them."""
  base = pathlib.Path("/sys/fs/cgroup")  # with a directory for each controller in version 1
  return [
    path
    for parent in ("libpod_parent", "*/libpod_parent")
    for path in base.glob(f"{parent}/libpod-{container}")
  ]


def _monitors() -> list[tuple[int, str]]:
  """Pids of every running conmon and the ids of their containers."""
  found = []
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      arguments = pathlib.Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
      continue
    if arguments[0].endswith("conmon") and "-c" in arguments:
      found.append((int(pid), arguments[arguments.index("-c") + 1]))
  return found


def _kill_tree(pid: int) -> None:
  """Ends a monitor, first, and what it started: its runtime or its container."""
  try:
    tasks = list(pathlib.Path(f"/proc/{pid}/task").glob("*/children"))
    children = [int(child) for task in tasks for child in task.read_text().split()]
    os.kill(pid, signal.SIGKILL)
  except OSError:
    return
  for child in children:
    _kill_tree(child)


def _delete(container: str) -> None:
  """Ends a container behind Podman's back, down to its cgroups. Nothing happens if it is gone."""
  bases = ["/run", os.environ.get("XDG_RUNTIME_DIR") or "/run"]
  for runtime in filter(shutil.which, ("runc", "crun")):
    if any(os.path.isdir(f"{base}/{runtime}/{container}") for base in bases):
      command = [runtime, "delete", "--force", container]
      if os.geteuid():
        command = ["podman", "unshare", *command]  # its processes have subordinate ids
      subprocess.run(command, capture_output=True, timeout=30)
  for path in _groups(container):
    for _ in range(100):
      try:
        path.rmdir()
        break
      except OSError as error:
        if error.errno != errno.EBUSY:
          break
        time.sleep(0.02)  # its processes are about to end


def state(name: str) -> dict[str, Any] | None:
  """The state of a container as `podman inspect` has it; None if it is gone."""

  def action(client: "podman.PodmanClient") -> dict[str, Any] | None:
    answer = client.api.get(f"/containers/{name}/json")
    return dict(answer.json()["State"]) if answer.ok else None

  return service.call(action)


def put_archive(name: str, data: bytes) -> None:
  """Unpacks a tar archive at the root of a container that `create` made."""

  def action(client: "podman.PodmanClient") -> None:
    parameters = {"path": "/"}
    client.api.put(f"/containers/{name}/archive", params=parameters, data=data).raise_for_status()

  service.call(action)


def last_output(name: str) -> str:
  """The last line that a container of `build_spec` wrote; '' if it wrote none."""
  logs = service.call(lambda client: list(client.containers.get(name).logs(tail=20)))
  text = b"".join(part for part in logs if isinstance(part, bytes)).decode(errors="replace")
  return (text.strip().splitlines() or [""])[-1]


def list_stored() -> list[tuple[str, float]]:
  """Names and ages in seconds of containers that Podman forgot, but not their files.

  That is what a service leaves which is killed in the middle of making or removing one.
  """
  now = datetime.datetime.now(datetime.UTC)
  return [
    (row["Names"][0], (now - datetime.datetime.fromisoformat(row["Created"])).total_seconds())
    for row in _rows({"external": "true"})
    if row.get("State") == "storage" and row["Names"]
  ]


def list_containers() -> list[tuple[str, str]]:
  """Names and owner labels of this project's containers on this machine, whatever their state."""
  try:
    found = _rows({"filters": json.dumps({"label": [OWNER]})})
  except OSError as error:
    raise BackendUnavailable(f"podman cannot list its containers: {message(error)}") from error
  return [(row["Names"][0], row["Labels"][OWNER]) for row in found]


def _rows(parameters: dict[str, str]) -> list[dict[str, Any]]:
  """Podman's list of containers; it fails (500) if one is removed while it is made: then again."""

  def action(client: "podman.PodmanClient") -> list[dict[str, Any]]:
    for _ in range(_LISTINGS):
      answer = client.api.get("/containers/json", params={"all": "true", **parameters})
      if answer.status_code != 500:
        break
    answer.raise_for_status()
    return list(answer.json())

  return service.call(action)
