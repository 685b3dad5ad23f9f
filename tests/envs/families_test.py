"""Families without a sandbox: determinism, sizes, the split (scoring_test.py runs them)."""

import hashlib
import json

import pytest

from rome.envs import families, task

NAMES = list(families.FAMILIES)
COUNT = 2000  # training instances a family; half as many held out


def _digest(made):
  files = {path: [file.data.decode(), file.mode] for path, file in made.files.items()}
  record = [made.id, made.instruction, files, made.solution]
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def test_instances_are_the_same_on_every_machine():
  # A changed literal means that every seed names another task now: old results no longer compare.
  assert {name: _digest(families.generate(name, 7)) for name in NAMES} == GOLDEN


@pytest.mark.parametrize("family", NAMES)
def test_an_instance_is_determined_by_its_seed(family):
  made = [families.generate(family, seed) for seed in range(50)]
  assert made == [families.generate(family, seed) for seed in range(50)]
  assert len({(one.instruction, str(one.files)) for one in made}) == 50
  assert made[17].id == f"{family}/17" and made[17].family == family


@pytest.mark.parametrize("family", NAMES)
def test_instances_are_short_enough_for_a_byte_level_model(family):
  for seed in range(300):
    made = families.generate(family, seed)
    assert made.instruction.isascii() and len(made.instruction) <= 45
    assert 1 <= len(made.solution) <= 2
    assert all(command.isascii() and len(command) <= 31 for command in made.solution)
    assert sum(len(file.data) for file in made.files.values()) < 1024
    assert "ans" not in made.files


def test_no_word_hides_in_another_word_or_in_a_template():
  words = families.LEXICON
  assert len(words) == len(set(words)) == 32
  assert all(word.isascii() and word.islower() and 3 <= len(word) <= 5 for word in words)
  assert not [(a, b) for a in words for b in words if a != b and a in b]
  templates = "How many lines in .txt? Write to ans. the path of value cfg change Make mode Move"
  assert not [word for word in words if word in templates]
  assert len({word[:2] for word in words}) == 32 and len({word[0] for word in words}) == 26


def _questions(family, split, count):
  made = (families.generate(family, families.split_seed(split, index)) for index in range(count))
  return [(one.instruction, one.solution) for one in made]


@pytest.mark.parametrize("family", NAMES)
def test_no_held_out_question_is_asked_in_training(family):
  train = set(_questions(family, "train", COUNT))
  held_out = _questions(family, "held_out", COUNT // 2)
  assert not train & set(held_out)
  # 200 held-out episodes over six families take 34 a family: they must not be a few questions
  # again and again.
  assert len(set(held_out[:34])) >= 25
  assert len(train) >= 250


@pytest.mark.parametrize("family", NAMES)
def test_words_occur_on_both_sides(family):
  for split, least in (("train", 32), ("held_out", 28)):
    text = " ".join(instruction for instruction, _ in _questions(family, split, 600))
    assert sum(word in text for word in families.LEXICON) >= least


def test_every_mode_occurs_on_both_sides():
  for split in ("train", "held_out"):
    seen = {instruction[-4:-1] for instruction, _ in _questions("permissions", split, 300)}
    assert seen == {f"{mode:o}" for mode in families.MODES}


@pytest.mark.parametrize("family", NAMES)
def test_an_answer_cannot_be_guessed_from_the_instruction(family):
  if family in ("edit", "permissions", "move"):
    return  # the instruction says everything there; the difficulty is to do it
  answers = [families.generate(family, seed).solution[-1] for seed in range(500)]
  most = max(answers.count(answer) for answer in set(answers))
  assert most <= 0.06 * len(answers)


def test_splits_are_disjoint_ranges():
  assert families.split_seed("train", 0) == 0
  assert families.split_seed("train", 999_999) == 999_999
  assert families.split_seed("held_out", 0) == 1_000_000
  for split, index, message in (
    ("test", 0, "unknown split 'test'"),
    ("train", 1_000_000, "outside 0 to 999999"),
    ("train", -1, "outside"),
  ):
    with pytest.raises(ValueError, match=message):
      families.split_seed(split, index)


def test_a_task_goes_by_id_directory_or_itself(tmp_path):
  one = families.generate("move", 3)
  assert families.resolve_task(one) is one
  assert families.resolve_task("move/3") == one
  task.save_task(one, tmp_path / "t")
  assert families.resolve_task(str(tmp_path / "t")) == one
  assert families.resolve_task(tmp_path / "t") == one


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("cuont/3", "unknown task family 'cuont'; the families are count, find"),
    ("count", "unknown task 'count': neither a directory nor family/number"),
    ("count/x", "unknown task 'count/x'"),
    ("count/-1", "unknown task 'count/-1'"),
    ("", "unknown task ''"),
    ("/no/where", "unknown task '/no/where'"),
  ],
)
def test_an_unknown_task_is_named_with_what_there_is(name, message):
  with pytest.raises(task.TaskError, match=message):
    families.resolve_task(name)


def test_a_negative_seed_is_refused():
  with pytest.raises(task.TaskError, match="0 or more"):
    families.generate("count", -1)


GOLDEN = {
  "count": "ab967be4e48f8332",
  "find": "4949bd7d56d314fd",
  "extract": "9cfd8ed9ce548cd8",
  "edit": "ddce3c638659c9db",
  "permissions": "159c60a40423916c",
  "move": "aa79ca20e44689ba",
}
