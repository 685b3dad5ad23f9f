"""Finding files and text, and names that nobody expects."""

import os

import pytest

from rome.agent.tools.find import MOST, find_tools

TREE = """
mkdir -p src/sub .hidden node_modules 'new
line' .git
echo 'def f(): # 42' > src/a.py; echo 'x = 42;' > src/sub/b.js; echo 42 > .git/c
echo 42 > node_modules/m; echo 42 > .hidden/h; echo 42 > 'new
line/k'; printf '42\\0\\n' > binary; mkfifo fifo; ln -s src to_src
touch $'esc\\e[31m' $'byte\\xff' "it's"
"""


@pytest.fixture
def tree(tools):
  assert tools["shell"](command=TREE).outcome == "ok"
  return tools


@pytest.mark.parametrize(
  ("pattern", "path", "found"),
  [
    ("**/*.{py,js}", ".", ["src/a.py", "src/sub/b.js"]),
    ("*.py", "src", ["src/a.py"]),
    ("/work/src/*", ".", ["/work/src/a.py", "/work/src/sub"]),
    (".*", ".", [".git", ".hidden"]),
    ("[ein]*", ".", ["$'esc\\x1b[31m'", "it's", "$'new\\x0aline'", "node_modules"]),
    ("byte*", ".", ["$'byte\\xff'"]),
    ("$(touch bad)`touch bad`;touch bad", ".", ["[nothing matches]"]),
    ("bad", ".", ["[nothing matches]"]),
  ],
)
def test_glob(tree, pattern, path, found):
  assert tree["glob"](pattern=pattern, path=path).text.split("\n") == found


def test_list(tree):
  lines = [line.split(maxsplit=2) for line in tree["list"]().text.split("\n")]
  kinds = {name: (kind, size) for kind, size, name in lines}
  assert kinds["src"] == ("dir", "-") and kinds["binary"] == ("file", "4")
  assert kinds["fifo"][0] == "pipe" and kinds["to_src"][0] == "link"
  assert kinds["$'new\\x0aline'"][0] == "dir" and len(kinds) == 11
  assert tree["list"](path="src/sub").text.split() == ["file", "8", "b.js"]
  tree["shell"](command="mkdir mine; chmod 0 mine")
  for path, says in (("src/a.py", "no directory"), ("x", "no such"), ("mine", "permission denied")):
    assert says in tree["list"](path=path).text


def test_search(tree):
  assert tree["search"](pattern=r"\b\d\d").text.split("\n") == [
    ".hidden/h:1:42",
    "src/a.py:1:def f(): # 42",
    "src/sub/b.js:1:x = 42;",
  ]
  assert tree["search"](pattern="DEF F", path="src", ignore_case=True).text == (
    "src/a.py:1:def f(): # 42"
  )
  assert tree["search"](pattern="42", include="*.js", path="to_src").text == (
    "to_src/sub/b.js:1:x = 42;"
  )
  assert tree["search"](pattern="42", path="node_modules").text == "node_modules/m:1:42"
  assert tree["search"](pattern="nothing at all").text == "[nothing matches]"
  assert tree["search"](pattern="-e").text == "[nothing matches]"
  tree["shell"](command="seq 9 > n; cd src")
  assert tree["search"](pattern="5", path="../n", context=1).text == (
    "../n-4-4\n../n:5:5\n../n-6-6"
  )


@pytest.mark.parametrize("pattern", ["(", "[", "a\0", "\ud800", "a" * 5000])
def test_a_pattern_that_is_none_is_said(tree, pattern):
  result = tree["search"](pattern=pattern)
  assert result.outcome != "ok" and len(result.text) < 300


def test_results_have_their_bound(tools):
  tools["shell"](command="mkdir d; cd d; for i in $(seq 3000); do echo 7 > file_number_$i; done")
  for name, arguments in (("glob", {"pattern": "*"}), ("list", {}), ("search", {"pattern": "7"})):
    result = tools[name](**arguments)
    lines = result.text.split("\n")
    assert result.facts["truncated"] and len(lines) == MOST + 1, name
    assert "narrow it down" in lines[-1]
  assert "200 of 3000" in tools["list"]().text
  tools["shell"](command="for i in $(seq 300); do printf %0250d $i > $i; done")
  assert len(tools["search"](pattern="0").text) < 16_000


def test_neither_programs_nor_long_lines_hide_what_is_found(tools):
  tools["shell"](
    command="cp /bin/busybox a; (yes x | head -c 3000000 | tr -d '\\n'; echo) > b; echo x > c"
  )
  lines = tools["search"](pattern="x").text.split("\n")
  assert [line[:4] for line in lines] == ["b:1:", "c:1:"]
  assert len(lines[0]) < 420 and lines[0].endswith("xxx [...]")


def test_an_expression_that_never_ends_is_stopped(tools, workspace):
  (search,) = [t for t in find_tools(workspace, timeout=1.0) if t.name == "search"]
  tools["shell"](command="yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa | head -n 20000 > f")
  result = search.run({"pattern": r"(a*)*\1b"})
  assert result.outcome == "timeout" and "longer than 1 s" in result.text
  huge = search.run({"pattern": "((((a{1,255}){1,255}){1,255}){1,255})"})
  assert huge.outcome in ("error", "timeout")
  assert tools["search"](pattern="b").text == "[nothing matches]"


def test_names_go_through_the_tools_as_they_are(tree):
  for name in ("esc\x1b[31m", "byte\udcff", "new\nline/k", "it's"):
    assert tree["write"](path=name, content="x").outcome == "ok"
    assert tree["read"](path=name).text == "1\tx"
  assert os.fsencode("byte\udcff") == b"byte\xff"
