"""Notes: plain files of the project that last."""

from rome.agent.tools.notes import note_tools, read_todo
from rome.agent.workspace import Workspace


def test_the_list_of_tasks_lasts(tools, workspace, sandbox):
  assert tools["todo"]().text == "[the list is empty]" and read_todo(workspace) == ""
  items = [{"text": "find\nit", "state": "done"}, {"text": "mend it", "state": "in_progress"}]
  tools["shell"](command="mkdir sub; cd sub")
  said = tools["todo"](items=[*items, {"text": "test \x1b[31m", "state": "pending"}]).text
  assert said == "- [x] find it\n- [~] mend it\n- [ ] test \\x1b[31m"
  other = Workspace(sandbox)
  assert note_tools(other)[0].run({}).text == said == read_todo(other)
  other.close()
  assert tools["shell"](command="head -1 /work/.rome/todo.md").text == "- [x] find it"
  assert tools["todo"](items=[]).text == "[the list is empty]"


def test_facts_are_lines_among_what_people_wrote(tools):
  memory = tools["memory"]
  assert memory(action="add", fact="tests: make\ntest").text == "noted in ROME.md"
  tools["shell"](command="(echo '# Project'; echo; cat ROME.md; echo '- theirs') > x; mv x ROME.md")
  memory(action="add", fact="two")
  assert memory(action="add", fact="two").text == "it is there already"
  assert memory(action="remove", fact="tests: make test").text == "removed in ROME.md"
  assert tools["shell"](command="cat ROME.md").text == "# Project\n\n- theirs\n- two"
  result = memory(action="remove", fact="three")
  assert result.outcome == "error" and result.text.endswith("there are:\n- theirs\n- two")


def test_notes_that_cannot_be_written_are_said(tools):
  tools["shell"](command="mkdir ROME.md; mkfifo fifo; mkdir .rome; ln -s ../fifo .rome/todo.md")
  assert "is a directory" in tools["memory"](action="add", fact="x").text
  assert "pipe" in tools["todo"]().text
  assert "no regular file" in tools["todo"](items=[]).text
