"""Task directories: what is written is what is read, and every bad one is refused by name."""

import dataclasses
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.envs import families, task

GOOD = task.Task(
  id="mine/1",
  family="mine",
  instruction='Say "héllo"\nin a\\file \x7f.',
  files={
    "a/b.bin": task.TaskFile(bytes(range(256)), 0o640),
    "run.sh": task.TaskFile(b"#!/bin/sh\n", 0o755),
    "empty": task.TaskFile(b"", 0o400),
  },
  tests="[ -s a/b.bin ]\n",
  solution=("true", "echo 'x' > y"),
)


def test_a_saved_task_loads_equal(tmp_path):
  task.save_task(GOOD, tmp_path / "t")
  assert task.load_task(tmp_path / "t") == GOOD


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_generated_task_survives_the_disk(family, tmp_path):
  generated = families.generate(family, 5)
  task.save_task(generated, tmp_path)
  assert task.load_task(str(tmp_path)) == generated


@settings(max_examples=50, deadline=None)
@given(instruction=st.text(min_size=1).filter(str.strip), data=st.binary(max_size=50))
def test_any_text_survives_the_disk(tmp_path_factory, instruction, data):
  made = dataclasses.replace(GOOD, instruction=instruction, files={"f": task.TaskFile(data)})
  directory = tmp_path_factory.mktemp("task")
  task.save_task(made, directory)
  assert task.load_task(directory) == made


def test_the_least_directory_is_a_task(tmp_path):
  directory = tmp_path / "hello"
  (directory / "files").mkdir(parents=True)
  (directory / "task.toml").write_text('instruction = "Greet."\n')
  (directory / "tests.sh").write_text("grep -q hi out\n")
  (directory / "solution.sh").write_text("#!/bin/sh\n\n# greet\necho hi > out\n")
  (directory / "files/tool").write_text("x")
  (directory / "files/note").write_text("y")
  os.chmod(directory / "files/tool", 0o700)
  os.chmod(directory / "files/note", 0o600)
  loaded = task.load_task(directory)
  assert (loaded.id, loaded.family, loaded.instruction) == ("hello", "custom", "Greet.")
  assert loaded.solution == ("echo hi > out",)
  # The umask of the checkout must not show: only the executable bit of the disk counts.
  assert {path: file.mode for path, file in loaded.files.items()} == {"note": 0o644, "tool": 0o755}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"instruction": " \n"}, "instruction is empty"),
    ({"instruction": "x" * 65537}, "longer than 65536"),
    ({"tests": ""}, "tests.sh holds no command"),
    ({"tests": "#!/bin/bash\n  # later\n"}, "tests.sh holds no command"),
    ({"solution": ("",)}, "solution command ''"),
    ({"solution": ("a\nb",)}, "must be one line"),
    ({"family": "Bad name"}, "family 'Bad name'"),
    ({"id": "a\nb"}, "id must be printable"),
    ({"id": ""}, "id must be printable"),
    ({"files": {"../up": task.TaskFile(b"")}}, "'../up' must be a plain path"),
    ({"files": {"/etc/passwd": task.TaskFile(b"")}}, "'/etc/passwd' must be a plain path"),
    ({"files": {"a/../../b": task.TaskFile(b"")}}, "must be a plain path"),
    ({"files": {"a//b": task.TaskFile(b"")}}, "must be a plain path"),
    ({"files": {"./a": task.TaskFile(b"")}}, "must be a plain path"),
    ({"files": {"a/": task.TaskFile(b"")}}, "must be a plain path"),
    ({"files": {"": task.TaskFile(b"")}}, "must be a plain path"),
    ({"files": {"a\nb": task.TaskFile(b"")}}, "must be a plain path"),
    ({"files": {"a\0b": task.TaskFile(b"")}}, "must be a plain path"),
    ({"files": {"a": task.TaskFile(b"", 0o4755)}}, "mode 4755"),
    ({"files": {"a": task.TaskFile(b""), "a/b": task.TaskFile(b"")}}, "both a file and"),
  ],
)
def test_a_bad_task_cannot_be_made(change, message):
  with pytest.raises(task.TaskError, match=message) as error:
    dataclasses.replace(GOOD, **change)
  assert "\n" not in str(error.value)


def _write(name, text):
  return lambda root: (root / name).write_text(text)


def _link(root):
  (root / "files/link").symlink_to("/etc/passwd")


def _fifo(root):
  os.mkfifo(root / "files/pipe")


def _not_utf8(root):
  (root / "tests.sh").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda root: (root / "task.toml").unlink(), "task.toml is missing"),
    (lambda root: (root / "tests.sh").unlink(), "has no tests.sh"),
    (_write("tests.sh", "\n"), "tests.sh holds no command"),
    (_write("task.toml", "instruction = "), "not valid TOML"),
    (_write("task.toml", 'family = "x"'), "instruction is empty"),
    (_write("task.toml", "instruction = 3"), "instruction must be a string"),
    (_write("task.toml", 'instruction = "x"\nmodes = 3'), "modes must be a table"),
    (_write("task.toml", 'instruction = "x"\ntimeout = 3'), "unknown key 'timeout'"),
    (_write("task.toml", 'instruction = "x"\n[modes]\nnone = "644"'), "files/none is not there"),
    (_write("task.toml", 'instruction = "x"\n[modes]\nempty = 644'), "three octal digits"),
    (_write("task.toml", 'instruction = "x"\n[modes]\nempty = "888"'), "three octal digits"),
    (_write("task.toml", 'instruction = "x"\n[modes]\n"../x" = "644"'), "is not there"),
    (_link, "not a regular file"),
    (_fifo, "not a regular file"),
    (_not_utf8, "not UTF-8"),
  ],
)
def test_a_bad_directory_is_refused(damage, message, tmp_path):
  task.save_task(GOOD, tmp_path)
  damage(tmp_path)
  with pytest.raises(task.TaskError, match=message) as error:
    task.load_task(tmp_path)
  assert "\n" not in str(error.value)


def test_a_missing_directory_is_named(tmp_path):
  with pytest.raises(task.TaskError, match="nowhere' does not exist"):
    task.load_task(tmp_path / "nowhere")


def test_saving_overwrites_nothing(tmp_path):
  (tmp_path / "precious").write_text("x")
  with pytest.raises(task.TaskError, match="already holds something"):
    task.save_task(GOOD, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_what_is_saved_is_readable_whatever_its_mode_in_the_sandbox(tmp_path):
  task.save_task(GOOD, tmp_path)
  assert stat.S_IMODE((tmp_path / "files/empty").stat().st_mode) & 0o200
