"""Instances are numbered, the splits are disjoint, and the user's own tasks take their place."""

import pytest

from rome.envs import FAMILIES, Task, TaskError, TaskFile, save_task
from rome.rollout import TasksConfig, TaskSource


def own_task(name):
  return Task(
    id=name, family="mine", instruction=f"Do {name}.", files={"a": TaskFile(b"x\n")},
    tests="[ -e done ]\n", solution=("touch done",),
  )  # fmt: skip


@pytest.fixture
def own(tmp_path):
  for split, names in (("train", ("b", "a")), ("held_out", ("c",))):
    for name in names:
      save_task(own_task(name), tmp_path / split / name)
  return tmp_path


def test_families_take_turns():
  source = TaskSource(TasksConfig(families=("find", "count")))
  assert [source.get("train", i).id for i in range(5)] == [
    *("find/0", "count/0", "find/1", "count/1", "find/2")
  ]
  assert source.get("held_out", 3).id == "count/1000001"


def test_a_number_is_always_the_same_instance():
  a, b = TaskSource(TasksConfig()), TaskSource(TasksConfig())
  assert [a.get("train", i) for i in (0, 7, 40)] == [b.get("train", i) for i in (0, 7, 40)]
  assert len({a.get("train", i).family for i in range(len(FAMILIES))}) == len(FAMILIES)


def test_no_instance_is_in_both_splits():
  source = TaskSource(TasksConfig())
  question = {
    split: {(t.instruction, t.solution) for t in (source.get(split, i) for i in range(240))}
    for split in ("train", "held_out")
  }
  assert not question["train"] & question["held_out"]
  with pytest.raises(ValueError, match="unknown split 'test'"):
    source.get("test", 0)


def test_own_tasks_by_name_and_round_again(own):
  source = TaskSource(TasksConfig(train_dir=str(own / "train"), held_out_dir=str(own / "held_out")))
  assert [source.get("train", i).id for i in range(5)] == ["a", "b", "a", "b", "a"]
  assert source.get("held_out", 9) == own_task("c")


def test_a_directory_of_no_tasks(own):
  for missing in (own / "nowhere", own / "train" / "a" / "files"):
    with pytest.raises(TaskError, match=f"no task directories in {missing}; each needs task.toml"):
      TaskSource(TasksConfig(train_dir=str(own / "train"), held_out_dir=str(missing)))


def test_an_unusable_task_is_found_at_the_start(own):
  (own / "held_out" / "c" / "tests.sh").unlink()
  with pytest.raises(TaskError, match="held_out/c' has no tests.sh"):
    TaskSource(TasksConfig(train_dir=str(own / "train"), held_out_dir=str(own / "held_out")))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"families": ("count", "cuont")}, r"tasks.families must be among count, .*'cuont'"),
    ({"families": ()}, "tasks.families must be among"),
    ({"train_dir": "x"}, "tasks.train_dir and tasks.held_out_dir must be given together"),
    ({"held_out_dir": "x"}, "tasks.train_dir and tasks.held_out_dir must be given together"),
  ],
)
def test_contradictions(change, message):
  with pytest.raises(ValueError, match=message):
    TasksConfig(**change)
