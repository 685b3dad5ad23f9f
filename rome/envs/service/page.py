"""The status page: one self-contained HTML text, no script, nothing loaded from anywhere.

Everything that comes from outside (names, images, labels, reasons) is escaped by the template
engine, and the page's content policy would refuse a script all the same.
"""

import time
from collections.abc import Mapping, Sequence

import jinja2

from rome.envs.records import Record
from rome.envs.service.auth import Tenant

SHOWN = 500  # sandboxes on the page, the newest

_TEMPLATE = jinja2.Environment(
  autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="10">
<title>rome sandboxes</title>
<style>
:root { color-scheme: light dark; --line: #d5d9e0; --dim: #5c6573; --page: #fff; --text: #16191f;
  --tile: #f4f6f9; --running: #176b3a; --pending: #8a5a00; --failed: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --line: #343b47; --dim: #9aa5b5; --page: #12151b;
  --text: #e6e9ee; --tile: #1b2029; --running: #63c98b; --pending: #e0b054; --failed: #f28b82; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--page);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0; }
h2 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { color: var(--dim); margin: .25rem 0 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem;
  margin: 1rem 0 0; }
dl div { background: var(--tile); border-radius: 6px; padding: .5rem .75rem; }
dt { color: var(--dim); font-size: .8rem; overflow-wrap: anywhere; }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--dim); font-weight: 600; font-size: .8rem; white-space: nowrap; }
td.number, th.number { text-align: right; }
td.id { font-family: ui-monospace, monospace; font-size: .85rem; white-space: nowrap; }
td.why { max-width: 24rem; overflow-wrap: anywhere; color: var(--dim); }
.running { color: var(--running); } .pending { color: var(--pending); }
.failed { color: var(--failed); }
</style>
</head>
<body>
<h1>rome sandboxes</h1>
<p>Tenant {{ tenant }}. Up for {{ up }}. This page loads itself anew every 10 s.</p>
<dl>
{% for name, value in states %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
{% for name, used, most in quotas %}
<div><dt>{{ name }} of quota</dt><dd>{{ used }} / {{ most }}</dd></div>
{% endfor %}
</dl>
<h2>Sandboxes</h2>
{% if rows %}
<div class="scroll"><table>
<thead><tr><th>Sandbox</th><th>State</th><th>Image</th><th>Host</th><th class="number">CPUs</th>
<th class="number">MiB</th><th class="number">Age</th><th>Last change</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td class="id">{{ row.id }}</td><td class="{{ row.state }}">{{ row.state }}</td>
<td>{{ row.image }}</td><td>{{ row.host }}</td><td class="number">{{ row.cpus }}</td>
<td class="number">{{ row.memory }}</td><td class="number">{{ row.age }}</td>
<td class="why">{{ row.why }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% if hidden %}<p>{{ hidden }} older ones are not shown.</p>{% endif %}
{% else %}
<p>None yet.</p>
{% endif %}
<h2>Manager</h2>
<dl>
{% for name, value in counts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
</body>
</html>
""")


def render(
  tenant: Tenant, records: Sequence[Record], counts: Mapping[str, float], started: float
) -> str:
  """The page.

  Args:
    tenant: whose sandboxes are shown.
    records: they.
    counts: what the manager counts, of all tenants.
    started: when the service started, seconds since 1970.
  """
  now = time.time()
  newest = sorted(records, key=lambda record: record.history[0][0], reverse=True)
  live = [record for record in records if record.state in ("pending", "running")]
  limits, quotas = [record.spec.limits for record in live], tenant.quotas
  used = (
    ("sandboxes", len(live), quotas.sandboxes),
    ("cpus", sum(one.cpus for one in limits), quotas.cpus),
    ("memory, MiB", sum(one.memory_mb for one in limits), quotas.memory_mb),
  )
  order = ("running", "pending", "stopped", "failed", "deleted")
  return _TEMPLATE.render(
    tenant=tenant.name,
    up=_duration(now - started),
    states=[(name, sum(record.state == name for record in records)) for name in order],
    quotas=[(name, f"{value:g}", f"{most:g}") for name, value, most in used],
    rows=[_row(record, now) for record in newest[:SHOWN]],
    hidden=max(0, len(newest) - SHOWN),
    counts=[(name.replace("_", " "), _number(value)) for name, value in sorted(counts.items())],
  )


def _row(record: Record, now: float) -> dict[str, str]:
  sandbox, limits = record.sandbox, record.spec.limits
  return {
    "id": record.id,
    "state": record.state,
    "image": (sandbox.image if sandbox else record.spec.image) or "base image",
    "host": record.host,
    "cpus": f"{limits.cpus:g}",
    "memory": str(limits.memory_mb),
    "age": _duration(now - record.history[0][0]),
    "why": record.history[-1][2],
  }


def _number(value: float) -> str:
  return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def _duration(seconds: float) -> str:
  whole = max(0, int(seconds))
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min"
  if whole < 86400:
    return f"{whole // 3600} h {whole % 3600 // 60} min"
  return f"{whole // 86400} d {whole % 86400 // 3600} h"
