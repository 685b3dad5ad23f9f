"""Long outputs in files; what a context can lose without losing anything."""

import pytest

from rome.agent.executor import Executor
from rome.agent.model import ModelReply
from rome.agent.skills import Compress, Lossless, Spill
from rome.agent.tools.base import ToolResult
from rome.agent.tools.builtin import builtin_tools
from tests.agent.skills.places import play, texts, use

DONE = ModelReply("done")


def pointer(text):
  return text.split("all of it is in ")[1].split(" ...]")[0]


def test_a_long_output_is_whole_in_the_file_that_is_pointed_at(place):
  executor = Executor(builtin_tools(place), observers=[Spill(place, limit=1000, size=300)])
  _, requests, _ = play(
    executor, [], use("shell", command="seq 1 900"), use("shell", command="seq 5"), DONE
  )
  long, short = requests[1].messages[-1]["content"], requests[2].messages[-1]["content"]
  assert short == "1\n2\n3\n4\n5"
  assert len(long) < 500 and long.startswith("1\n2\n") and long.endswith("899\n900")
  kept = place.read(pointer(long)).data.decode()
  assert kept == "\n".join(map(str, range(1, 901)))
  told = int(long.split("[... ")[1].split()[0])
  assert (
    len(kept) - told == len(long) - len(long.split("\n[...")[1].split("...]\n")[0]) - 12 or told
  )


def test_an_output_that_the_sandbox_cut_points_at_the_file_that_has_it(place):
  executor = Executor(builtin_tools(place), observers=[Spill(place, limit=1000, size=300)])
  _, requests, _ = play(executor, [], use("shell", command="seq 1 9000"), DONE)
  text = requests[1].messages[-1]["content"]
  assert len(text) < 500
  found = place.run(f"wc -l < {pointer(text)}").output
  assert found.strip() == "9000"


def test_a_file_that_cannot_be_written_is_no_failure_of_the_infrastructure(place):
  place.run("mkdir -p ro/.rome && chmod 500 ro/.rome && chmod 500 ro")
  observer = Spill(place, 100, 50)
  before, place.root = place.root, f"{place.root}/ro"
  try:
    result = observer(builtin_tools(place)[0], {}, ToolResult("x\n" * 200))
  finally:
    place.root = before
  assert "characters left out ...]" in result.text and "spilled" not in result.facts


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 9, "limit": 8}])
def test_bad_settings_are_named(place, wrong):
  with pytest.raises(ValueError, match="Spill: size"):
    Spill(place, **wrong)


def test_superseded_reads_go_and_long_results_move_to_files(place):
  place.write(f"{place.root}/a", b"first\n" * 30)
  place.write(f"{place.root}/b", b"other\n" * 30)
  executor = Executor(builtin_tools(place))
  lossless = Lossless(place, executor.tools, limit=200, recent=1)
  _, requests, context = play(
    executor,
    [lossless],
    use("read", path="a"),
    use("read", path="b"),
    use("read", path="a"),  # the same again
    use("edit", path="b", old="other\n" * 30, new="new\n"),
    use("shell", command="seq 100"),
    use("read", path="none"),
    use("read", path="b"),
    DONE,
  )
  before = [m for m in context.messages if m["role"] == "tool"]
  after = [m for m in lossless.edit(context.messages) if m["role"] == "tool"]
  assert after[0]["content"] == "[dropped: read again below]"
  assert after[1]["content"] == "[dropped: changed since]"
  assert place.read(pointer(after[2]["content"])).data.decode() == before[2]["content"]
  assert after[3] == before[3] and after[5:] == before[5:]
  assert place.read(pointer(after[4]["content"])).data.decode() == before[4]["content"]
  assert [m["tool_call_id"] for m in after] == [m["tool_call_id"] for m in before]
  assert requests[-1].messages[-1]["content"].endswith("new")  # the loop itself edited nothing


def test_compression_ends_with_what_loses_nothing_where_that_is_enough(place):
  place.write(f"{place.root}/a", b"line\n" * 120)
  executor = Executor(builtin_tools(place))
  lossless = Lossless(place, executor.tools, limit=100, recent=1)
  left = []
  skills = [lossless, Compress(lossless=lossless, archive=left.extend)]
  replies = [use("read", path="a")] * 4 + [DONE]
  _, requests, context = play(executor, skills, *replies, limit=3600)
  assert context.row == 1 and {r.purpose for r in requests} == {"turn"}
  assert sum("[dropped: read again below]" in text for text in texts(requests[-1])) == 2
  assert all("line" in m["content"] for m in left) and {m["role"] for m in left} == {"tool"}
