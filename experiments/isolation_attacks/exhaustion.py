"""Attacks that use up what is shared: processes, memory, disk, descriptors, output, processors."""

from experiments.isolation_attacks.attack import Attack, Scene, c, command, node, python

_KIND = "exhaustion"
# Every place that can be written at all, whatever its name.
_FILL = (
  "for d in / /work /tmp /dev /dev/shm /run /var/tmp /root /etc /home /proc /sys $HOME; do "
  "[ -d $d ] && (head -c 300000000 /dev/zero > $d/fill.{token}) 2>&1; done; "
  "find / -xdev -maxdepth 3 -type d -writable 2>/dev/null | while read -r d; do "
  "(head -c 300000000 /dev/zero > $d/more) 2>&1; done | tail -n 3; df 2>&1 | tail -n 3"
)


def _sparse(scene: Scene) -> None:
  scene.run("truncate -s 8E huge || truncate -s 1T huge || truncate -s 30M huge; echo x >> huge")
  try:
    scene.expect(len(scene.sandbox.read_file("huge", 1 << 20)) <= 1 << 20, "read a sparse bomb")
  except Exception as error:
    scene.note = f"read_file refused: {type(error).__name__}"


def _endless_file(scene: Scene) -> None:
  """A file that grows while it is read."""
  scene.run("(while :; do echo grows; done > endless) & sleep 0.2")
  data = scene.sandbox.read_file("endless")
  scene.expect(len(data) <= 16 << 20, "a growing file was read beyond its bound")


ATTACKS: list[Attack] = [
  command("fork bomb", _KIND, "shell", "b() { b | b & }; b; sleep 1"),
  command("fork bomb of subshells that ignore signals", _KIND, "shell",
          "trap '' HUP INT TERM; f() { trap '' HUP INT TERM; f & f & wait; }; f"),
  c("fork bomb of detached processes", _KIND, "forks", quick=True),
  c("exponential forks", _KIND, "grow"),
  c("thread bomb", _KIND, "threads"),
  c("zombie flood", _KIND, "zombies"),
  python("fork bomb", _KIND, "import os, time\nend = time.time() + 2\n"
         "while time.time() < end:\n  try:\n    os.fork()\n  except OSError as e:\n    print(e); time.sleep(.01)"),
  node("child process bomb", _KIND, "const {spawn} = require('child_process');\n"
       "for (let i = 0; i < 400; i++) { const p = spawn('sleep', ['20'], {detached: true});"
       " p.on('error', e => { if (i > 395) console.log(e.code); }); }"),
  c("memory bomb: heap", _KIND, "heap", timeout=10, quick=True),
  c("memory bomb: page tables", _KIND, "tables", timeout=10),
  c("memory bomb: memory files", _KIND, "memfds", timeout=10),
  c("memory bomb: pipe buffers", _KIND, "pipes", timeout=10),
  c("memory bomb: socket buffers", _KIND, "pairs", timeout=10),
  c("memory bomb: locked memory", _KIND, "locked", timeout=10),
  c("memory bomb: shared segments, message queues, semaphores", _KIND, "sysv", timeout=10),
  c("descriptors in flight", _KIND, "flight", timeout=10),
  command("memory bomb: a shell variable", _KIND, "shell", "x=a; while :; do x=$x$x; done", timeout=10),
  python("memory bomb: heap", _KIND, "x = []\nwhile True: x.append(bytearray(1 << 22))", timeout=10),
  node("memory bomb: heap", _KIND,
       "const x = []; for (;;) x.push(Buffer.alloc(1 << 22, 1));", timeout=10),
  command("memory bomb: many processes at once", _KIND, "shell",
          "for i in 1 2 3 4 5 6 7 8; do /tmp/payload heap 60 & done; wait", timeout=10),
  command("fill every writable place", _KIND, "shell", _FILL, timeout=15),
  command("fill with inodes", _KIND, "shell", "for d in /work /tmp /dev/shm / /run /dev; do "
          "[ -w $d ] && mkdir -p $d/n && /tmp/payload inodes $d/n; done", timeout=20),
  command("sparse file", _KIND, "shell", "truncate -s 10E a; truncate -s 10T b; truncate -s 1G c; "
          "dd if=/dev/zero of=d bs=1 count=1 seek=10000000000; ls -ls"),
  Attack("sparse bomb against read_file", _KIND, "host", _sparse),
  Attack("file that grows while it is read", _KIND, "host", _endless_file, users=("agent",)),
  c("very deep directories", _KIND, "deep", timeout=10),
  c("descriptors", _KIND, "fds", quick=True),
  c("limits of the whole host: inotify, terminals, timers, queues, keys, locks", _KIND,
    "instances", timeout=15),
  command("output flood", _KIND, "shell", "yes", timeout=1.5),
  c("endless line", _KIND, "flood 97", timeout=1.5),
  c("flood of NUL bytes", _KIND, "flood 0", timeout=1.5),
  c("flood of bytes that are no text", _KIND, "flood 255", timeout=1.5),
  command("flood from the background", _KIND, "shell",
          "(yes & yes >&2 &) ; sleep 0.5; echo foreground", timeout=3),
  command("processors: many loops, raised priority", _KIND, "shell",
          "for i in $(seq 40); do (nice -n -20 sh -c 'while :; do :; done' &) ; done; sleep 2", timeout=3),
]  # fmt: skip
