"""The frame of report.html: style sheet, skeleton, and escaping of text that nobody vouches for.

The page holds no script and loads nothing: a content policy in its head forbids both, so that even
a mistake in escaping could not run what a model wrote.
"""

import html
import re

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f]")
# Bidirectional overrides and their like, which make text read as something else than it is.
_INVISIBLE = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def text(value: object) -> str:
  """Untrusted text as HTML: markup escaped, control and invisible characters made visible."""
  shown = _CONTROL.sub(lambda m: chr(0x2400 + ord(m.group())), str(value))
  shown = _INVISIBLE.sub(lambda m: f"\\u{ord(m.group()):04x}", shown)
  return html.escape(shown)


def page(title: str, sections: list[str], refresh: int | None = None) -> str:
  """A whole HTML document; `sections` are HTML already.

  Args:
    title: shown by the browser.
    sections: of the body.
    refresh: seconds after which a browser asks for the page again; None: never.
  """
  again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    f'{again}<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n"
    f"<body><main>\n{chr(10).join(s for s in sections if s)}\n</main></body></html>\n"
  )


_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1a1f29; --muted: #626b7a; --line: #e2e5ea;
  --c1: #2563c9; --c2: #d9730d; --c3: #2a8f6a; --c4: #9aa3b2; --good: #1d7f55; --bad: #b93a32;
  --user: #eef2f8; --tool: #f4f4f1; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12151b; --card: #1a1e26; --ink: #e6e9ef; --muted: #98a1b0; --line: #2c323d;
  --c1: #7aa7f0; --c2: #efa057; --c3: #63c49c; --c4: #6d7686; --good: #63c49c; --bad: #ee8078;
  --user: #202836; --tool: #20221f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 56px; }
h1 { font-size: 25px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 40px 0 12px; }
p { margin: 0 0 12px; } .muted { color: var(--muted); }
.note { border-left: 3px solid var(--c2); background: var(--card); padding: 10px 14px;
  margin: 16px 0; border-radius: 0 6px 6px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; min-width: 0; }
.headline { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 14px;
  margin-top: 22px; }
.headline .big { font-size: 40px; font-weight: 650; letter-spacing: -.02em; line-height: 1.15;
  font-variant-numeric: tabular-nums; }
.big .from { color: var(--muted); font-weight: 450; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 14px; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 0; font-size: 19px; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
dl { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
.charts h3 { font-size: 14px; margin: 0 0 2px; }
.legend { font-size: 12.5px; color: var(--muted); min-height: 19px; margin: 0 0 4px; }
.legend span { margin-right: 12px; white-space: nowrap; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1; opacity: .35; }
.area { stroke: none; } svg.bar { display: block; }
.whisker { stroke-width: 2; stroke-linecap: round; }
.hover { fill: transparent; stroke: none; }
circle.hover:hover { fill: currentColor; }
.line.c1, .whisker.c1 { stroke: var(--c1); } .line.c2, .whisker.c2 { stroke: var(--c2); }
.line.c3, .whisker.c3 { stroke: var(--c3); } .line.c4, .whisker.c4 { stroke: var(--c4); }
.dot.c1, .area.c1 { fill: var(--c1); } .dot.c2, .area.c2 { fill: var(--c2); }
.dot.c3, .area.c3 { fill: var(--c3); } .dot.c4, .area.c4 { fill: var(--c4); }
.swatch.c1 { background: var(--c1); } .swatch.c2 { background: var(--c2); }
.swatch.c3 { background: var(--c3); } .swatch.c4 { background: var(--c4); }
.dot.before { fill: var(--card); stroke: var(--c4); stroke-width: 2; }
.dot.after { fill: var(--c1); }
.whisker.before { stroke: var(--c4); } .whisker.after { stroke: var(--c1); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line);
  vertical-align: middle; }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
tr:last-child td { border-bottom: 0; } td.right, th.right { text-align: right; }
td.range, .range { color: var(--muted); font-size: 13px; white-space: nowrap; }
.headline svg.bar { width: 100%; margin-top: 4px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin-bottom: 10px; }
summary { cursor: pointer; padding: 11px 16px; display: flex; gap: 12px; align-items: baseline;
  flex-wrap: wrap; }
summary::before { content: "\\25B8"; color: var(--muted); } details[open] > summary::before {
  content: "\\25BE"; }
summary::-webkit-details-marker { display: none; }
.badge { font-size: 12px; font-weight: 600; padding: 1px 9px; border-radius: 20px;
  border: 1px solid currentColor; }
.badge.good { color: var(--good); } .badge.bad { color: var(--bad); }
.badge.none { color: var(--muted); }
.chat { padding: 2px 16px 16px; display: flex; flex-direction: column; gap: 8px; }
.said { border-radius: 10px; padding: 8px 13px; max-width: 84%; }
.said .who { font-size: 12px; color: var(--muted); }
.said.user { background: var(--user); align-self: flex-start; }
.said.model { border: 1px solid var(--c1); align-self: flex-end; }
.said.tool { background: var(--tool); align-self: flex-start; }
pre { margin: 0; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.settings .card { margin-bottom: 10px; }
.settings pre { padding: 4px 16px 16px; }
@media (max-width: 760px) { .headline { grid-template-columns: minmax(0, 1fr); }
  main { padding: 22px 14px 40px; } .said { max-width: 100%; } }
@media print { body { background: none; } details { break-inside: avoid; } }
"""
