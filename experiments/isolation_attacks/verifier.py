"""Attacks on the verdict: whatever an agent leaves behind, tests run as they are and tell the truth."""

from experiments.isolation_attacks.attack import Attack, Scene

_KIND = "tests"
# Truth is that nothing was solved: `goal` is missing. The secret of the tests is never on disk.
_TESTS = 'PRIVATE=tests-secret; id -u; echo "cwd $PWD"; [ "$(cat goal 2>/dev/null)" = 42 ] && exit 0; exit 3'


def _tamper(scene: Scene, command: str, timeout: float = 3.0, tests: str = _TESTS) -> None:
  """The attack, then the tests: they must fail with their own status, and so say twice."""
  scene.run(command, timeout)
  for _ in range(2):
    result = scene.sandbox.verify(tests, timeout=20)
    scene.results.append(result)
    scene.expect(result.exit_code == 3, f"tests that fail with 3 were told as {result.exit_code}")
    scene.expect("forged" not in result.output, "the output of tests was forged")
    scene.expect(
      result.output.startswith("0\n"), f"tests do not run as root: {result.output[:80]!r}"
    )


def _attack(name: str, command: str, *, language: str = "shell", tests: str = _TESTS,
            users: tuple[str, ...] = ("agent", "root"), quick: bool = False) -> Attack:  # fmt: skip
  return Attack(name, _KIND, language, lambda s: _tamper(s, command, tests=tests), users, quick)


_DAEMON = (
  "cat > /tmp/daemon <<'X'\n#!/bin/sh\ntrap '' HUP INT TERM\nwhile :; do echo 42 > /work/goal.tmp; "
  "for t in /work/test* /work/verify* /tmp/test* /proc/*/fd/250; do echo 'echo forged; exit 0' > $t; done 2>/dev/null; "
  "if ls /work/*.sh >/dev/null 2>&1; then echo 42 > /work/goal; fi; done\nX\n"
  "chmod 755 /tmp/daemon; setsid /tmp/daemon > /dev/null 2>&1 & (setsid setsid /tmp/daemon &) ; sleep 0.2"
)
_STARTUP = (
  "for f in ~/.bashrc ~/.bash_profile ~/.profile ~/.bash_logout /root/.bashrc /root/.profile /etc/profile "
  "/etc/bash.bashrc /work/.env /etc/environment; do echo 'echo forged; exit 0' > $f; done 2>/dev/null; "
  "export BASH_ENV=/work/.bashrc ENV=/work/.bashrc PROMPT_COMMAND='exit 0' PS4='$(exit 0)' SHELLOPTS; "
  "export PYTHONSTARTUP=/work/p.py PYTHONPATH=/work NODE_OPTIONS='--require /work/p.js' PERL5OPT=-Mx; "
  "echo 'raise SystemExit(0)' | tee sitecustomize.py usercustomize.py p.py json.py os.py > /dev/null; "
  "echo 'process.exit(0)' > p.js"
)
_PATH = (
  "mkdir -p bin; for c in id cat echo test [ bash sh ls env; do printf '#!/bin/sh\\necho forged; exit 0\\n' > bin/$c; "
  "cp bin/$c ./$c; done 2>/dev/null; chmod 755 bin/* cat id; export PATH=/work/bin:/work:.:$PATH; hash -r; "
  "alias cat='echo 42' id='echo forged'; cat() { echo 42; }; export -f cat; "
  "cp bin/* /usr/local/bin/; cp bin/* /usr/local/sbin/"
)
_LIBRARIES = (
  "echo /work/evil.so > /etc/ld.so.preload; export LD_PRELOAD=/work/evil.so LD_LIBRARY_PATH=/work LD_AUDIT=/work/evil.so; "
  "printf '#!/bin/sh\\nexit 0\\n' > evil.so; echo /work > /etc/ld.so.conf; ls -l /etc/ld.so.preload"
)
_SHELL = (  # by a static program that prints what was wanted and exits with 0
  "for s in /bin/bash /usr/bin/bash /bin/sh /usr/bin/sh /bin/cat /bin/id /usr/bin/cat /usr/bin/id; do "
  "cp -f /tmp/payload $s.new && mv -f $s.new $s; done; /bin/bash"
)


def _exit_trap(scene: Scene) -> None:
  """Processes that are stopped, ignore signals, or were orphaned stay out of the verifier's way."""
  _tamper(
    scene,
    "for i in 1 2 3 4; do (trap '' HUP INT TERM QUIT; setsid sh -c 'while :; do echo 42 > /work/goal; "
    "sleep 0.01; done' &) ; done; sleep 0.2; kill -STOP -1; rm -f goal",
    tests="rm -f goal; sleep 0.3; id -u; ls goal; [ -e goal ] && exit 0; exit 3",
  )


def _secret(scene: Scene) -> None:
  """Tests are nowhere to be read while the agent lives, nor afterwards."""
  scene.sandbox.verify("PRIVATE=tests-secret-$((1 + 1)); sleep 0.1; exit 3")
  scene.sandbox.verify("# tests-secret-mark\nexit 3")
  output = scene.run(
    "grep -rl 'tests-secret-mar[k]' /work /tmp /dev/shm /root /run /var 2>/dev/null; "
    "cat /proc/[0-9]*/environ /proc/[0-9]*/fd/* 2>/dev/null < /dev/null | grep -a 'tests-secret-mar[k]'",
    3,
  )
  scene.expect("tests-secret-mark" not in output, "the tests can be read by the agent")


def _waiting(scene: Scene) -> None:
  """Tests that fail early must not be made to hang or to lose their status by what lies there."""
  _tamper(
    scene,
    "rm -rf goal; mkfifo goal; mkdir -p /tmp/x; cd /tmp/x; rmdir /tmp/x; touch -- '-rf' '--help' '$(exit 0)'",
    tests="id -u; [ -p goal ] && exit 3; timeout 2 cat goal; exit 3",
  )


ATTACKS: list[Attack] = [
  _attack("daemons that wait for the tests", _DAEMON, quick=True),
  _attack("start-up files and variables of every interpreter", _STARTUP),
  _attack("PATH, aliases, exported functions", _PATH, quick=True,
          tests='id -u; [ "$(cat goal 2>/dev/null)" = 42 ] && exit 0; exit 3'),
  _attack("LD_PRELOAD and ld.so.preload", _LIBRARIES),
  _attack("the shell itself and other programs replaced", _SHELL, quick=True),
  _attack("a fork bomb during the tests", "b() { b | b & }; b"),
  _attack("C processes that are everywhere", "/tmp/payload forks & sleep 0.5", language="c"),
  _attack("memory nearly used up", "(setsid /tmp/payload heap 150 &) ; sleep 0.3", language="c"),
  _attack("the disk full", "head -c 100000000 /dev/zero > full; head -c 100000000 /dev/zero > /tmp/full; "
          "head -c 99999999 /dev/zero > /dev/shm/full"),
  _attack("a forged exit status on the way", "(while :; do /tmp/payload forge; done > /dev/null 2>&1) & sleep 0.2", language="c"),
  _attack("limits and masks inherited by the tests", "ulimit -n 5; ulimit -u 1; ulimit -f 0; ulimit -v 1000; umask 777; "
          "trap 'exit 0' EXIT; set -o noexec"),
  _attack("Python daemon with inotify-like polling", "python3 -c \"\nimport os, time\nif os.fork(): os._exit(0)\nos.setsid()\n"
          "end = time.time() + 20\nwhile time.time() < end:\n  for d in ('/work', '/tmp'):\n    for n in os.listdir(d):\n"
          "      if n.startswith('t'):\n        open('/work/goal', 'w').write('42')\"; sleep 0.2", language="python"),
  _attack("Node daemon that watches the directory", "cat > w.js <<'X'\nconst fs = require('fs');\n"
          "fs.watch('/work', () => fs.writeFileSync('/tmp/seen', '42'));\nsetTimeout(() => process.exit(), 20000);\nX\n"
          "(setsid node w.js > /dev/null 2>&1 &) ; sleep 0.3", language="node"),
  Attack("stopped, orphaned and deaf processes", _KIND, "shell", _exit_trap),
  Attack("reading the tests", _KIND, "shell", _secret),
  Attack("pipes and names in the way of the tests", _KIND, "shell", _waiting),
]  # fmt: skip
