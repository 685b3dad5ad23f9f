"""Attacks on the judge: files that the agent leaves, which tests in another sandbox then read.

Nothing of the agent runs there, so only what lies in files can act: on bash, on the interpreters and
tools that tests use, on the copying itself. Tests that fail must stay failed.
"""

from experiments.isolation_attacks.attack import USERS, Attack, Scene
from rome.envs import snapshot
from rome.envs.sandbox import SandboxError

_KIND = "judge"
_TESTS = (
  'id -u; cd /work && ls -laR . | tail -n 3; for f in *; do [ -f "$f" ] && head -c 1000 "$f" > /dev/null; done; '
  '[ "$(timeout 2 cat goal 2>/dev/null)" = 42 ] && exit 0; exit 3'
)
# As the tests of a task would: in the languages, with whatever lies where they are run.
_LANGUAGES = (
  "id -u; cd /work; type -p python3 node perl awk git > /dev/null || true; "
  "if type -p python3 > /dev/null; then python3 -c 'import json, hashlib, ssl; raise SystemExit(3)'; [ $? = 3 ] || exit 0; "
  "python3 -I -c 'import json; raise SystemExit(3)'; [ $? = 3 ] || exit 0; fi; "
  "if type -p node > /dev/null; then cd / && node -e 'require(\"fs\"); process.exit(3)'; [ $? = 3 ] || exit 0; cd /work; fi; "
  "if type -p perl > /dev/null; then perl -e 'use strict; exit 3'; [ $? = 3 ] || exit 0; fi; "
  "if type -p awk > /dev/null; then awk 'BEGIN { exit 3 }'; [ $? = 3 ] || exit 0; fi; "
  "bash -c 'exit 3'; [ $? = 3 ] || exit 0; sh -c 'exit 3'; [ $? = 3 ] || exit 0; exit 3"
)
_EVIL = (
  "py='import os; os.write(1, b\"forged\"); os._exit(0)'; "
  "for v in 3.9 3.10 3.11 3.12 3.13; do for d in ~/.local /work/.local /root/.local /.local; do "
  'mkdir -p $d/lib/python$v/site-packages; echo "$py" > $d/lib/python$v/site-packages/usercustomize.py; '
  'echo "import os; $py" > $d/lib/python$v/site-packages/evil.pth; done; '
  'mkdir -p /etc/python$v /usr/local/lib/python$v/dist-packages; echo "$py" > /etc/python$v/sitecustomize.py; '
  'echo "$py" > /usr/local/lib/python$v/dist-packages/sitecustomize.py; echo "$py" > /usr/lib/python$v/json/__init__.py; done; '
  "mkdir -p /etc/perl /etc/alternatives /work/node_modules/fs ~/.node_modules/fs /node_modules/fs; echo 'print qq(forged); exit 0; 1;' | tee /etc/perl/strict.pm "
  "> /usr/local/share/perl/strict.pm; printf '#!/bin/sh\necho forged; exit 0\n' > /etc/evil; chmod 755 /etc/evil; "
  "for a in awk nawk java which cc; do ln -sf /etc/evil /etc/alternatives/$a; done; "
  "echo 'process.exit(0)' | tee /work/node_modules/fs/index.js ~/.node_modules/fs/index.js > /node_modules/fs/index.js; "
  "printf 'openssl_conf = x\n[x]\nengines = e\n[e]\nq = q\n[q]\ndynamic_path = /etc/evil\n' > /etc/ssl/openssl.cnf; "
  "printf '[core]\nfsmonitor = /etc/evil\npager = /etc/evil\n' | tee ~/.gitconfig > /etc/gitconfig; "
  "for f in ~/.bashrc ~/.profile ~/.bash_profile ~/.inputrc ~/.curlrc ~/.pythonrc /etc/bash.bashrc /etc/profile /etc/environment; do "
  "echo 'echo forged; exit 0' > $f; done; echo /work/evil.so > /etc/ld.so.preload; echo 42 > /work/nogoal"
)


def _judge(scene: Scene, command: str, tests: str = _TESTS, timeout: float = 8.0) -> None:
  """The attack, then the tests in the judge: they fail, or it is said that there is no verdict."""
  scene.run(f"({command}) 2> /dev/null", timeout)
  judge = scene.judge()
  try:
    snapshot.transplant(scene.sandbox, judge)
  except SandboxError as error:
    scene.note = f"not copied: {str(error)[-60:]}"
    scene.expect(
      not any(ord(character) < 32 for character in str(error)), f"control characters: {error!r}"
    )
    return
  for _ in range(2):
    result = judge.verify(tests, timeout=20)
    scene.results.append(result)
    scene.expect(result.exit_code == 3, f"tests that fail with 3 were told as {result.exit_code}")
    scene.expect("forged" not in result.output, "the output of tests was forged")
    scene.expect(result.output.startswith("0\n"), f"not as root: {result.output[:60]!r}")
  scene.expect(judge.stats()["processes"] == 0, "something of the agent runs in the judge")


def _attack(name: str, command: str, tests: str = _TESTS, users: tuple[str, ...] = USERS,
            timeout: float = 8.0) -> Attack:  # fmt: skip
  return Attack(name, _KIND, "shell", lambda s: _judge(s, command, tests, timeout), users)


def _processes(scene: Scene) -> None:
  """Whatever runs in the sandbox, the copy is whole and the judge alone."""
  scene.run(
    "echo 7 > goal; (setsid sh -c 'while :; do echo 42 > goal; echo 42 > goal2; mv goal2 goal; done' > /dev/null 2>&1 &) ; "
    "(setsid sh -c 'while :; do mkdir -p a/b/c; mv a/b d; rm -rf a d; done' > /dev/null 2>&1 &) ; sleep 0.2; rm -f goal"
  )
  _judge(scene, "true", tests="id -u; sleep 0.3; a=$(cat goal 2>/dev/null); sleep 0.3; "
         "[ \"$a\" = \"$(cat goal 2>/dev/null)\" ] && exit 3; exit 0")  # fmt: skip


ATTACKS: list[Attack] = [
  _attack("start-up files and modules of every interpreter", _EVIL, tests=_LANGUAGES),
  _attack("fifos, sockets and links where files are read",
          "mkfifo goal p; ln -s /dev/zero z; ln -s /dev/full f; ln -s /dev/tty t; ln -s /proc/self/mem m; "
          "ln -s /proc/1/root r; ln -s loop loop; ln -s {canary} c; ln -s /run/rome/sock s; mkfifo -m 777 /tmp/fifo"),
  _attack("huge sparse files", "for i in 1 2 3 4 5 6 7 8 9; do truncate -s 30M $i; done; truncate -s 8E huge; truncate -s 31M goal"),
  _attack("names that act on shells and terminals",
          r"""for n in $'a\nb' $'\e]0;x\a' '$(exit 0)' '`id`' '-rf' '--help' '*' ';exit 0' ' ' $'\xff' goal$'\n'; do echo 42 > "./$n"; mkdir "./$n.d"; done"""),
  _attack("a tree deeper than any path", "/tmp/payload deep", timeout=15),
  _attack("more names than can be kept", "mkdir n; /tmp/payload inodes n", timeout=15),
  _attack("setuid and setgid files, odd modes and owners",
          "cp /bin/bash su; chmod 6755 su; cp /bin/bash goal; chmod 000 goal; mkdir -m 000 closed; chown 0:0 su; "
          "chmod 7777 /tmp /work; chown 1234:5678 closed; touch -d @99999999999 old; touch -d @-99999999 older"),
  _attack("the system's own places replaced",
          "rm -rf /tmp /run /root /etc/passwd /var; ln -s /work /tmp; ln -s /work /run; ln -s /work /root; mv /etc /etc2; ln -s /work /etc; "
          "mv /bin /bin2; ln -s /work /bin; rm -rf /work; ln -s /tmp /work; echo 42 > /work/goal2; mkdir /.rome-home /.rome-links; "
          "echo 'exit 0' > /.rome-home/.bashrc; cp /tmp/payload /bin/bash; cp /tmp/payload /bin/id"),
  _attack("the work directory closed or gone", "cd /; chmod 000 /work; rm -rf /work; echo x > /work",
          tests="id -u; exit 3"),
  _attack("hard links and attributes in mass",
          "echo x > one; for i in $(seq 300); do ln one l$i; done; for i in $(seq 50); do setfattr -n user.a$i -v $i one; "
          "setfattr -n user.overlay.opaque -v y .; setfattr -n user.overlay.redirect -v /etc one; done; "
          "python3 -c \"import os\nfor i in range(60): os.setxattr('one', 'user.b%d' % i, b'x' * 60000)\""),
  _attack("memory and disk nearly full", "head -c 15000000 /dev/urandom > full; head -c 99999999 /dev/zero > /dev/shm/x; "
          "(setsid /tmp/payload heap 150 > /dev/null 2>&1 &) ; sleep 0.3"),
  Attack("processes that write while it is copied", _KIND, "shell", _processes, ("agent",)),
]  # fmt: skip
