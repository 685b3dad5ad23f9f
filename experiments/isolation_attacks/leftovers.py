"""Attacks on the next episode: what is left after a reset, and what processes outlive it.

Closed TCP connections of the loopback stay in the kernel's list for a minute (TIME-WAIT); they hold
two port numbers and are left out of the comparison.
"""

from experiments.isolation_attacks.attack import Attack, Scene
from rome.envs.sandbox import Sandbox

_KIND = "leftovers"
# What an episode can see of the one before: files everywhere, processes, IPC, settings.
_LOOK = (
  "pwd; id; umask; env | sort; alias; declare -F; jobs; ulimit -a; hostname; "
  "ls -lanR /work /tmp /dev/shm /root /home /var /run /etc /mnt 2>&1 | grep -v '^total'; "
  "ls /dev /; ps -o user,comm 2>/dev/null | grep -vE ' (ps|grep|bash)$'; "
  "for f in shm msg sem; do tail -n +2 /proc/sysvipc/$f; done; cut -d' ' -f 1-3 /proc/mounts | sort; "
  "ip addr 2>/dev/null; tail -n +2 /proc/net/tcp | grep -v ' 06 '; tail -n +2 /proc/net/unix | grep -c @; "
  "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shmmax"
)


def _look(sandbox: Sandbox) -> str:
  """All of it: a long output would be kept in a file, which would be seen itself."""
  sandbox.run(f'text=$({_LOOK}); printf "%s\\n" "$text" > /tmp/look', 20)
  return sandbox.read_file("/tmp/look").decode(errors="replace")


def _leave(scene: Scene, command: str, timeout: float = 5.0) -> None:
  """Looks, attacks, resets, looks again: there must be no difference."""
  scene.reset()
  before = _look(scene.sandbox)
  _prepare(scene)
  scene.run(command, timeout)
  scene.reset()
  after = _look(scene.sandbox)
  if before != after:
    lines = sorted(set(after.splitlines()) ^ set(before.splitlines()))
    scene.claim(f"after a reset something is different: {lines[:4]}")
  scene.expect(scene.sandbox.stats()["processes"] <= 1, "processes outlived a reset")


def _prepare(scene: Scene) -> None:
  from experiments.isolation_attacks.runner import payload

  scene.sandbox.write_file("/tmp/payload", payload().read_bytes(), mode=0o755)


def _attack(name: str, command: str, *, language: str = "shell", quick: bool = False,
            timeout: float = 5.0) -> Attack:  # fmt: skip
  return Attack(name, _KIND, language, lambda scene: _leave(scene, command, timeout), quick=quick)


ATTACKS: list[Attack] = [
  _attack("files, modes, owners and attributes everywhere",
          "for d in / /work /tmp /dev/shm /root /home /var /etc /run /mnt /usr/bin; do (mkdir -p $d/left/deep; echo x > $d/left/f; "
          "echo x > $d/.hidden; chmod 0 $d/left; chmod 777 $d; touch -d 2001-01-01 $d; setfattr -n user.x -v 1 $d; "
          "chattr +i $d/left/f) 2>/dev/null; done; cd /tmp; export LEFT=1; alias left=ls; umask 0", quick=True),
  _attack("shared memory, message queues, semaphores", "/tmp/payload sysv", language="c", quick=True),
  _attack("a flood of daemons", "/tmp/payload forks", language="c"),
  _attack("a flood of zombies", "(setsid /tmp/payload zombies &) ; sleep 0.3", language="c"),
  _attack("daemons that restart each other",
          "echo 'while :; do sh /tmp/d.sh & sleep 0.05; done' > /tmp/d.sh; (setsid sh /tmp/d.sh > /dev/null 2>&1 &) ; sleep 0.4"),
  _attack("a tree deeper than any path", "/tmp/payload deep", language="c", timeout=20),
  _attack("hundreds of thousands of files", "for d in a b c; do mkdir $d; /tmp/payload inodes $d; done", language="c", timeout=20),
  _attack("programs and settings of the root layer",
          "rm -f /bin/ls /etc/passwd; echo 'x:x:0:0::/:/bin/sh' >> /etc/passwd; cp /bin/busybox /bin/bash; "
          "echo 1 > /etc/left; rm -rf /usr/bin /etc/hosts; ip addr add 127.7.7.7/8 dev lo; echo '1024 1030' > /proc/sys/net/ipv4/ip_local_port_range"),
  _attack("listeners, locks and sockets", "for i in 1 2 3 4 5; do (setsid nc -l -p 333$i 127.0.0.1 > /dev/null 2>&1 &) ; done; "
          "touch lock; (setsid flock lock sleep 30 &) ; mkfifo pipe; (setsid cat pipe > /dev/null &) ; sleep 0.2"),
  _attack("Python processes with open, deleted files", "python3 -c \"\nimport os, time\nif os.fork(): os._exit(0)\nos.setsid()\n"
          "f = open('/tmp/gone', 'w'); os.unlink('/tmp/gone'); f.write('x' * 5000000); f.flush(); time.sleep(30)\"", language="python"),
  _attack("a Node server", "cat > s.js <<'X'\nrequire('http').createServer(() => {}).listen(4444, '127.0.0.1');\nX\n"
          "(setsid node s.js > /dev/null 2>&1 &) ; sleep 0.4", language="node"),
]  # fmt: skip
