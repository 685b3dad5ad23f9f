"""Reading and changing files of a real sandbox, as the agent's user."""

import hashlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rome.agent.tools.builtin import builtin_tools
from rome.agent.tools.files import change
from rome.agent.workspace import MAX_FILE, Refused, Workspace
from rome.envs import Limits
from rome.envs.common import HostDirectory
from rome.envs.sandbox import make_sandbox
from tests.agent.tools.edits_test import EDIT, model

MORE = MAX_FILE + 1


def test_pages(tools):
  tools["shell"](command="seq 10 > n; printf 'a\\r\\nb\\r\\n' > crlf; : > none")
  assert tools["read"](path="n", offset=9).text == "9\t9\n10\t10"
  result = tools["read"](path="n", offset=2, limit=2)
  assert result.text == "2\t2\n3\t3\n[lines 2 to 3 of 10; go on with offset=4]"
  assert result.facts["truncated"] and result.facts["path"] == "/work/n"
  assert "there is no line 11; the file has 10" in tools["read"](path="n", offset=11).text
  assert tools["read"](path="crlf").text == "1\ta\n2\tb\n[lines end in CRLF]"
  assert tools["read"](path="none").text == "[the file is empty]"


def test_a_page_has_its_bound(tools, workspace):
  workspace.write("long", b"x" * 10_000_000 + b"\n" + b"y\n" * 1000)
  workspace.write("lines", b"\n" * 5_000_000)
  shown = tools["read"](path="long", limit=3).text
  assert len(shown) < 2200 and "characters left out" in shown
  assert "\n[lines 1 to 3 of 1001; go on with offset=4]" in shown
  assert len(tools["read"](path="lines", limit=10**9).text) < 31_000
  assert tools["read"](path="lines", offset=4_999_999).text == "4999999\t\n5000000\t"


def test_what_is_no_text_is_data(tools):
  tools["shell"](
    command="printf 'a\\xff\\e[31m\\n' > f; printf 'a\\0' > b; printf '\\xff' > $'n\\xff'"
  )
  assert tools["read"](path="f").text == "1\ta\\xff\\x1b[31m"
  assert "binary file of 2 bytes" in tools["read"](path="b").text
  assert tools["read"](path="n\udcff").text == "1\t\\xff"
  assert tools["edit"](path="f", old="a", new="b").outcome == "ok"
  assert tools["shell"](command="od -c f | head -1").text.split()[1:4] == ["b", "377", "033"]


def test_writing_keeps_modes_and_follows_links(tools):
  tools["shell"](command="echo x > s; chmod 755 s; ln -s s l; touch -d '2001-01-01' s")
  assert tools["write"](path="l", content="y\n").text == "wrote l, 2 bytes"
  told = tools["shell"](command="ls -l | cut -c1-10; cat s; find s -newer /bin/bash; ls -A")
  assert told.text.split() == ["total", "4", "lrwxrwxrwx", "-rwxr-xr-x", "y", "s", "l", "s"]
  assert tools["write"](path="deep/er/f", content="").outcome == "ok"
  assert tools["shell"](command="stat -c '%a %U' deep/er/f").text == "644 agent"


ODD = {
  "nope": "no such file",
  "d": "is a directory",
  "fifo": "device, pipe or socket",
  "to_fifo": "device, pipe or socket",
  "dangling": "no such file",
  "loop": "no such file",
  "/dev/zero": "device, pipe or socket",
  "/dev/tty": "device, pipe or socket",
  "/proc/self/mem": "error",
  "/proc/1/mem": "permission denied",
  "/proc/cpuinfo": "as in /proc",
  "/etc/shadow": "error",
  "mine": "permission denied",
  "roots": "permission denied",
  "hidden/key": "no such file",
  "../../../etc/secret": "permission denied",
  "": "path is empty",
  "a\0b": "holds a NUL",
  "\ud800": "unpaired surrogate",
  "x" * 300: "no such file",
  "y/" * 3000: "longer than 4000 bytes",
}


@pytest.fixture
def odd(sandbox, tools):
  tools["shell"](
    command="mkdir d; mkfifo fifo; ln -s fifo to_fifo; ln -s gone dangling; ln -s loop loop; "
    "echo > mine; chmod 0 mine"
  )
  root = sandbox.session("root", user="root")
  root.run(
    "cd /work; for f in roots /etc/secret; do echo key > $f; chmod 600 $f; done; "
    "mkdir hidden; echo key > hidden/key; chmod 700 hidden"
  )
  yield
  root.close()


def test_what_cannot_be_read_is_said_and_holds_nothing_up(odd, tools):
  for path, says in ODD.items():
    result = tools["read"](path=path)
    assert result.outcome in ("error", "invalid_arguments") and says in result.text, path
    assert "key" not in result.text.replace("hidden/key", "") and len(result.text) < 900


def test_what_cannot_be_written_is_said(odd, tools):
  paths = ["d", "fifo", "to_fifo", "/dev/zero", "/proc/1/mem", "/etc/passwd", "/bin/bash", "roots"]
  for path in [*paths, "hidden/new", "/new", "mine/x", "", "a\0b", "\ud800", "/work/"]:
    result = tools["write"](path=path, content="x")
    assert result.outcome in ("error", "invalid_arguments"), path
  assert tools["write"](path="f", content="\ud800").outcome == "invalid_arguments"
  assert "rome-" not in tools["shell"](command="ls -A /work /tmp").text
  assert tools["shell"](command="bash -c 'ls -l /etc/passwd'").outcome == "ok"


@pytest.mark.parametrize("pause", [":", "sleep 0.02"], ids=["all the time", "with pauses"])
def test_no_race_of_names_reads_what_the_agent_may_not(sandbox, tools, pause):
  """A process of the agent swaps a file of its own for a directory with root's."""
  root = sandbox.session("root", user="root")
  root.run("mkdir /work/b; echo topsecret > /work/b/f; chmod 600 /work/b/f; chown agent /work/b")
  swap = "mv a c; mv b a; mv a b; mv c a"
  tools["shell"](
    command="mkdir a; echo mine > a/f; "
    f"(while :; do for i in 1 2 3 4 5; do {swap}; done; {pause}; done) & "
  )
  outcomes = {tools["read"](path="/work/a/f").text for _ in range(100)}
  assert not [text for text in outcomes if "topsecret" in text]
  if pause != ":":  # without one, a busy machine may never find the file where it was
    assert "1\tmine" in outcomes
  root.close()


def test_paths_go_on_where_a_restored_shell_is(sandbox, tools, workspace):
  tools["shell"](command="mkdir d; cd d; echo 1 > f")
  assert tools["read"](path="f").text == "1\t1"
  snapshot = sandbox.snapshot()
  tools["shell"](command="cd /; rm -r /work/d")
  sandbox.restore(snapshot)
  workspace.forget()
  assert workspace.changed() == [] and tools["read"](path="f").text == "1\t1"


def test_a_known_digest_of_what_the_agent_may_not_read_shows_nothing(sandbox, tools):
  """Its processes say it in the place of the second shell's answer."""
  root = sandbox.session("root", user="root")
  root.run("echo topsecret > /work/z; chmod 600 /work/z")
  forged = f"{hashlib.sha256(b'topsecret' + bytes([10])).hexdigest()} L3dvcmsveg=="  # /work/z
  forge = f"while :; do for p in /proc/[0-9]*; do echo '{forged}' > $p/fd/1; done; done"
  tools["shell"](command=f"echo mine > f; ({forge}) > /dev/null 2>&1 &")
  told = {"1\tmine"}
  for _ in range(1000):
    if len(told) > 1:  # it has come between
      break
    told.add(tools["read"](path="f").text)
  told |= {tools["read"](path="f").text for _ in range(30)}
  assert len(told) > 1 and "1\ttopsecret" not in told
  root.close()


def test_no_answer_that_the_agent_forges_is_believed(sandbox, tools, workspace):
  """Its processes may write into the second shell's output; whatever they say is a refusal."""
  forged = ["x", "Li4=", "644 Li4=", "644 " + "QQ" * 3000, "0 AAAA", "a" * 64 + " L2V0Yy9zaGFkb3c="]
  tools["shell"](command="echo mine > f")
  for line in forged:
    forge = f"while :; do for p in /proc/[0-9]*; do echo '{line}' > $p/fd/1; done; done"
    tools["shell"](command=f"({forge}) > /dev/null 2>&1 & forger=$!")
    for _ in range(4):
      for result in (
        tools["read"](path="f"),
        tools["list"](),
        tools["write"](path="g", content=""),
      ):
        assert result.outcome in ("ok", "error", "timeout") and "root" not in result.text
    tools["shell"](command="kill $forger")


def test_a_file_that_somebody_else_changes(tools, workspace):
  tools["shell"](command="echo one > f; echo two > g")
  tools["read"](path="f"), tools["read"](path="g")
  assert workspace.changed() == []
  tools["shell"](command="echo 1 >> f; rm g")
  assert tools["edit"](path="f", old="no", new="1").outcome == "error"  # it showed nothing of it
  assert workspace.changed() == ["/work/f", "/work/g"]
  assert "changed the file since you read it" in tools["edit"](path="f", old="one", new="1").text
  assert workspace.changed() == ["/work/g"]
  with pytest.raises(Refused, match="changed since it was read"):
    workspace.write("f", b"", expected="0" * 64)
  assert workspace.read("f").data == b"1\n1\n"


@settings(
  max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text("ab\n\udcff", max_size=8), st.lists(EDIT, min_size=1, max_size=3))
def test_edits_of_a_file_are_all_made_or_none(tools, workspace, text, edits):
  workspace.write("f", text.encode("utf-8", "surrogateescape"))
  result = tools["multi_edit"](path="f", edits=edits)
  wanted = model(text, edits)
  assert (result.outcome == "ok") == (wanted is not None)
  left = text if wanted is None else wanted
  assert workspace.read("f").data == left.encode("utf-8", "surrogateescape")


def test_a_full_disk_is_a_result(tools):
  tools["shell"](command="echo x > f; dd if=/dev/zero of=full bs=1M")
  result = tools["write"](path="f", content="y" * 500_000)
  assert result.outcome == "error" and "No space left" in result.text
  assert tools["read"](path="f").text == "1\tx"
  assert ".rome-" not in tools["shell"](command="ls -A").text


def test_a_directory_of_the_host(tmp_path):
  """Files of the person who runs the agent, and nothing beside them."""
  inside, outside = tmp_path / "project", tmp_path / "outside"
  inside.mkdir()
  outside.write_text("theirs\n")
  (inside / "run").write_text("echo 1\n")
  (inside / "run").chmod(0o750)
  (inside / "link").symlink_to(outside)
  with make_sandbox(backend="bubblewrap", directory=HostDirectory(str(inside), ())) as sandbox:
    workspace = Workspace(sandbox)
    tools = {tool.name: tool.run for tool in builtin_tools(workspace)}
    assert tools["edit"]({"path": "run", "old": "1", "new": "2"}).outcome == "ok"
    assert tools["write"]({"path": "sub/new", "content": "x"}).outcome == "ok"
    assert "no such file" in tools["read"]({"path": "link"}).text
    for path in ("link", "../outside"):
      tools["write"]({"path": path, "content": "mine"})
    workspace.close()
  assert (inside / "run").read_text() == "echo 2\n" and (
    inside / "run"
  ).stat().st_mode & 0o777 == 0o750
  assert (inside / "sub/new").read_text() == "x" and outside.read_text() == "theirs\n"
  assert sorted(path.name for path in inside.iterdir()) == ["link", "run", "sub"]


@pytest.mark.slow
def test_edit_of_ten_megabytes():
  with make_sandbox(backend="bubblewrap", limits=Limits(disk_mb=64)) as sandbox:
    workspace = Workspace(sandbox)
    data = b"0123456789abcde\n" * (10 << 16) + b"unique\n"
    workspace.write("big", data)
    result = change(workspace, "big", [{"old": "unique", "new": "changed"}])
    assert result.text == "edited big, line 655361"
    assert workspace.read("big").data == data.replace(b"unique", b"changed")
    workspace.run("truncate -s 17M big")
    for refused in (lambda: workspace.read("big"), lambda: workspace.write("f", b"x" * MORE)):
      with pytest.raises(Refused, match="larger than 16 MiB"):
        refused()
