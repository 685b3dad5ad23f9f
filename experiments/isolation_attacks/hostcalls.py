"""Attacks on the host's own calls: upload, download, read_file, write_file, and on its logs."""

import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator

from experiments.isolation_attacks.attack import Attack, Scene
from rome.envs.sandbox import SandboxError

_KIND = "host calls"
_RACE = 1.0  # seconds that a race is run


@contextlib.contextmanager
def _directory() -> Iterator[pathlib.Path]:
  with tempfile.TemporaryDirectory(prefix="rome-canary-") as name:
    yield pathlib.Path(name)


def _refused(scene: Scene, error: SandboxError) -> None:
  scene.note = f"refused: {str(error)[-60:]}"
  scene.expect(
    not any(ord(character) < 32 for character in str(error)),
    f"an error message carries control characters: {str(error)!r}",
  )


def _flip(scene: Scene, name: str, target: str) -> None:
  scene.run(f"(setsid /tmp/payload flip {name} {target} > /dev/null 2>&1 &) ; sleep 0.05")


def _write_race(scene: Scene) -> None:
  """Root writes d/x while the agent swaps d with a link to /etc."""
  scene.run("mkdir d")
  _flip(scene, "d", "/etc")
  end, wrote = time.monotonic() + _RACE, 0
  while time.monotonic() < end:
    try:
      scene.sandbox.write_file("d/raced", b"x", owner="root")
      wrote += 1
    except SandboxError as error:
      _refused(scene, error)
  scene.expect("raced" not in scene.run("ls /etc"), "a link led root's write out of the directory")
  scene.note = f"{wrote} writes, none led astray"


def _read_race(scene: Scene) -> None:
  """The host reads `f` while the agent swaps it with a link to a file of root's."""
  scene.sandbox.write_file("/tmp/rooted", b"ROOT-SECRET", mode=0o600, owner="root")
  scene.run("echo plain > f")
  _flip(scene, "f", "/tmp/rooted")
  end, seen = time.monotonic() + _RACE, set()
  while time.monotonic() < end:
    try:
      seen.add(scene.sandbox.read_file("f"))
    except SandboxError as error:
      _refused(scene, error)
  scene.expect(b"ROOT-SECRET" not in seen, "a link was followed by read_file")


def _download_race(scene: Scene) -> None:
  """A tree whose directories become links while it is fetched."""
  scene.run("mkdir -p t/a/b; echo 1 > t/a/b/f; echo 2 > t/g")
  _flip(scene, "t/a", "/etc")
  end = time.monotonic() + _RACE
  while time.monotonic() < end:
    with _directory() as to:
      try:
        scene.sandbox.download("t", to / "got")
      except (SandboxError, FileNotFoundError) as error:
        scene.note = str(error)[-60:]
      names = {path.name for path in to.rglob("*")}
      scene.expect("passwd" not in names, "a link was followed by download")
      if "passwd" in names:
        return


def _download_links(scene: Scene) -> None:
  """Links to the host's canary, absolute and climbing, files that are no files."""
  scene.run(
    "mkdir t; cd t; ln -s {canary} abs; ln -s ../../../../../..{canary} up; ln -s {directory} dir; "
    "mkfifo fifo; ln -s /dev/zero zero; ln -s . loop; ln /bin/busybox hard; "
    "truncate -s 9G sparse 2>/dev/null; echo ok > file"
  )
  with _directory() as to:
    try:
      scene.sandbox.download("t", to / "got")
    except SandboxError as error:
      _refused(scene, error)
    for path in to.rglob("*"):
      scene.expect(not path.is_symlink(), f"download left a link: {path.name}")
      if path.is_file() and path.stat().st_size < 1 << 20:
        scene.expect(
          scene.canaries.secret.encode() not in path.read_bytes(), "the secret came along"
        )
      scene.expect(path.resolve().is_relative_to(to.resolve()), "download wrote outside")


def _names(scene: Scene) -> None:
  """Names with escapes for a terminal, newlines, and what a host's shell would run."""
  scene.run(
    r"mkdir -p t; cd t; for n in $'\e]0;pwned\a\e[2J' $'a\nb' $'\r\e[31m' '$(touch {directory}/ran)' "
    r"'`id`' '-rf' ';reboot' '..\\..' $'\xff\xfe' ' '; do echo x > \"./$n\"; mkdir \"./$n.d\"; done"
    r"; truncate -s 400M $'\e]0;huge\a'; mkfifo $'\e[5mfifo'"
  )
  with _directory() as to:
    for remote in ("t", "t/\x1b]0;huge\x07", "t/\x1b[5mfifo", "t/\x1b]0;none\x07"):
      try:
        scene.sandbox.download(remote, to / f"got{len(list(to.iterdir()))}")
      except SandboxError as error:
        _refused(scene, error)
      except OSError as error:
        scene.note = f"refused: {error.strerror}"


def _deep(scene: Scene) -> None:
  """A tree deeper than a path, and one wider than memory would like."""
  scene.run("/tmp/payload deep", 10)
  with _directory() as to:
    try:
      scene.sandbox.download(".", to / "got", max_bytes=1 << 20)
    except SandboxError as error:
      _refused(scene, error)
    except OSError as error:
      scene.note = f"refused: {error.strerror}"


def _hard_link(scene: Scene) -> None:
  """A hard link to a file of root's, which the host then overwrites or reads for the agent."""
  scene.sandbox.write_file("/tmp/rooted", b"ROOT", mode=0o600, owner="root")
  scene.run("ln /tmp/rooted hard; ln /etc/passwd pass")
  with contextlib.suppress(SandboxError):
    scene.sandbox.write_file("hard", b"agent")
    scene.sandbox.write_file("pass", b"agent")
  scene.expect(scene.sandbox.read_file("/tmp/rooted") == b"ROOT", "a hard link was written through")
  scene.expect(b"root:" in scene.sandbox.read_file("/etc/passwd"), "passwd was written through")


def _pipes(scene: Scene) -> None:
  """Named pipes and devices where the host expects files: nothing may hang."""
  scene.run(
    "mkfifo p; ln -s /dev/zero z; ln -s /proc/self/mem m; ln -s p q; mkdir -p d/p; mkfifo d/f"
  )
  start = time.monotonic()
  for name in ("p", "z", "m", "q", "d", "d/f", "/dev/zero", "/proc/1/environ", "/proc/kmsg"):
    try:
      data = scene.sandbox.read_file(name, 1 << 20)
      scene.expect(len(data) <= 1 << 20, f"{name} was read without bound")
    except SandboxError as error:
      _refused(scene, error)
  with contextlib.suppress(SandboxError):
    scene.sandbox.write_file("p", b"x")
  scene.expect(time.monotonic() - start < 20, "reading a pipe hung")


def _upload_race(scene: Scene) -> None:
  """An upload of a tree into a directory that becomes a link."""
  scene.run("mkdir -p up/sub")
  _flip(scene, "up/sub", "/tmp")
  with _directory() as source:
    (source / "sub").mkdir()
    for i in range(30):
      (source / "sub" / f"uploaded{i}").write_text("x")
    end = time.monotonic() + _RACE
    while time.monotonic() < end:
      try:
        scene.sandbox.upload(source, "up")
      except SandboxError as error:
        _refused(scene, error)
  scene.expect("uploaded" not in scene.run("ls /tmp"), "a link led an upload astray")


def _spool(scene: Scene) -> None:
  """The file that keeps a long output is replaced by a link to a file of root's beforehand."""
  scene.sandbox.write_file("/tmp/rooted", b"ROOT", mode=0o600, owner="root")
  scene.run("for i in $(seq 60); do ln -s /tmp/rooted /tmp/output-$i.txt; done")
  scene.run("head -c 200000 /dev/zero")
  scene.run(
    "for i in $(seq 60 120); do mkdir /tmp/output-$i.txt; mkfifo /tmp/output-1$i.txt; done; rm -rf /tmp/output-6*"
  )
  scene.run("head -c 200000 /dev/zero")
  scene.expect(
    scene.sandbox.read_file("/tmp/rooted") == b"ROOT", "a kept output went through a link"
  )


def _cwd(scene: Scene) -> None:
  """The work directory itself is removed or replaced by a link to /etc."""
  scene.run("cd /; rm -rf /work; ln -s /etc /work; mkdir -p /work 2>/dev/null; ls -ld /work")
  with contextlib.suppress(SandboxError):
    scene.sandbox.write_file("raced", b"x", owner="root")
  scene.expect("raced" not in scene.run("ls /etc"), "the work directory led a write astray")


def _environment(scene: Scene) -> None:
  """Nothing of the host's environment may be seen inside."""
  os.environ["ROME_CANARY"] = scene.canaries.secret
  output = scene.run(
    "env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'; cat /proc/*/cmdline | tr '\\0' ' '"
  )
  scene.expect(scene.canaries.secret not in output, "the host's environment is seen inside")


ATTACKS: list[Attack] = [
  Attack(
    "write_file through a directory that becomes a link", _KIND, "host", _write_race, quick=True
  ),
  Attack("read_file of a file that becomes a link", _KIND, "host", _read_race),
  Attack("upload into a directory that becomes a link", _KIND, "host", _upload_race),
  Attack("download of directories that become links", _KIND, "host", _download_race),
  Attack("download of links, pipes, sparse files", _KIND, "host", _download_links, quick=True),
  Attack("names that act on terminals and shells", _KIND, "host", _names, quick=True),
  Attack("download of a tree deeper than any path", _KIND, "host", _deep),
  Attack("hard links to root's files", _KIND, "host", _hard_link),
  Attack("pipes and devices where files are expected", _KIND, "host", _pipes),
  Attack("the file of a long output taken beforehand", _KIND, "host", _spool),
  Attack("the work directory replaced by a link", _KIND, "host", _cwd),
  Attack("the environment of the host", _KIND, "host", _environment),
]
