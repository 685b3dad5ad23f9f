r"""`rome agent` in a real terminal: screens of whole sessions, kept in `screens/`.

Each step types and waits for what has to come; then the screen is compared with its file, in which
paths, versions and times are replaced. To make the files anew: REWRITE_SCREENS=1.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

import rome
from tests.agent.raw_server import DONE, chunk, events, serving

ROOT = pathlib.Path(__file__).parents[3]
SCREENS = pathlib.Path(__file__).parent / "screens"
pytestmark = pytest.mark.slow


class Tmux:
  """A terminal of so many columns and rows in which `rome agent` runs."""

  def __init__(self, place, columns, rows, *options, **environment):
    assert shutil.which("tmux"), "no tmux; as root: apt-get install tmux (make test does it)"
    self._place, self._socket = place, str(place.parent / "tmux")
    command = " ".join([sys.executable, "-m", "rome.cli", "agent", *options])
    variables = {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
    self._environment = {**os.environ, **variables, **environment}
    self._tmux(
      "new-session", "-d", "-x", str(columns), "-y", str(rows), f"{command}; echo [ended $?]; cat"
    )

  def _tmux(self, *words):
    command = ["tmux", "-f", "/dev/null", "-S", self._socket, *words]
    done = subprocess.run(
      command, env=self._environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  def type(self, *keys):
    self._tmux("send-keys", *keys)

  def say(self, text):
    self._tmux("send-keys", "-l", text)
    self._tmux("send-keys", "Enter")

  def screen(self, *flags):
    """What is on the screen and above it."""
    return self._tmux("capture-pane", "-p", "-S-", *flags)

  def wait(self, pattern, seconds=30):
    """Waits until the last lines match."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern + r"\s*\Z", screen := self.screen()):
      late = time.monotonic() > deadline or "[ended" in screen
      assert not late, f"{pattern!r} did not come; the screen is:\n{screen}"
      time.sleep(0.05)
    return screen

  def check(self, name):
    """Compares the screen with its file."""
    found = self.screen().rstrip("\n")
    names = (self._place, "PROJECT"), (rome.__version__, "VERSION")
    for what, word in names:
      found = re.sub(r"\n?".join(map(re.escape, str(what))), word, found)
    found = re.sub(r"\d+\.\d s of", "N s of", found)
    found = re.sub(r"has \d+ of", "has N of", found)
    found = re.sub(r"\d+ tokens in", "N tokens in", found)
    found = "\n".join(line.rstrip() for line in found.split("\n")) + "\n"
    path = SCREENS / f"{name}.txt"
    if os.environ.get("REWRITE_SCREENS"):
      path.write_text(found)
    assert found == path.read_text()

  def close(self):
    subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True, timeout=30)


@pytest.fixture
def terminal(project):
  opened = []

  def make(columns, rows, *options, **environment):
    opened.append(Tmux(project, columns, rows, *options, **environment))
    return opened[-1]

  yield make
  for one in opened:
    one.close()


ASKED = r"\[a\]lways:"


def fix_the_bug(screen):
  """From the instruction to a test that passes."""
  screen.wait(r"help\n>")
  screen.say("fix the bug")
  screen.wait(f"test.sh\n.*{ASKED}")
  screen.say("yes")
  screen.wait(f"add.sh\n.*{ASKED}")
  screen.say("y")
  screen.wait(f"test.sh\n.*{ASKED}")
  screen.say("always")
  screen.wait(r"passes\.\n>")


@pytest.mark.parametrize(
  ("columns", "rows", "environment"), [(100, 60, {}), (60, 20, {"NO_COLOR": "1"})]
)
def test_a_bug_is_fixed_and_taken_back(terminal, project, script, columns, rows, environment):
  screen = terminal(columns, rows, script(), **environment)
  fix_the_bug(screen)
  assert "$1 + $2" in (project / "add.sh").read_text()
  screen.check(f"fix_{columns}x{rows}")
  coloured = bool(re.search(r"\x1b\[(\d+;)*3[0-8]", screen.screen("-e")))
  assert coloured == (not environment)
  screen.say("/undo")
  screen.wait(r"restored add.sh\n>")
  assert "$1 - $2" in (project / "add.sh").read_text()
  screen.say("/cost")
  screen.wait(r"of 32768 tokens\n>")
  screen.say("/exit")
  screen.wait(r"\[ended 0\]")
  screen.check(f"end_{columns}x{rows}")
  assert not list(pathlib.Path(os.environ["HOME"], ".rome/sessions").glob("*.undo"))
  assert pathlib.Path(os.environ["HOME"], ".rome/history").stat().st_mode & 0o777 == 0o600


HOSTILE = r"""
- text: "clear \e[2J title \e]0;owned\a copy \e]52;c;b3duZWQ=\a bidi \u202etxt.exe back\b over\rit"
  calls: [{shell: {command: "printf '\\033[31mred\\033]52;c;b3duZWQ=\\007\\rhid\\nend'"}}]
- text: "[bold]no markup[/bold] :smile: <b>"
"""


def test_nothing_that_is_shown_is_obeyed(terminal, project, script):
  screen = terminal(100, 40, script(HOSTILE), "--permission-mode=full")
  screen.wait(r"help\n>")
  screen.say("go")
  screen.wait(r"<b>\n>")
  screen.check("hostile")
  title = screen._tmux("display-message", "-p", "#{pane_title}")
  assert "owned" not in title + screen._tmux("list-buffers")


SLOW = """
rules:
- when: "^wait$"
  calls: [{shell: {command: "echo begun; sleep 86399"}}]
- {when: "^think$", delay: 60, text: Too late.}
- when: "^ls$"
  calls: [{shell: {command: "ls"}}]
- text: Here I am.
"""


def test_ctrl_c_ends_a_turn_and_the_conversation_goes_on(terminal, project, script):
  screen = terminal(80, 40, script(SLOW))
  screen.wait(r"help\n>")
  screen.say("think")
  screen.wait("think")
  time.sleep(0.5)
  screen.type("C-c")
  screen.wait(r"interrupted; the conversation can go on\n>")
  screen.say("wait")
  screen.wait(ASKED)
  screen.say("y")
  time.sleep(1)
  screen.type("C-c")
  screen.wait(r"by the user\]\ninterrupted; the conversation can go on\n>")
  screen.say("ls")
  screen.wait(ASKED)
  screen.say("n")
  screen.wait(r"Here I am\.\n>")
  screen.type("C-c")  # at the prompt it does nothing but take the line away
  screen.say("/nonsense")
  screen.wait(r"/help lists them\n>")
  screen.say("/clear")
  screen.wait(r"the old one is \S+\n>")
  screen.say("/resume")
  screen.wait(r"think\n>")
  screen.type("/to", "Tab")
  screen.wait("> /tools")
  screen.type("Enter")
  screen.wait(r"recall  .*\n>")
  screen.type("Up", "Up", "Enter")
  screen.wait(r"think\n>")
  screen.type("C-d")
  screen.wait(r"\[ended 0\]")


def test_thinking_is_dim_and_the_answer_is_not(terminal, project):
  parts = [chunk({"reasoning": "Let me\x1b[2J "}), chunk({"reasoning": "see."})]
  parts += [chunk({"content": "Here "}), chunk({"content": "I am."}), chunk({}, "stop"), DONE]
  with serving(events(*parts)) as server:
    screen = terminal(80, 20, f"--endpoint={server.url}", "--model=m")
    screen.wait(r"help\n>")
    screen.say("go")
    shown = screen.wait(r"see\.\nHere I am\.\n>")
    assert r"Let me\x1b[2J see." in shown
    coloured = screen.screen("-e").splitlines()
  dim = ["\x1b[2m" in line for line in coloured if "see." in line or "Here" in line]
  assert dim == [True, False]


HIDES = f"""
- calls: [{{shell: {{command: "echo fine  {" " * 2500}; touch planted\\n# a second line"}}}}]
- calls: [{{write: {{path: a.txt, content: "{"x " * 300}planted"}}}}]
- text: Well.
"""


def test_a_yes_is_to_what_is_shown(terminal, project, script):
  screen = terminal(100, 60, script(HIDES))
  screen.wait(r"help\n>")
  screen.say("go")
  shown = screen.wait(f"second line\n.*{ASKED}")
  assert "touch planted\n  | # a second line" in shown
  screen.say("n")
  assert "planted" in screen.wait(f"a.txt\n.*{ASKED}").replace("\n", "").split("+++ a.txt")[1]
  screen.say("n")
  screen.wait(r"Well\.\n>")
