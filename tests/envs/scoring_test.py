"""The families in real sandboxes: solutions pass, nothing and near misses fail, every time."""

import dataclasses

import pytest

from rome.envs import families, sandbox, scoring, task

SEEDS = [*range(14), *range(families.HELD_OUT_FIRST_SEED, families.HELD_OUT_FIRST_SEED + 6)]


@pytest.fixture(
  scope="module",
  params=["bubblewrap", pytest.param("podman", marks=pytest.mark.slow)],
)
def box(request):
  with sandbox.make_sandbox(backend=request.param) as made:
    yield made


@pytest.fixture(scope="module")
def cell():
  with sandbox.make_sandbox(backend="bubblewrap") as made:
    yield made


def _play(made, commands, where):
  where.reset()
  scoring.stage_task(made, where)
  for command in commands:
    where.run(command)
  return scoring.score_task(made, where)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.slow
def test_generated_tasks_are_admitted(family, box):
  for seed in SEEDS:
    assert scoring.check_task(families.generate(family, seed), box) == [], f"{family}/{seed}"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_passing_test_is_silent_and_a_failing_one_says_one_line(family, box):
  made = families.generate(family, 1)
  assert _play(made, made.solution, box) == scoring.Verdict(True, "")
  failed = _play(made, (), box)
  assert not failed.passed and len(failed.output.splitlines()) == 1


# COMMANDS may use the names of the instance: {a} the file asked about, {b} another file of the
# instance, {right} the last command of the reference solution.
NEAR_MISSES = [
  ("count", "touch ans"),
  ("count", "echo > ans"),
  ("count", "wc -l {a} > ans"),
  ("count", "wc -l < {b} > ans"),
  ("count", "wc -c < {a} > ans"),
  ("count", "{right}; echo 1 >> ans"),
  ("count", "{right}; rm {b}"),
  ("count", "{right}; echo x >> {a}"),
  ("count", "mkdir ans"),
  ("count", "mkfifo ans"),
  ("count", "ln -s /etc/passwd ans"),
  ("count", "ln -s /dev/zero ans"),
  ("count", "head -c 4000000 /dev/zero > ans"),
  ("find", "touch ans"),
  ("find", "echo {a} > ans"),
  ("find", "find . > ans"),
  ("find", "find . -name {a} > ans"),
  ("find", "find . -name {b} > ans"),
  ("find", "mv */{a} .; echo ./{a} > ans"),
  ("extract", "touch ans"),
  ("extract", "grep {a} cfg > ans"),
  ("extract", "cp cfg ans"),
  ("extract", "{right}; rm cfg"),
  ("edit", "rm {a}"),
  ("edit", "echo > {a}"),
  ("edit", "sed -i 1d {a}"),
  ("edit", "mkfifo pipe; mv pipe {a}"),
  ("edit", "{right}; cp {a} {b}"),
  ("edit", "{right}; rm {b}"),
  ("permissions", "chmod 777 {a}"),
  ("permissions", "echo x > {a}; {right}"),
  ("permissions", "{right}; chmod 600 {b}"),
  ("permissions", "{right}; rm -f {a}"),
  ("move", "rm {a}"),
  ("move", "mv {a} ..; mv {a} /tmp"),
  ("move", "{right}; echo x > */{a}"),
  ("move", "cp {right_arguments}"),
  ("move", "{right}; ln -s /etc/passwd {a}"),
  ("move", "{right}; rm -f {b} */{b}"),
]


@pytest.mark.parametrize(("family", "command"), NEAR_MISSES)
def test_a_near_miss_fails(family, command, cell):
  made = families.generate(family, 4)
  asked = next(word for word in made.instruction.split() if word.strip("?.") in _names(made))
  asked = asked.strip("?.")
  words = {
    "a": asked,
    "b": next(name for name in sorted(_names(made)) if name != asked),
    "right": made.solution[-1],
    "right_arguments": made.solution[-1].partition(" ")[2],
  }
  verdict = _play(made, [command.format(**words)], cell)
  assert not verdict.passed and len(verdict.output.splitlines()) == 1


def _names(made):
  """What an instruction may ask about: files by name, or the keys of cfg."""
  if made.family == "extract":
    return {line.split("=")[0] for line in made.files["cfg"].data.decode().split()}
  return {path.rpartition("/")[2] for path in made.files}


@pytest.mark.parametrize(
  ("family", "commands"),
  [
    ("count", ["wc -l < {a} > ans"]),
    ("count", ["printf %s $(wc -l < {a}) > ans"]),
    ("count", ["grep -c . {a} > ans"]),
    ("find", ["echo {d}/*/{a} > ans"]),
    ("find", ["find $PWD/{d} -name {a} 2> /dev/null > ans"]),
    ("find", ["cd /", "ls /work/{d}/*/{a} > /work/ans"]),
    ("extract", ["sed -n s/^{a}=//p cfg > ans"]),
    ("extract", [". ./cfg", "echo ${a} > ans"]),
  ],
)
def test_another_way_to_the_right_answer_passes(family, commands, cell):
  made = families.generate(family, 4)
  asked = next(word for word in made.instruction.split() if word.strip("?.") in _names(made))
  below = made.solution[0].split()[1]  # of find: the directory to search
  filled = [c.replace("{a}", asked.strip("?.")).replace("{d}", below) for c in commands]
  assert _play(made, filled, cell) == scoring.Verdict(True, "")


def test_files_arrive_with_mode_owner_and_parents(box):
  files = {"d/e/f": task.TaskFile(b"one\n", 0o640), "g": task.TaskFile(b"\x00\xff", 0o755)}
  made = dataclasses.replace(families.generate("count", 0), files=files)
  box.reset()
  scoring.stage_task(made, box)
  seen = box.run("cat d/e/f; stat -c '%a %U %Y' d/e/f g; stat -c %U d d/e; whoami").output
  mode_lines = seen.splitlines()
  agent = mode_lines[-1]
  assert mode_lines[0] == "one"
  assert [line.split()[:2] for line in mode_lines[1:3]] == [["640", agent], ["755", agent]]
  assert len({line.split()[2] for line in mode_lines[1:3]}) == 1  # a fixed mtime, no clock
  assert mode_lines[3:5] == [agent, agent]
  assert box.read_file(f"{box.workdir}/g") == b"\x00\xff"


def test_tests_run_out_of_reach_of_the_agent(box):
  made = dataclasses.replace(families.generate("count", 0), tests="id -u; pwd; echo $SECRET\n")
  output = _play(made, ["export SECRET=1", "cd /tmp", "alias pwd=false"], box).output
  assert output.split() == ["0", box.workdir]


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"tests": "true"}, "the tests pass although nothing was done"),
    ({"tests": "echo never; false"}, "the reference solution fails: never"),
    ({"tests": "false"}, "the reference solution fails: the tests said nothing"),
    ({"solution": ()}, "there is no reference solution"),
    ({"solution": ("rm -f ans",)}, "the reference solution fails: ans is missing"),
    (
      {"tests": "cat /proc/sys/kernel/random/uuid; [ -e ans ]"},
      "the reference solution did not give the same",
    ),
    ({"tests": "cat /proc/sys/kernel/random/uuid; false"}, "doing nothing did not give the same"),
  ],
)
def test_a_task_that_breaks_the_admission_rule_is_told_why(change, reason, cell):
  made = dataclasses.replace(families.generate("count", 0), **change)
  assert any(line.startswith(reason) for line in scoring.check_task(made, cell))


def test_tests_without_a_verdict_raise(box):
  made = dataclasses.replace(families.generate("count", 0), tests="sleep 60")
  box.reset()
  with pytest.raises(scoring.TestsUnfinished, match="task count/0: the tests gave no verdict"):
    scoring.score_task(made, box, timeout=0.5)
  box.reset()
  assert scoring.check_task(families.generate("count", 0), box) == []
