"""Rules, the one form of hosts, and which addresses a name may lead to."""

import ipaddress
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.envs.network.policy import (
  NetworkPolicy,
  PolicyError,
  canonical_host,
  is_public,
  split_rule,
)


def test_rules_are_normalised_and_hashable():
  policy = NetworkPolicy(
    allow=("PyPI.org.:443", "bücher.example:80", "*.Example.org:443", "[::FFFF:127.0.0.1]:8000"),
    forward={8001: ("127.0.0.1", 18000)},
  )
  assert policy.allow == (
    "*.example.org:443", "127.0.0.1:8000", "pypi.org:443", "xn--bcher-kva.example:80",
  )  # fmt: skip
  assert policy.forward == ((8001, ("127.0.0.1", 18000)),)
  assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
  assert NetworkPolicy(forward=[[1, ["localhost", 2]]]) == NetworkPolicy(
    forward={1: ("localhost", 2)}
  )


@pytest.mark.parametrize(
  "rule",
  ["pypi.org", "pypi.org:", ":443", "pypi.org:0", "pypi.org:65536", "pypi.org:x", "pypi.org:-1",
   "*:443", "*.*.org:443", "a.*.org:443", "*.127.0.0.1:80", "::1:80", "[1.2.3.4]:80", "a b:80",
   "-a.org:80", "a..b:80", "127.1:80", "0x7f.1:80", "2130706433:80", "010.0.0.1:80",
   "[fe80::1%lo]:80",
   "https://a.org:443", "a.org/x:443", "x" * 300 + ":80", 443, "*.[::1]:80", "1.2.3.4.5:80"],
)  # fmt: skip
def test_rules_that_cannot_be_meant(rule):
  with pytest.raises(PolicyError, match="rule"):
    NetworkPolicy(allow=(rule,))


@pytest.mark.parametrize(
  "settings",
  [{"allow": "pypi.org:443"}, {"allow": 5}, {"max_bytes": 0}, {"max_bytes": 1.5},
   {"max_connections": True}, {"idle_timeout": 0}, {"total_timeout": float("nan")},
   {"forward": {3128: ("a", 1)}}, {"forward": {53: ("a", 1)}}, {"forward": {0: ("a", 1)}},
   {"forward": {80: "a:1"}}, {"forward": {80: ("a", 99999)}}, {"forward": {80: ("a b", 1)}},
   {"allow": ("127.0.0.1:80",), "forward": {80: ("a", 1)}},
   {"allow": tuple(f"a{i}.org:1" for i in range(257))}],
)  # fmt: skip
def test_settings_that_cannot_be_meant(settings):
  with pytest.raises(PolicyError):
    NetworkPolicy(**settings)


def test_what_rules_allow():
  policy = NetworkPolicy(
    allow=("pypi.org:443", "*.example.org:443", "*.example.org:80", "[2001:db8::1]:1")
  )
  assert policy.allows("pypi.org", 443) and not policy.allows("pypi.org", 80)
  assert not policy.allows("files.pypi.org", 443) and not policy.allows("evilpypi.org", 443)
  assert policy.allows("a.example.org", 443) and policy.allows("a.b.example.org", 80)
  assert not policy.allows("example.org", 443) and not policy.allows("badexample.org", 443)
  assert not policy.allows("example.org.evil.test", 443)
  assert policy.allows("2001:db8::1", 1)
  assert policy.ports("a.example.org") == (80, 443) and policy.ports("evil.test") == ()


@pytest.mark.parametrize(
  ("host", "form"),
  [("EXAMPLE.org.", "example.org"), ("１２７.0.0.1", "127.0.0.1"), ("[::1]", "::1"),
   ("::ffff:127.0.0.1", "127.0.0.1"), ("[::ffff:7f00:1]", "127.0.0.1"),
   ("64:ff9b::a00:1", "10.0.0.1"),
   ("2002:7f00:1::", "127.0.0.1"), ("_dmarc.example.org", "_dmarc.example.org"),
   ("STRASSE。example", "strasse.example")],
)  # fmt: skip
def test_canonical_form(host, form):
  assert canonical_host(host) == form


@pytest.mark.parametrize(
  "host",
  ["", ".", "0x7f.1", "2130706433", "127.1", "0177.0.0.1", "127.0.0.01", "1.2.3.256", "0x7f000001",
   "a.0x7f", "[127.0.0.1]", "[", "a\0b", "a\nb", "a@b", "a/b", "fe80::1%eth0", "[::1",
   "*", "a" * 64],
)  # fmt: skip
def test_no_canonical_form(host):
  with pytest.raises(PolicyError):
    canonical_host(host)


@given(st.text(max_size=300))
def test_any_text_is_refused_or_has_one_form(host):
  try:
    form = canonical_host(host)
  except PolicyError:
    return
  assert canonical_host(form) == form
  assert (
    split_rule(NetworkPolicy(allow=(f"[{form}]:1" if ":" in form else f"{form}:1",)).allow[0])[0]
    == form
  )


@pytest.mark.parametrize(
  "address",
  ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
   "224.0.0.1", "255.255.255.255", "168.63.129.16", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::",
   "::1",
   "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1",
   "64:ff9b::7f00:1", "2002:a00:1::", "2001:0:1::1", "2001:db8::1", "::ffff:169.254.169.254",
   "100.100.100.200"],
)  # fmt: skip
def test_addresses_that_a_name_may_not_lead_to(address):
  assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
def test_public_addresses(address):
  assert is_public(ipaddress.ip_address(address))


def test_a_rule_for_the_very_address_lets_a_name_lead_there():
  policy = NetworkPolicy(allow=("model.example:80", "10.0.0.1:80"))
  assert policy.reachable(ipaddress.ip_address("::ffff:10.0.0.1"), 80)
  assert not policy.reachable(ipaddress.ip_address("10.0.0.1"), 81)
  assert not policy.reachable(ipaddress.ip_address("10.0.0.2"), 80)
