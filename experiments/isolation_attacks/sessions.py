"""Attacks on terminals, open files, snapshots, forks and committed images."""

import contextlib
import dataclasses
import random
import time

from experiments.isolation_attacks.attack import USERS, Attack, Scene
from rome.envs.backends import podman_images
from rome.envs.rocklet import client
from rome.envs.sandbox import SandboxError, SandboxLost, make_sandbox
from rome.envs.snapshot import Snapshot

_TERMINALS, _HANDLES, _SNAPSHOTS = "terminals", "open files", "snapshots"


def _on_terminal(scene: Scene, command: str, timeout: float = 5.0) -> None:
  """The attack from a terminal, while root and the agent each wait for input on one of theirs."""
  users = ("agent", "root") if scene.user == "agent" else ("root",)
  victims = [scene.sandbox.session(f"victim-{user}", user=user, pty=(24, 80)) for user in users]
  for victim in victims:
    victim.start("read -r x; echo got-$x", 60)
  attacker = scene.sandbox.session("attacker", user=scene.user, pty=(24, 80))  # type: ignore[arg-type]
  scene.results.append(attacker.run(scene.fill(command), timeout))
  for victim, user in zip(victims, users, strict=True):
    if user == scene.user and ("kill" in command or "echo" in command):
      victim.close()  # one's own, of the same user
      continue
    with contextlib.suppress(SandboxError):  # its shell was ended, which is said
      victim.send(b"truth\n")
      text, end = "", time.monotonic() + 20
      while time.monotonic() < end:
        progress = victim.poll(5)
        text += progress.output
        if progress.result is not None:
          break
      scene.expect("got-truth" in text, f"{user} on a terminal: {text[-100:]!r}")
      scene.expect("forged" not in text, f"{user} got input that nobody typed: {text[-100:]!r}")
    victim.close()
  with contextlib.suppress(SandboxError):
    attacker.run("stty sane", 5)
  attacker.close()
  result = scene.sandbox.run("(exit 7)")
  scene.expect(result.exit_code == 7, f"exit status 7 was told as {result.exit_code}")


def _terminal(name: str, command: str, language: str = "shell", quick: bool = False) -> Attack:
  return Attack(name, _TERMINALS, language, lambda s: _on_terminal(s, command), USERS, quick)


def _typed_ahead(scene: Scene) -> None:
  """Input that was typed for a program which ended must not become a command."""
  session = scene.sandbox.session("typed", user=scene.user, pty=(24, 80))  # type: ignore[arg-type]
  session.start("sleep 0.3; exit 5", 20)
  with contextlib.suppress(SandboxError):
    session.send(b"echo forged > /work/forged\nexit 0\n\x04\x03")
  end = time.monotonic() + 20
  while session.poll(5).result is None and time.monotonic() < end:
    pass
  result = session.run("(exit 6)")
  scene.results.append(result)
  scene.expect(result.exit_code == 6, f"exit status 6 was told as {result.exit_code}")
  scene.expect("forged" not in scene.run("ls /work"), "input became a command")
  session.close()


def _upload_place(scene: Scene) -> None:
  """The place of an upload changes while its parts arrive."""
  scene.run("mkdir -p d e")
  uploads = []
  for i in range(12):
    with contextlib.suppress(SandboxError):
      uploads.append(scene.sandbox.open_upload(f"d/u{i}", owner="root" if i % 2 else "agent"))
  for upload in uploads:
    with contextlib.suppress(SandboxError):
      upload.write(b"first")
  scene.run(
    "ls -la d; for f in d/.[!.]*; do cat $f; echo forged > $f; ln $f mine; ln -s /etc/passwd $f.x; done; rm -rf d; "
    "ln -s /etc d; mkfifo e/u1; chmod 777 e; kill -STOP -1"
  )
  for upload in uploads:
    try:
      upload.write(b"second")
      upload.finish()
    except SandboxLost:
      raise
    except SandboxError as error:
      scene.note = f"refused: {str(error)[-60:]}"
    finally:
      upload.drop()
  scene.expect("u1" not in scene.run("ls /etc"), "an upload was led astray by a link")


def _download_file(scene: Scene) -> None:
  """A file changes while its parts are read: all of one version, or an error."""
  for change in ("truncate -s 5 f", "rm f; ln -s /etc/passwd f", "echo more >> f", "rm f; mkfifo f",
                 "dd if=/dev/zero of=f bs=1M count=3 conv=notrunc"):  # fmt: skip
    scene.run("rm -f f; head -c 3000000 /dev/zero | tr '\\0' a > f")
    with contextlib.suppress(SandboxError):
      with scene.sandbox.open_download("f") as download:
        first = download.read(0, 1 << 20)
        scene.run(change)
        parts = [first, download.read(1 << 20, 1 << 20), download.read(2 << 20, 1 << 20)]
      scene.expect(set(b"".join(parts)) <= {97}, f"a mixture was read after {change!r}")


def _many_handles(scene: Scene) -> None:
  """Open files without end: a bound is told, and other work goes on."""
  held = []
  scene.run("head -c 3000000 /dev/zero > f")
  try:
    for i in range(200):
      held.append(scene.sandbox.open_upload(f"u{i}"))
      held[-1].write(b"x" * 100_000)
  except SandboxError as error:
    scene.note = f"refused: {str(error)[-60:]}"
  scene.run("kill -9 -1")
  for upload in held:
    upload.drop()
  scene.expect(
    scene.sandbox.run("rm -f f; echo $((40 + 2))").output.endswith("42\n"), "no more work"
  )


def _mutants(scene: Scene) -> None:
  """Snapshots that somebody changed: refused or restored, never a loss of the sandbox."""
  scene.run(
    "mkdir -p a/b; echo x > a/b/f; ln a/b/f a/g; ln -s /etc a/l; mkfifo a/p; rm -f /etc/hosts; truncate -s 1M s"
  )
  snapshot = scene.sandbox.snapshot()
  data, rng, judge = bytes(snapshot.data), random.Random(0), scene.judge()
  evil = [
    data.replace(b"\x01\x00a", b"\x01\x00/"), data.replace(b"\x01\x00a", b"\x02\x00.."),
    data.replace(b"\x04\x00work", b"\x04\x00proc"), data.replace(b"\x04\x00work", b"\x03\x00dev"),
    data.replace(b"/etc", b"\0etc"), data[:-1], data + b"x", data[:8] + data[8:] * 3, b"", data[:9],
    data.replace(b"F", b"Z"), data.replace(b"P", b"D"), data.replace(b"H", b"F"),
  ]  # fmt: skip
  for _ in range(60):
    other = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
      other[rng.randrange(len(other))] = rng.randrange(256)
    evil.append(bytes(other))
  for stream in evil:
    try:
      judge.restore(dataclasses.replace(snapshot, data=memoryview(stream)))
    except SandboxLost:
      raise
    except SandboxError as error:
      scene.note = f"refused: {str(error)[-60:]}"
      scene.expect(
        not any(ord(character) < 32 for character in str(error)), f"control characters: {error!r}"
      )
  judge.reset()
  scene.expect(judge.run("echo $((40 + 2))").output == "42\n", "the sandbox no longer works")


def _state(scene: Scene) -> None:
  """A session's state that is no state: it can do what the agent can, and no more."""
  snapshot = scene.sandbox.snapshot()
  text = (
    b"id -u > /work/who; echo forged > /etc/forged; kill -9 $PPID; kill -9 -1; exit 0\n"
    b"trap 'exit 0' EXIT; exec > /dev/null; printf '0 0 /work\\0' >&254; while :; do :; done\n"
  )
  with contextlib.suppress(SandboxError):
    scene.judge().restore(Snapshot(snapshot.digest, snapshot.image, snapshot.data, text))
  result = scene.judge().run("cat /work/who; ls /etc/forged; (exit 7)", 20)
  scene.results.append(result)
  scene.expect("/etc/forged\n" != result.output[-12:], "a state ran as root")
  verdict = scene.judge().verify("exit 9")
  scene.expect(verdict.exit_code == 9, f"the verifier's status 9 was told as {verdict.exit_code}")


def _stubborn(scene: Scene) -> None:
  """Processes that cannot be halted, or fork while they are."""
  scene.run(
    "(setsid sh -c \"trap '' TSTP CONT; while :; do (sleep 0.01 &) ; done\" > /dev/null 2>&1 &) ; "
    "(setsid sh -c 'while :; do kill -CONT -1; done' > /dev/null 2>&1 &) ; /tmp/payload forks 20 & sleep 0.3"
  )
  try:
    with scene.sandbox.fork() as copy:
      scene.expect(copy.run("echo $((40 + 2))").output == "42\n", "the fork does not work")
      scene.expect(
        copy.verify("ls -d /proc/[0-9]*").output.count("proc") <= 3, "processes came along"
      )
  except SandboxLost:
    raise
  except SandboxError as error:
    scene.note = f"refused: {str(error)[-60:]}"


def _image(scene: Scene, command: str) -> None:
  """The attack is committed, and the image started: what acts there acts in a sandbox as well."""
  scene.run(f"({command}) 2> /dev/null", 10)
  if scene.sandbox.backend != "podman":
    scene.note = "no images here"
    return
  tag = f"rome-attack:{scene.canaries.token[-16:]}"
  try:
    name = scene.sandbox.commit(tag)
  except SandboxLost:
    raise
  except SandboxError as error:
    scene.note = f"refused: {str(error)[-60:]}"
    return
  try:
    with make_sandbox(name, "podman", limits=scene.limits) as made:
      result = made.run(
        "id -u; cat /proc/self/status | grep CapEff; [ -u /su ] && /su -p -c 'id -u'; ls / /run/rome {canary}",
        20,
      )
      scene.results.append(result)
      scene.expect(
        result.output.startswith(("1000\n", "[")), f"not the agent: {result.output[:60]!r}"
      )
      result = made.verify("cat /tmp/x; exit 9", timeout=20)
      scene.results.append(result)
  except SandboxError as error:
    scene.note = f"the image does not start: {str(error)[-60:]}"
  finally:
    podman_images.remove_image(name)


def _commit(name: str, command: str, users: tuple[str, ...] = USERS) -> Attack:
  return Attack(name, _SNAPSHOTS, "host", lambda scene: _image(scene, command), users)


def _committed_mutants(scene: Scene) -> None:
  """Changed streams where rocklet has no user namespace: below the backend's own check."""
  if scene.sandbox.backend != "podman":
    return
  scene.run("mkdir -p a/b; echo x > a/b/f; ln -s {directory} a/l; chmod 4755 a/b/f")
  data, rng = bytes(scene.sandbox.snapshot().data), random.Random(1)
  evil = [data.replace(b"\x04\x00work", b"\x04\x00proc"), data.replace(b"\x01\x00b", b"\x01\x00l"),
          data.replace(b"\x01\x00a", b"\x02\x00..")]  # fmt: skip
  for _ in range(3):
    other = bytearray(data)
    for _ in range(3):
      other[rng.randrange(8, len(other))] = rng.randrange(256)
    evil.append(bytes(other))
  for number, stream in enumerate(evil):
    tag = f"rome-attack:{scene.canaries.token[-16:]}-{number}"
    try:
      name = scene.sandbox._backend.commit(  # type: ignore[attr-defined]
        scene.sandbox.image, tag, scene.limits, memoryview(stream), 30
      )
      podman_images.remove_image(name)
    except (SandboxError, client.RequestError) as error:
      scene.note = f"refused: {str(error)[-60:]}"


ATTACKS: list[Attack] = [
  _terminal("other terminals taken, typed at, given disciplines", "/tmp/payload steal; /tmp/payload terminal", "c", quick=True),
  _terminal("settings that deafen a terminal", "stty raw -isig -icanon min 0; stty 0; stty -F /dev/pts/0 raw; printf '\\033c\\033[6n\\005\\033]0;forged-title\\a' > /dev/null; trap '' HUP INT QUIT TSTP TTOU; sleep 0.2"),
  _terminal("output to every terminal", "for t in /dev/pts/* /dev/tty /dev/console /proc/[0-9]*/fd/[0-2]; do echo untrue > $t; done 2>/dev/null"),
  _terminal("kill of everything from a terminal", "kill -9 -1; kill -STOP -1; kill -9 $PPID"),
  Attack("typed ahead for a program that ended", _TERMINALS, "host", _typed_ahead),
  Attack("the place of an upload changes", _HANDLES, "host", _upload_place, quick=True),
  Attack("a file changes while it is read in parts", _HANDLES, "host", _download_file),
  Attack("open files without end", _HANDLES, "host", _many_handles, ("agent",)),
  Attack("snapshots that somebody changed", _SNAPSHOTS, "host", _mutants, ("agent",)),
  Attack("a session's state that is none", _SNAPSHOTS, "host", _state, ("agent",)),
  Attack("fork of processes that will not halt", _SNAPSHOTS, "shell", _stubborn),
  _commit("image: setuid, devices, odd names and attributes",
          "cp /bin/bash /su; cp /bin/bash su; chmod 6755 /su su; mkfifo p; ln -s {canary} c; touch $'a\\nb' $'\\e[0m' -- '-rf'; "
          "setfattr -n user.overlay.opaque -v y /work; setfattr -n user.overlay.redirect -v /etc /work; "
          "mknod /dev/k c 1 11; mknod k c 1 11; ln -s {directory} /var/dir"),
  _commit("image: the places that the host mounts replaced",
          "rm -rf /run /proc /dev /sys /etc/resolv.conf /etc/hosts; ln -s {directory} /run; mkdir -p /run/rome; "
          "ln -s {canary} /run/rocklet; ln -s {canary} /etc/resolv.conf; ln -s {canary} /etc/hosts; mkdir /etc/hostname; "
          "rm -rf /tmp /work; ln -s {directory} /work; ln -s /proc/1/root /tmp", ("root",)),
  _commit("image: programs and loader replaced",
          "for p in /bin/bash /bin/sh /bin/true /usr/bin/bash /usr/bin/sh; do cp /tmp/payload $p.n; mv -f $p.n $p; done; "
          "echo /x.so > /etc/ld.so.preload", ("root",)),
  _commit("image: sparse files in mass", "for i in $(seq 60); do truncate -s 30M s$i; done", ("agent",)),
  Attack("image: streams that somebody changed", _SNAPSHOTS, "host", _committed_mutants, ("agent",)),
]  # fmt: skip
