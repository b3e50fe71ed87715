"""How a page looks: its frame and style, escaping, tables, cells and pictures as HTML and SVG.

One file, no library, readable without a script: the only script compares the age of the page with
the time its next run is due and shows a line when it is stale.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from tables import text, visible

STALE_SCRIPT = """
var due = document.documentElement.dataset.due * 1000, stale = document.getElementById("stale");
function look() { stale.hidden = Date.now() < due; }
look(); setInterval(look, 1000);
"""

TIP = 160  # characters at most that a cell or bar says when asked

# Shades, not hues, tell states apart: they survive print, night and eyes that see no red.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --dim: #57606a; --line: #d0d7de;
  --soft: #f1f4f7; --link: #1f5f99; --h1: #dce8f4; --h1i: #1b1f24; --h2: #a9c8e6; --h2i: #10151a;
  --h3: #6d9fcf; --h3i: #060a0e; --h4: #1d4a78; --h4i: #fff; --bad: #7d1f2c; --badi: #fff;
  --late: #e3b341; --latei: #1b1f24 }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --ink: #e4e8ec; --dim: #9aa5b1;
  --line: #38424d; --soft: #1b2128; --link: #8cbcec; --h1: #1c2f44; --h1i: #e4e8ec; --h2: #2a4c72;
  --h2i: #fff; --h3: #6d9fcf; --h3i: #060a0e; --h4: #cfe3f7; --h4i: #10151a; --bad: #e5959f;
  --badi: #2b070c; --late: #d7a833; --latei: #12161b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; print-color-adjust: exact; -webkit-print-color-adjust: exact }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 0 0 .5rem }
h3 { font-size: .9rem; margin: .8rem 0 .3rem; font-weight: 600 }
p { margin: .2rem 0 .5rem } .dim, th, caption { color: var(--dim) } .dim { font-size: .85rem }
section { margin: 1.6rem 0; break-inside: avoid-page }
#stale { background: var(--late); color: var(--latei); padding: .5rem .8rem; font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; font-size: .8rem; vertical-align: bottom }
td, th { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
.n { text-align: right; white-space: nowrap } th { overflow-wrap: normal }
td svg { width: 11rem; margin-top: .25rem }
code { font: .85em/1.4 ui-monospace, "DejaVu Sans Mono", monospace }
pre { margin: .2rem 0; padding: .3rem .5rem; background: var(--soft); white-space: pre-wrap;
  user-select: all; font: .85em/1.4 ui-monospace, "DejaVu Sans Mono", monospace }
.card { border-left: 4px solid var(--line); padding: .1rem 0 .1rem .7rem; margin: .6rem 0 }
.card.act { border-color: var(--bad) } .big { font-weight: 600 }
.grid { display: grid; gap: 1px 6px; align-items: center; font-size: .8rem;
  grid-template-columns: minmax(4.5rem, 14rem) minmax(0, 1fr) }
.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.cells { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 1px }
.cells > * { font-weight: 400; height: 1.35rem; line-height: 1.35rem; text-align: center;
  overflow: hidden; font-size: .72rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
.cells > i { font-style: normal; color: var(--dim) }
.o, .h0 { background: var(--soft); color: var(--dim) } .none { color: var(--dim) }
.h1, .W { background: var(--h1); color: var(--h1i) }
.h2 { background: var(--h2); color: var(--h2i) }
.h3, .R { background: var(--h3); color: var(--h3i) }
.h4 { background: var(--h4); color: var(--h4i) }
.F { background: var(--bad); color: var(--badi); font-weight: 700 }
.L { background: var(--late); color: var(--latei); font-weight: 700 }
.M { outline: 1px dashed var(--dim); outline-offset: -2px; color: var(--ink) }
.key { display: inline-block; min-width: 1.4em; text-align: center; padding: 0 .2em;
  margin-left: .8em; font-size: .8rem } .key:first-child { margin-left: 0 }
svg { display: block; width: 100%; background: var(--soft) } .mark { fill: var(--h4) }
.failed { fill: var(--bad) } .track { fill: var(--line) } .done { fill: var(--h4) }
.shade { fill: var(--h2); opacity: .55 }
.other { fill: none; stroke: var(--dim); stroke-dasharray: 2 3; vector-effect: non-scaling-stroke }
.days { display: grid } .days > * { overflow: hidden; white-space: nowrap }
.scale { align-self: stretch; display: flex; flex-direction: column;
  justify-content: space-between } .axis { stroke: var(--line); stroke-width: 1 }
.signal { fill: none; stroke: var(--ink); stroke-width: 1.2 }
.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 6 4 }
.axis, .signal, .limit { vector-effect: non-scaling-stroke }
@media (max-width: 600px) { body { padding: .6rem; font-size: 14px } .wide { display: none }
  td svg { width: 4rem } .grid { grid-template-columns: 6rem minmax(0, 1fr) }
  .cells > * { font-size: .5rem } }
@media print { body { max-width: none; font-size: 10pt } section { margin: .8rem 0 } }
"""


class Html(str):
    """A text that is HTML already and is not escaped again."""


def page(title: str, made: datetime, lead: str, parts: Iterable[str],
         every: timedelta | None = None) -> str:
    """Return a whole HTML file; `lead` and `parts` are HTML.

    With `every` the page says when its next run is due, loads itself again then, and says that it
    is stale once two runs are missing.
    """
    refresh, script, due = "", "", ""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if every:
        digest = base64.b64encode(hashlib.sha256(STALE_SCRIPT.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        refresh = f'<meta http-equiv="refresh" content="{max(30, every.total_seconds()):.0f}">'
        due = f' data-due="{(made + 2 * every).timestamp():.0f}"'
        script = f"<script>{STALE_SCRIPT}</script>"
    return f"""<!DOCTYPE html>
<html lang="en"{due}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="dim">{lead}</p>
{'<p id="stale" hidden>This page is stale: the next is overdue. Look at cron.</p>' * bool(every)}
{"".join(parts)}
{script}
</body>
</html>
"""


def section(heading: str, *parts: str, note: str = "") -> str:
    """Return a part of the page under its heading; `parts` and `note` are HTML."""
    under = f'<p class="dim">{note}</p>' if note else ""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{under}{''.join(parts)}\n</section>\n"


def short_name(name: str) -> str:
    """Return a name as a cell's tip begins with it: the whole stands at the left of the line."""
    return shorten(name, 24)


def escape(value: Any) -> str:
    """Return a value as HTML text: its markup and control characters are shown, not obeyed."""
    return html.escape(visible(text(value)))


def shorten(value: str, most: int) -> str:
    """Return what of `value` takes at most `most` bytes of the page, so that it cannot fill it.

    A quote takes six, an emoji four.
    """
    kept = value[:most]
    while (size := len(escape(kept).encode())) > most:
        kept = kept[:len(kept) * most // size]
    return value if kept == value else kept[:-1] + "…"


def command(line: str) -> str:
    """Return a command to copy."""
    return f"<pre>{escape(line)}</pre>"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; cells are texts, or HTML if they are `Html`.

    A head that begins with `#` is of a column of numbers, with `-` of one that a narrow page
    leaves out.
    """
    classes = [" ".join(["n"] * ("#" in head[:2]) + ["wide"] * ("-" in head[:2]))
               for head in heads]

    def row(tag: str, values: Sequence[Any]) -> str:
        return "<tr>" + "".join(
            f"<{tag}{f' class={quote(c)}' if c else ''}>{html_of(v)}</{tag}>"
            for c, v in zip(classes, values, strict=True)) + "</tr>\n"
    return (f"<table>\n<thead>{row('th', [head.lstrip('#-') for head in heads])}</thead>\n"
            f"<tbody>{''.join(row('td', values) for values in rows)}</tbody>\n</table>\n")


def html_of(value: Any) -> str:
    return value if isinstance(value, Html) else escape(value)


def quote(value: str) -> str:
    return f'"{html.escape(value)}"'


def cell(shade: str, letter: Any, tip: str) -> str:
    """Return one cell of a line of cells: its class, what it shows, what it says when asked."""
    return f'<b class="{shade}" title="{escape(shorten(tip, TIP))}">{escape(letter)}</b>'


def line(name: str, content: str) -> str:
    """Return a line of a grid: the name, and cells or a picture beside it."""
    return (f'<div class="name" title="{escape(shorten(name, TIP))}">'
            f"{escape(shorten(name, 60))}</div>{content}\n")


def cells(parts: Iterable[str]) -> str:
    return f'<div class="cells">{"".join(parts)}</div>'


def grid(title: str, lines: Iterable[str]) -> str:
    """Return lines of names and cells as one picture."""
    return f'<div class="grid" role="group" aria-label={quote(title)}>\n{"".join(lines)}</div>\n'


def svg(title: str, shapes: Iterable[str], height: int = 14) -> Html:
    """Return a picture 1000 units wide, stretched to its place, `height` units and pixels high."""
    return Html(f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" role="img" '
                f'style="height:{height}px"><title>{escape(shorten(title, TIP))}</title>'
                f'{"".join(shapes)}</svg>')


def rect(shade: str, left: float, width: float, tip: str = "", top: float = 0,
         height: float = 14) -> str:
    """Return a bar, at least one unit wide so that it can be seen."""
    said = f"<title>{escape(shorten(tip, TIP))}</title>" if tip else ""
    return (f'<rect class="{shade}" x="{left:.1f}" y="{top:g}" width="{max(width, 1):.1f}" '
            f'height="{height:g}">{said}</rect>')


def legend(keys: dict[str, str]) -> str:
    """Return what the letters mean: {class and letter: meaning}."""
    return "<p>" + " ".join(
        f'<span class="key {shade}">{escape(shade if len(shade) == 1 else "")}</span> '
        f'<span class="dim">{escape(meaning)}</span>' for shade, meaning in keys.items()) + "</p>"


def heat(share: float) -> str:
    """Return the shade of a share of 0 to 1: h0 for none, h4 for most."""
    return f"h{0 if share <= 0 else 1 + min(3, int(share * 4))}"
