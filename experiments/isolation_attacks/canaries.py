"""What an escape would touch: a file, a process, services, a disk and the kernel log of the host.

Everything here is laid out so that success is as easy as can be for who gets out: the file and its
directory are writable by all, the services accept anybody, and attackers are told every name. So
what a canary notices is an escape, and what it does not notice was not one.
"""

import ctypes
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import tempfile


class Canaries:
  """A context manager; `noticed` says what happened to them since it was last asked.

  Attributes:
    token: random text that names all of them; no sandbox may learn `secret`.
    file: the canary file, which holds `secret`.
    port: of the TCP and UDP services on the host's loopback.
    abstract, path: unix sockets.
    disk: minor number of a loop device with the secret in its first block; -1 where there is none.
    handle: the file's kernel handle in hexadecimal, for open_by_handle_at.
    pid: of the canary process.
  """

  def __init__(self) -> None:
    self.token = f"rome-canary-{secrets.token_hex(8)}"
    self.secret = f"SECRET-{secrets.token_hex(16)}"

  def __enter__(self) -> "Canaries":
    self.directory = pathlib.Path(tempfile.mkdtemp(prefix="rome-canary-"))
    self.directory.chmod(0o777)
    self.file = self.directory / "secret"
    self.file.write_text(self.secret)
    self.file.chmod(0o666)
    self.handle = _handle(self.file)
    self._process = subprocess.Popen([self.token, "86400"], executable=shutil.which("sleep"))
    self.pid = self._process.pid
    self._listeners = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    self.abstract, self.path = self.token, str(self.directory / "service")
    self._listeners[0].bind("\0" + self.abstract)
    self._listeners[1].bind(self.path)
    os.chmod(self.path, 0o777)
    tcp, self._udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp.bind(("127.0.0.1", 0))
    self.port = tcp.getsockname()[1]
    self._udp.bind(("127.0.0.1", self.port))
    self._udp.setblocking(False)
    for listener in [*self._listeners, tcp]:
      listener.listen(64)
      listener.setblocking(False)
    self._listeners.append(tcp)
    self._loop = self._make_disk()
    self._log = _kernel_log()
    self._state = self._look()
    return self

  def __exit__(self, *_: object) -> None:
    for one in [*self._listeners, self._udp]:
      one.close()
    self._process.kill()
    self._process.wait()
    if self._loop:
      subprocess.run(["losetup", "--detach", self._loop], check=False, capture_output=True)
    if self._log >= 0:
      os.close(self._log)
    shutil.rmtree(self.directory, ignore_errors=True)

  def noticed(self) -> list[str]:
    """Signs of an escape since the last call; each is told once."""
    signs = []
    for name, listener in zip(("abstract socket", "unix socket", "TCP port"), self._listeners,
                              strict=True):  # fmt: skip
      while True:
        try:
          listener.accept()[0].close()
        except OSError:
          break
        signs.append(f"somebody connected to the host's {name}")
    try:
      while self._udp.recv(100):
        signs.append("a datagram reached the host's UDP port")
    except OSError:
      pass
    if self._log >= 0 and self.token in _new_lines(self._log):
      signs.append("the host's kernel log was written")
    now = self._look()
    signs += [f"{key}: {self._state[key]!r} became {now[key]!r}" for key in now
              if now[key] != self._state[key]]  # fmt: skip
    self._state = now
    return signs

  def _look(self) -> dict[str, object]:
    status = pathlib.Path(f"/proc/{self.pid}/stat")
    running = self._process.poll() is None
    state = status.read_text().rpartition(")")[2].split() if running else []
    info = self.file.stat() if self.file.exists() else None
    return {
      "canary file": self.file.read_text() if info else "gone",
      "canary file's mode and owner": info and (info.st_mode, info.st_uid, info.st_gid),
      "canary directory": sorted(entry.name for entry in self.directory.iterdir()),
      "canary disk": self._disk_file.read_bytes()[:4096] if self._loop else b"",
      "canary process is alive": running,
      "canary process is stopped": bool(state) and state[0] in "Tt",
      "canary process's niceness": state[16] if state else "",
    }

  def _make_disk(self) -> str:
    """A loop device over a file that holds the secret; '' where the host has none to give."""
    self._disk_file = self.directory / "disk"
    self._disk_file.write_bytes(self.secret.encode().ljust(1 << 16, b"."))
    self.disk = -1
    if os.geteuid() or not shutil.which("losetup"):
      return ""
    command = ["losetup", "--find", "--show", str(self._disk_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      return ""
    self.disk = os.minor(os.stat(done.stdout.strip()).st_rdev)
    return done.stdout.strip()


def _handle(path: pathlib.Path) -> str:
  """`struct file_handle` of a file, in hexadecimal; '' where the file system has none."""
  buffer = ctypes.create_string_buffer(8 + 128)
  ctypes.memmove(buffer, (128).to_bytes(4, "little"), 4)
  mount = ctypes.c_int()
  libc = ctypes.CDLL(None, use_errno=True)
  failed = libc.name_to_handle_at(-100, os.fsencode(path), buffer, ctypes.byref(mount), 0)
  size = 8 + int.from_bytes(buffer.raw[:4], "little")
  return "" if failed else buffer.raw[:size].hex()


def _kernel_log() -> int:
  """A descriptor at the end of the kernel log, or -1."""
  try:
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
  except OSError:
    return -1
  os.lseek(log, 0, os.SEEK_END)
  return log


def _new_lines(log: int) -> str:
  text = []
  while True:
    try:
      text.append(os.read(log, 8192).decode(errors="replace"))
    except BlockingIOError:
      return "".join(text)
    except OSError:  # lines were overwritten before they were read
      continue
