"""The search over files and over what left the context."""

import json

from rome.agent.executor import Executor
from rome.agent.model import ModelReply
from rome.agent.skills import Compress, Recall
from rome.agent.tools.builtin import builtin_tools
from tests.agent.skills.places import play, texts, use


def test_the_piece_that_fits_comes_first_with_its_place(place):
  place.run("mkdir -p src .hidden; seq 400 > src/numbers; echo 'the key is 4711' > .hidden/x")
  text = "".join(f"line {i} of nothing\n" for i in range(200)) + "the port of zebra is 8123\n"
  place.write(f"{place.root}/src/notes.txt", text.encode())
  place.write(f"{place.root}/blob", b"zebra\0zebra")
  seen = dict(place.seen)
  recall = Recall(place, shown=2)
  found = recall.search("port zebra").text
  first = found.split("\n## ")[0]
  assert first.startswith("## src/notes.txt, line ") and "zebra is 8123" in first
  assert int(first.split("line ")[1].split("\n")[0]) in range(170, 202)
  assert "4711" not in recall.search("key 4711").text  # hidden files are not searched
  assert "blob" not in found and place.seen == seen  # to search is not to read
  assert recall.search("xylophone").text.startswith("nothing was found")
  assert recall.search("?!").outcome == "invalid_arguments"


def test_it_follows_changes_and_removals(place):
  recall = Recall(place)
  place.run("mkdir -p w; echo 'walrus one' > w/a; echo 'walrus two' > w/b")
  assert {"walrus one", "walrus two"} <= set(recall.search("walrus").text.split("\n"))
  place.run("sleep 1.1; echo 'walrus three' > w/a; rm w/b")
  lines = set(recall.search("walrus").text.split("\n"))
  assert "walrus three" in lines and not lines & {"walrus one", "walrus two"}


def test_many_files_are_listed_in_several_looks(place):
  place.run("mkdir -p m; for i in $(seq 300); do echo walnut$i > m/a_rather_long_name_$i; done")
  assert "walnut 299" not in Recall(place).search("walnut 299").text
  assert "a_rather_long_name_299" in Recall(place, shown=1).search("299 long name").text


def test_what_left_the_context_is_found_through_the_tool(place):
  recall = Recall(place)
  executor = Executor([*builtin_tools(place), recall.tool()])
  skills = [Compress(summary=False, turns=1, archive=recall.archive)]
  replies = [use("shell", command=f"echo secret{i} is {i}{i}; seq 150") for i in range(6)]
  _, requests, context = play(
    executor, skills, *replies, use("recall", query="secret0"), ModelReply("done"), limit=3200
  )
  assert context.row and not any("secret0 is 00" in t for t in texts(requests[-2]))
  assert "secret0 is 00" in texts(requests[-1])[-1] and "earlier, tool" in texts(requests[-1])[-1]
  assert json.loads(requests[-1].messages[-2]["tool_calls"][0]["function"]["arguments"])
