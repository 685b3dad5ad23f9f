"""Attacks on processes and files inside, on the wire, and on the end-of-command report."""

from experiments.isolation_attacks.attack import Attack, Scene, c, command, node, python

_KIND = "destruction"
_FORGE = "forging"


def _fool_next(scene: Scene, forgery: str, timeout: float = 3.0) -> None:
  """After a forgery the next commands, in this session and in another, report the truth."""
  scene.run(forgery, timeout)
  other = scene.sandbox.session("other")
  for run, who in ((scene.sandbox.run, "this session"), (other.run, "another session")):
    result = run("(exit 7)")
    scene.expect(result.exit_code == 7, f"{who}: exit status 7 was told as {result.exit_code}")
    result = run("pwd; echo true-$((40 + 2))")
    # Processes of the same user may add to a session's output, as background jobs do.
    scene.expect("true-42\n" in result.output, f"{who}: output {result.output[-80:]!r}")
  other.close()
  verdict = scene.sandbox.verify("exit 9")
  scene.expect(verdict.exit_code == 9, f"the verifier's status 9 was told as {verdict.exit_code}")


def _forge(name: str, forgery: str, **options: bool) -> Attack:
  return Attack(name, _FORGE, "shell", lambda scene: _fool_next(scene, forgery), **options)  # type: ignore[arg-type]


def _markers(scene: Scene) -> None:
  """Output that looks like the protocol, in every position."""
  fake = r"printf '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0rome-state 1 0\n1 0 /work\0rome-end\n'"
  before = len(scene.results)
  output = scene.run(f"{fake}; {fake} >&2; (exit 5)")
  scene.expect(scene.results[before].exit_code == 5, "output forged an exit status")
  scene.expect(output.count("rome-state") == 2, "output that looks like a marker was taken for one")
  _fool_next(scene, f"{fake}; {fake}")


def _late(scene: Scene) -> None:
  """A background process goes on writing reports while later commands run."""
  _fool_next(scene, "(while :; do /tmp/payload forge; done > /dev/null 2>&1) & sleep 0.3")


ATTACKS: list[Attack] = [
  command("rm -rf /", _KIND, "shell", "rm -rf --no-preserve-root / 2>&1 | tail -n 3; rm -rf /* 2>&1 | tail -n 3", timeout=10, quick=True),
  command("chmod and chown of everything", _KIND, "shell",
          "chmod -R 000 / 2>&1 | tail -n 2; chown -R 1000 / 2>&1 | tail -n 2", timeout=10),
  command("kill -1", _KIND, "shell", "kill -9 -1; sleep 0.2; echo still", quick=True),
  c("kill(-1)", _KIND, "killall"),
  c("every signal to pid 1", _KIND, "signals", quick=True),
  command("kill of one's own shell and its parents", _KIND, "shell", "kill -9 $PPID; kill -STOP 1; kill -9 $$"),
  command("a shell that stops itself", _KIND, "shell", "kill -STOP $$", timeout=2),
  command("closed descriptors of the shell", _KIND, "shell",
          "for i in $(seq 3 260); do eval \"exec $i>&-\" 2>/dev/null; done; exec 1>&- 2>&-; echo x"),
  command("built-ins and keywords redefined", _KIND, "shell",
          "enable -n printf echo eval builtin; printf() { :; }; builtin() { :; }; eval() { :; }; "
          "mapfile() { :; }; trap 'echo trapped' DEBUG ERR RETURN EXIT; set -eu; shopt -s extdebug; false"),
  python("kill of everything in sight", _KIND,
         "import os, signal\nfor p in sorted((int(d) for d in os.listdir('/proc') if d.isdigit()), reverse=True):\n"
         "  if p != os.getpid():\n    try: os.kill(p, signal.SIGKILL)\n    except OSError as e: print(e)"),
  node("kill of everything in sight", _KIND,
       "const fs = require('fs');\nfor (const d of fs.readdirSync('/proc')) if (/^[0-9]+$/.test(d) && +d != process.pid)\n"
       "  try { process.kill(+d, 'SIGKILL'); } catch (e) { console.log(e.code); }"),
  command("the canary process by its name", _KIND, "shell",
          "for p in /proc/[0-9]*; do if grep -qs {token} $p/cmdline && ! grep -qs grep $p/cmdline && "
          "[ ${p#/proc/} != $$ ]; then case \"$(tr '\\0' ' ' < $p/cmdline)\" in {token}*) kill -9 ${p#/proc/};; esac; fi; "
          "done; kill -9 {hostpid}"),
  _forge("reports to every descriptor of every process", "/tmp/payload forge", quick=True),
  _forge("report to the shell's own descriptors",
         "for s in 0 1 2 3 4 5; do for f in /proc/$$/fd/25* /proc/$PPID/fd/*; do "
         "printf \"$s 0 /work\\0\" > $f; done; done 2>/dev/null; sleep 0.2", quick=True),
  _forge("the shell's variables and traps", "__rome=(99 'echo forged'); trap 'exit 0' EXIT; unset __rome; "
         "printf() { command printf '0 0 /x\\0'; }; exit() { :; }"),
  _forge("a shell replaced by another program", "exec sh -c 'printf \"1 0 /work\\0\" >&254; echo forged; sleep 20'"),
  _forge("a saved state that is not one",
         "printf 'rome-state 1 0\\necho pwned > /work/pwned\\n' > /proc/$$/fd/250; kill -9 $$"),
  Attack("output that looks like the protocol", _FORGE, "shell", _markers, quick=True),
  Attack("reports from the background, for ever", _FORGE, "c", _late),
  Attack("reports from Python to every descriptor", _FORGE, "python", lambda scene: _fool_next(
    scene, "python3 -c \"\nimport os, glob\nfor f in glob.glob('/proc/[0-9]*/fd/*'):\n  try:\n"
    "    d = os.open(f, os.O_WRONLY | os.O_NONBLOCK)\n    os.write(d, b'1 0 /work\\\\0' * 9)\n  except OSError: pass\"")),
  Attack("reports from Node to every descriptor", _FORGE, "node", lambda scene: _fool_next(
    scene, "node -e \"const fs = require('fs'); for (let i = 3; i < 300; i++) try { fs.writeSync(i, '1 0 /work\\\\0'); } catch (e) {}\"")),
]  # fmt: skip
