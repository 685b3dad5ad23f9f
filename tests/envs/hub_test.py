"""EnvHub: recipes checked and addressed by content, built once, kept and evicted; git sources."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from rome.envs import hub, owner, recipe
from rome.envs.backends import podman_containers
from rome.envs.backends import podman_images as images
from rome.envs.common import ImageError
from rome.envs.sandbox import make_sandbox

GREETING = """
name = "greeting"
base = "rome-base"
commands = ["mkdir /opt", "cp /etc/greeting /opt/copy", "echo made > /opt/made"]
[files]
"greeting.txt" = "/etc/greeting"
"run.sh" = "/usr/bin/greet"
"""


def write(directory, name, text, **files):
  (directory / name).mkdir(parents=True, exist_ok=True)
  (directory / name / "recipe.toml").write_text(text)
  for file, content in files.items():
    (directory / name / file.replace("_", ".")).write_text(content)


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "recipes"
  write(path, "greeting", GREETING, greeting_txt="hello", run_sh="cat /etc/greeting\n")
  (path / "greeting/run.sh").chmod(0o755)
  write(path, "child", 'name = "child"\nbase = "greeting"\ncommands = ["echo more > /opt/more"]')
  return path


@pytest.fixture
def cleared(source, monkeypatch, tmp_path):
  """Removes the images of the test's own recipes, whose bases must go last."""
  monkeypatch.setattr(hub, "PREFIX", f"localhost/rome-hub-test-{os.getpid()}/")
  yield hub.EnvHub(source)
  hub.evict(0)
  assert not images.list_images(hub.PREFIX)


def test_digest_covers_content_and_bases_only(source, tmp_path):
  first = hub.EnvHub(source)
  tags = {name: first.tag(name) for name in ("greeting", "child")}
  os.utime(source / "greeting/greeting.txt", (1, 1))
  (source / "greeting/unrelated").write_text("x")
  assert {name: hub.EnvHub(source).tag(name) for name in tags} == tags
  (source / "greeting/greeting.txt").write_text("hullo")
  changed = hub.EnvHub(source)
  assert changed.tag("greeting") != tags["greeting"] and changed.tag("child") != tags["child"]
  (source / "greeting/greeting.txt").write_text("hello")
  (source / "greeting/greeting.txt").chmod(0o755)
  assert hub.EnvHub(source).tag("greeting") != tags["greeting"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('name = "x"\nbase = "rome-base"\ncomands = []', "unknown key 'comands'"),
    ('name = "y"\nbase = "rome-base"', "name is 'y', but must be that of its directory"),
    ('name = "x"', "base must be one of rome-base, debian"),
    ('name = "x"\nbase = 3', "base must be a str, not 3"),
    ('name = "x"\nbase = "rome-base"\npackages = ["git"]', "packages need base 'debian'"),
    ('name = "x"\nbase = "debian"\npackages = ["-oX"]', "'-oX' in packages is no name"),
    ('name = "x"\nbase = "rome-base"\ncommands = [""]', "'' in commands is no shell command"),
    ('name = "x"\nbase = "nowhere"', "no recipe 'nowhere' for base"),
    ('name = "x"\nbase = "rome-base"\n[files]\n"../a" = "/a"', "must be a path inside"),
    ('name = "x"\nbase = "rome-base"\n[files]\n"link" = "/a"', "no regular file"),
    ('name = "x"\nbase = "rome-base"\n[files]\n"f" = "a"', "must go to an absolute path"),
    ('name = "x"\nbase = "rome-base"\n[files]\n"f" = "/a/../b"', "must go to an absolute path"),
    ("name = ", "recipe.toml: "),
  ],
)
def test_wrong_recipes_are_named(tmp_path, text, message):
  write(tmp_path, "x", text, f="content")
  (tmp_path / "x/link").symlink_to("/etc/passwd")
  with pytest.raises(recipe.RecipeError, match=message):
    hub.EnvHub(tmp_path)


def test_circles_and_missing_sources_are_named(tmp_path):
  write(tmp_path, "a", 'name = "a"\nbase = "b"')
  write(tmp_path, "b", 'name = "b"\nbase = "a"')
  with pytest.raises(recipe.RecipeError, match="a -> b -> a is a circle"):
    hub.EnvHub(tmp_path)
  with pytest.raises(recipe.RecipeError, match="no directory .*nonexistent with recipes"):
    hub.EnvHub("/nonexistent")
  known = "agent-python, llm, mini-swe-agent, polyglot, python"
  with pytest.raises(ImageError, match=f"no recipe 'rust'; there are {known}"):
    hub.EnvHub().tag("rust")


def git(directory, *args):
  identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
  command = ["git", *identity, "-C", str(directory), *args]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_source_is_pinned_and_read_only(source, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  git(source, "init", "-q")
  git(source, "add", "-A")
  git(source, "commit", "-qm", "one")
  first = hub.EnvHub(f"file://{source}")
  assert first.commit == git(source, "rev-parse", "HEAD")
  directory = first.recipes["greeting"].directory
  assert not directory.is_relative_to(source)
  assert (directory / "greeting.txt").stat().st_mode & 0o222 == 0
  (source / "greeting/greeting.txt").write_text("hullo")
  git(source, "commit", "-qam", "two")
  assert hub.EnvHub(f"file://{source}").tag("greeting") != first.tag("greeting")
  pinned = hub.EnvHub(f"file://{source}", commit=first.commit)
  assert pinned.tag("greeting") == first.tag("greeting")
  with pytest.raises(ImageError, match="git: .*does not exist|git: .*repository"):
    hub.EnvHub(f"file://{tmp_path}/nothing")
  with pytest.raises(ImageError, match="git: "):
    hub.EnvHub("ext::sh://-c touch%20/tmp/x", commit="0" * 40)
  with pytest.raises(ImageError, match="no full commit id"):
    hub.EnvHub(f"file://{source}", commit="--upload-pack=x")


@pytest.mark.slow
def test_is_built_once_and_runs(cleared, monkeypatch):
  builds = []
  real = hub._commit
  monkeypatch.setattr(hub, "_commit", lambda r, *args: (builds.append(r.name), real(r, *args)))
  tags = []
  threads = [threading.Thread(target=lambda: tags.append(cleared.ensure("child"))) for _ in "ab"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=120)
  assert tags == [cleared.tag("child")] * 2 and sorted(builds) == ["child", "greeting"]
  assert cleared.prepull(["greeting", "child"])["child"] == tags[0] and len(builds) == 2
  with make_sandbox(tags[0], backend="podman") as box:
    seen = box.run("greet; cat /opt/copy /opt/made /opt/more; ls -ln /etc/greeting")
  assert seen.output.startswith("hellohellomade\nmore\n-rw-r--r--    1 0        0 ")
  listed = {one.name: one for one in cleared.list()}
  assert listed["child"].built and listed["child"].size >= listed["greeting"].size > 1e6
  assert listed["child"].used > 0


@pytest.mark.slow
def test_failing_commands_are_named_and_leave_nothing(cleared, source):
  write(source, "bad", 'name = "bad"\nbase = "rome-base"\ncommands = ["echo oh no >&2", "exit 3"]')
  with pytest.raises(ImageError, match="recipe 'bad': its commands end with status 3: oh no"):
    hub.EnvHub(source).ensure("bad")
  assert not images.list_images(hub.PREFIX)
  listed = podman_containers.list_containers()  # those of other processes, too
  assert not [name for name, whose in listed if "build" in name and whose == owner.label()]


@pytest.mark.slow
def test_commands_have_no_network_and_few_privileges(cleared, source):
  commands = [
    "test $(ls /sys/class/net | wc -l) = 1",
    "! mount -t tmpfs none /mnt",
    "! mknod /null c 1 3",
    "! chroot / true",
  ]
  text = f'name = "probe"\nbase = "rome-base"\ncommands = {commands!r}'
  write(source, "probe", text)
  assert hub.EnvHub(source).ensure("probe")


@pytest.mark.slow
def test_evicts_what_was_used_longest_ago(cleared, source):
  write(source, "other", 'name = "other"\nbase = "rome-base"\ncommands = ["echo 1 > /other"]')
  envs = hub.EnvHub(source)
  for name in ("other", "child", "greeting"):  # the base is the newest, but other must go first
    envs.ensure(name)
  assert envs.evict(10**12) == []
  sizes = images.list_images(hub.PREFIX)
  with make_sandbox(envs.tag("other"), backend="podman"):
    assert envs.evict(sizes[envs.tag("other")]) == [envs.tag("child"), envs.tag("greeting")]
    assert envs.evict(0) == []
  envs.ensure("child")
  assert envs.evict(images.list_images(hub.PREFIX)[envs.tag("child")]) == [envs.tag("other")]
  assert envs.evict(0) == [envs.tag("child"), envs.tag("greeting")]


@pytest.mark.slow
def test_a_killed_build_ends_and_is_cleared(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  write(tmp_path / "recipes", "small", 'name = "small"\nbase = "debian"')
  program = f"from rome.envs import hub; hub.EnvHub({str(tmp_path / 'recipes')!r}).ensure('small')"
  process = subprocess.Popen([sys.executable, "-c", program])
  unpacked = lambda: list(tmp_path.glob("rome/hub-*/debian-*/root/*"))  # noqa: E731
  assert eventually(lambda: unpacked() and running(tmp_path)), "debootstrap did not start"
  process.kill()
  process.wait()
  assert eventually(lambda: not running(tmp_path)), running(tmp_path)
  assert list(tmp_path.glob("rome/hub-*"))
  hub._remove_stale()
  assert not list(tmp_path.glob("rome/hub-*"))
  assert str(tmp_path) not in pathlib.Path("/proc/mounts").read_text()


def eventually(condition):
  deadline = time.monotonic() + 120
  while not condition():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.1)
  return True


def running(directory):
  """The commands of debootstraps into this directory."""
  found = []
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      command = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
      continue
    if str(directory) in command and "debootstrap" in command:
      found.append(command)
  return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_python_recipe():
  """Minutes at the first time; the image stays in Podman's store."""
  with make_sandbox(hub.EnvHub().ensure("python"), backend="podman") as box:
    result = box.run("python3 -c 'import sys, ssl, sqlite3; print(sys.version_info[0], 6 * 7)'")
    assert (result.exit_code, result.output) == (0, "3 42\n")
    assert box.run("git --version && echo x > y && rg -c x y").output.endswith("\n1\n")
    assert box.run("id -un; hostname").output == "agent\nrome\n"


HELLO = {
  "sh": ("a.sh", "echo hello sh", "bash a.sh"),
  "python": ("a.py", "print('hello python')", "python3 a.py"),
  "node": ("a.js", "console.log('hello node')", "node a.js"),
  "c": ("a.c", '#include <stdio.h>\nint main(){puts("hello c");}', "gcc -o c a.c && ./c"),
  "c++": ("a.cc", '#include <iostream>\nint main(){std::cout<<"hello c++\\n";}',
          "g++ -o d a.cc && ./d"),
  "make": ("Makefile", "all:\n\t@echo hello make\n", "make"),
  "perl": ("a.pl", 'print "hello perl\\n";', "perl a.pl"),
  "go": ("a.go", 'package main\nfunc main() { println("hello go") }', "go run a.go"),
  "java": ("A.java", 'class A{public static void main(String[] a)'
           '{System.out.println("hello java");}}', "javac A.java && java A"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_polyglot_recipe():
  """As the agent, under the default limits. Minutes at the first time, and 1.3 GB in the store."""
  with make_sandbox(hub.EnvHub().ensure("polyglot"), backend="podman") as box:
    for language, (file, text, command) in HELLO.items():
      box.write_file(file, text.encode())
      result = box.run(command, timeout=120)
      assert result.output == f"hello {language}\n", (language, result)


def test_default_source_is_the_packages_own():
  known = ["agent-python", "llm", "mini-swe-agent", "polyglot", "python"]
  assert sorted(hub.EnvHub().recipes) == known
  assert hub.RECIPES == pathlib.Path(hub.__file__).parent / "recipes"


def test_who_holds_a_lock_for_too_long_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(hub, "_LOCK_TIMEOUT", 0.2)
  with hub._lock("build-x"), pytest.raises(ImageError, match="build-x.lock for 0.2 s"):
    with hub._lock("build-x"):
      pass
  with hub._lock("build-x"):
    pass
