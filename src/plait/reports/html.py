"""A self-contained HTML page: its style, its frame, tables and the ticks of an axis. No network and no script."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--dim:#68707d;--paper:#fff;--soft:#f4f5f8;--edge:#dfe2e8;--train:#3563d9;
--val:#d9692b;--good:#23894f;--bad:#c63b3b}
@media(prefers-color-scheme:dark){:root{--ink:#e5e8ee;--dim:#98a1af;--paper:#14161b;--soft:#1e2128;--edge:#343944;
--train:#7ea2ff;--val:#ffa066;--good:#55c587;--bad:#ff7b72}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:70rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.7rem;margin:0}
h2{font-size:1.25rem;margin:2.8rem 0 .4rem;padding-top:.8rem;border-top:1px solid var(--edge)}
h3{font-size:1rem;margin:1.6rem 0 .3rem}p{margin:.2rem 0 .8rem;max-width:46rem}.dim{color:var(--dim);font-size:.87em}
nav a{margin-right:1rem;color:var(--train)}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.93em}
td,th{padding:.28rem .7rem;text-align:left;border-bottom:1px solid var(--edge);vertical-align:top}
th{font-weight:600;color:var(--dim);font-size:.87em}.n{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}.tip{line-height:1.25}.figures{width:100%;
table-layout:fixed}.figures td,.figures th{overflow-wrap:anywhere}.figures th:nth-child(1){width:17%}
.figures th:nth-child(2){width:29%}.figures th:nth-child(3){width:14%}.figures th:nth-child(4){width:160px}
.cards{display:grid;gap:.7rem;margin:1.2rem 0;
grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr))}
.card{background:var(--soft);border-radius:.6rem;padding:.7rem .9rem}.big{font-size:1.7rem;font-weight:650;
font-variant-numeric:tabular-nums;line-height:1.25}.bar .fill{fill:var(--train);opacity:.4}.line{stroke:var(--ink);
stroke-width:1.5;fill:none}.line.chance{stroke:var(--dim);stroke-dasharray:2 2}.line.baseline{stroke:var(--val);
stroke-width:2}.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1rem}.panel{margin:0;
background:var(--soft);border-radius:.6rem;padding:.7rem}.panel svg{width:100%;height:auto;display:block}
.panel figcaption{max-width:none}.panel text{
font-size:11px;fill:var(--dim)}.grid{stroke:var(--edge);fill:none}.curve{fill:none;stroke-width:1.8;
stroke-linejoin:round}.curve.train{stroke:var(--train)}.curve.val{stroke:var(--val)}.key{display:inline-block;width:.8em;
height:.22em;vertical-align:middle;margin-right:.35em;border-radius:1px}.key.train{background:var(--train)}
.key.val{background:var(--val)}.confusion td{text-align:center;min-width:2.3rem;border:1px solid var(--paper);
font-variant-numeric:tabular-nums;padding:.28rem}.confusion .hit{background:color-mix(in srgb,var(--train) var(--s),
var(--soft))}.confusion .miss{background:color-mix(in srgb,var(--bad) var(--s),var(--soft))}
.confusion .deep{color:var(--paper);font-weight:600}.row{display:flex;gap:1rem;align-items:center;padding:.5rem 0;
border-bottom:1px solid var(--edge)}.head{flex:0 0 6.5rem;font-weight:600}.items{display:flex;flex-wrap:wrap;gap:.6rem}
figure{margin:0}.full,.small{display:inline-block;text-align:center}figcaption{font-size:.75em;color:var(--dim);
max-width:11rem;overflow-wrap:anywhere}.pic{width:4.2rem;height:4.2rem;object-fit:contain;image-rendering:pixelated;
border-radius:.25rem;border:2px solid var(--edge);display:block;margin:auto}.small .pic{width:2.6rem;height:2.6rem;
opacity:.85}.mel{width:9rem;height:3.6rem;border-radius:.25rem;border:2px solid var(--edge);display:block;margin:auto}
.small .mel{width:6rem;height:2.4rem}audio{width:10.5rem;height:2rem;display:block;margin:.2rem auto}.small audio{
width:7rem}.right .pic,.right .mel,.right .words{border-color:var(--good)}.wrong .pic,.wrong .mel,.wrong .words{
border-color:var(--bad)}.words{display:inline-block;max-width:22rem;text-align:left;overflow-wrap:anywhere;
border-left:3px solid var(--edge);padding-left:.5rem}.pair{display:flex;align-items:flex-end;gap:.25rem;
background:var(--soft);border-radius:.4rem;padding:.3rem}pre{background:var(--soft);border-radius:.5rem;padding:.8rem;
overflow-x:auto;font-size:.82rem;max-height:26rem}@media(max-width:40rem){.row{flex-direction:column;
align-items:flex-start}.head{flex:none}.tip,.figures td:nth-child(4),.figures th:nth-child(4),
.figures td:nth-child(7),.figures th:nth-child(7){display:none}.figures th:nth-child(3){width:25%}
.cards{grid-template-columns:repeat(auto-fill,minmax(9rem,1fr))}.card{padding:.5rem .7rem}
body{padding:1rem .7rem}td,th{padding:.25rem .4rem}}
"""


def page(title: str, summary: str, top: str, sections: list[tuple[str, str, str]]) -> str:
    """The page of sections (key, title, HTML). `summary` and `top` are HTML too, the title is not."""
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<h2 id="{key}">{name}</h2>{content}' for key, name, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; media-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)} · Plait</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="dim">{summary}</p><nav>{links}</nav>{top}{body}</body></html>\n'
    )


def table(head: list[str], rows: Iterable[list[str]], numbers: tuple[int, ...] = (), name: str = "") -> str:
    """A table of cells that are HTML already."""
    names = ["n" if i in numbers else "" for i in range(len(head))]
    top = "".join(f'<th class="{c}">{cell}</th>' for c, cell in zip(names, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{c}">{cell}</td>' for c, cell in zip(names, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{name}"><tr>{top}</tr>{body}</table></div>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two bounds."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
