"""Skills over a sandbox in which the agent works against them: a crash would end a run."""

import gzip
import io
import tarfile

import pytest

from rome.agent.executor import Executor
from rome.agent.model import ModelReply
from rome.agent.skills import Compress, Environment, Recall, Remind
from rome.agent.skills.recall import _unpacked
from rome.agent.tools.builtin import builtin_tools
from rome.agent.tools.notes import read_todo
from tests.agent.skills.places import play, use, workspace

DONE = ModelReply("done")


@pytest.fixture
def place():
  with workspace() as found:
    yield found


def test_a_todo_list_that_cannot_be_read_is_none(place):
  skills = [Compress(todo=lambda: read_todo(place)), Remind(every=1, todo=lambda: read_todo(place))]
  executor = Executor(builtin_tools(place))
  turns = [use("shell", command="mkdir -p .rome/todo.md"), use("todo"), use("shell", command="ls")]
  long = use("shell", command="seq 1000")
  outcome, requests, _ = play(
    executor, skills, *turns, long, ModelReply("a summary"), DONE, limit=4000
  )
  assert outcome.reason == "answered" and outcome.text == "done"
  assert "it is a directory" in requests[2].messages[-2]["content"]


def test_a_look_that_other_processes_write_into(place):
  """All sessions are of one user, who can write to the descriptors of them all."""
  noise = 'while :; do for f in /proc/[0-9]*/fd/[0-9]*; do echo "now x" > $f; done; done'
  environment = Environment(place)
  executor = Executor(builtin_tools(place), [environment.gate])
  turns = [use("shell", command=f"({noise}) >/dev/null 2>&1 & echo begun")]
  turns += [use("write", path=f"{i}.txt", content="a") for i in range(8)]
  outcome, _, _ = play(executor, [environment], *turns, DONE)
  assert outcome.reason == "answered"


def test_a_list_of_files_that_is_forged(place):
  line = "a b c ./x.txt\\n1 2 3 ./y\\n1 2 99999999999 ./z"
  noise = f'mkdir -p .rome; while :; do printf "{line}" > .rome/recall; done'
  assert place.run(f"({noise}) >/dev/null 2>&1 &").exit_code == 0
  recall = Recall(place)
  outcomes = {recall.search("word").outcome for _ in range(8)}
  assert outcomes <= {"ok", "error"}


@pytest.mark.parametrize("forged", [{"GNU.sparse.map": "x", "GNU.sparse.size": "3"}, {}])
def test_an_archive_that_is_forged_is_empty(forged):
  """Python's tarfile raises more than its own error."""
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
    member = tarfile.TarInfo("a")
    member.size, member.pax_headers = 3, forged
    archive.addfile(member, io.BytesIO(b"abc"))
  assert _unpacked(gzip.compress(stream.getvalue())) == ({} if forged else {"a": b"abc"})
