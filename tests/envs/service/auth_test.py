"""Tokens and quotas."""

import base64
import hashlib

import pytest

from rome.envs.service import auth

TOKEN = "0123456789abcdef-token"


def _file(tmp_path, text):
  path = tmp_path / "tokens.toml"
  path.write_text(text)
  return path


def _table(name, token, more=""):
  return f'[{name}]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n{more}\n'


def test_a_token_names_its_tenant_and_no_other(tmp_path):
  text = _table("alice", TOKEN, "sandboxes = 3\ncpus = 1.5") + _table("bob", TOKEN + "b")
  tokens = auth.load_tokens(_file(tmp_path, text), {})
  alice = tokens.tenant(f"Bearer {TOKEN}")
  assert alice.name == "alice" and (alice.quotas.sandboxes, alice.quotas.cpus) == (3, 1.5)
  assert alice.quotas.memory_mb == auth.Quotas().memory_mb
  assert tokens.tenant(f"bearer {TOKEN}b").name == "bob"
  for header in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", TOKEN, f"Token {TOKEN}"):
    assert tokens.tenant(header) is None


def test_basic_authentication_only_where_it_is_allowed(tmp_path):
  tokens = auth.load_tokens(_file(tmp_path, _table("alice", TOKEN)), {})
  header = "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()
  assert tokens.tenant(header) is None
  assert tokens.tenant(header, basic=True).name == "alice"
  assert tokens.tenant("Basic !!!", basic=True) is None
  assert tokens.tenant("Basic " + base64.b64encode(b"any:").decode(), basic=True) is None


def test_the_environments_token_is_taken_out_of_it():
  environ = {auth.TOKEN_VARIABLE: TOKEN}
  tokens = auth.load_tokens(environ=environ)
  assert environ == {}
  assert tokens.tenant(f"Bearer {TOKEN}").name == "default" and tokens.tenant(None) is None
  assert TOKEN.encode() not in repr(vars(tokens)).encode()


def test_without_tokens_everybody_is_one_tenant():
  tokens = auth.load_tokens(environ={})
  assert not tokens and tokens.tenant(None).name == "local"


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "names nobody"),
    ("[a", "tokens.toml"),
    ("[alice]\n", "needs sha256"),
    ('[alice]\nsha256 = "00"\n', "needs sha256"),
    ("alice = 3\n", "must be a table"),
    (_table("Alice", TOKEN), "must be a table named"),
    (_table("alice", TOKEN, "sandboxen = 3"), "unknown key 'sandboxen'"),
    (_table("alice", TOKEN, "sandboxes = 0"), "sandboxes must be a number above 0"),
    (_table("alice", TOKEN, "sandboxes = 1.5"), "sandboxes must be"),
    (_table("alice", TOKEN, "memory_mb = true"), "memory_mb must be"),
    (_table("alice", TOKEN) + _table("bob", TOKEN), "the same token"),
  ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path, text, message):
  with pytest.raises(auth.TokenError, match=message):
    auth.load_tokens(_file(tmp_path, text), {})


def test_a_missing_file_and_a_short_token_are_refused(tmp_path):
  with pytest.raises(auth.TokenError, match="No such file"):
    auth.load_tokens(tmp_path / "none", {})
  with pytest.raises(auth.TokenError, match="shorter than"):
    auth.load_tokens(environ={auth.TOKEN_VARIABLE: "short"})
