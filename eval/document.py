"""The frame of a self-contained HTML page: style sheet, head and small pieces. No scripts, nothing from the network.

A page adapts itself to light and dark screens, to a phone and to paper. Whatever comes from a user or a file passes through `escape`.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Even if something slipped through, a browser would load and run nothing."""

_LIGHT = """
--ink:#17191e;--soft:#5d6470;--faint:#8b929e;--line:#e3e6eb;--paper:#ffffff;--wash:#f5f6f8;
--good:#16714a;--bad:#a8322a;--warn:#7a4f00;--warn-wash:#fdf5e4;--warn-line:#e7c678;
--c0:#1c5d99;--c1:#c4500f;--c2:#19805b;--c3:#9a4f8f;--c4:#3c97c4;--c5:#b38300;
"""
_DARK = """
--ink:#e7e9ee;--soft:#a2a9b5;--faint:#767d8a;--line:#2c3038;--paper:#131519;--wash:#1b1e24;
--good:#63c499;--bad:#f08b80;--warn:#f0c469;--warn-wash:#2a2416;--warn-line:#6b5727;
--c0:#79b4ea;--c1:#f2935c;--c2:#5fc79c;--c3:#d69acb;--c4:#8fd0ee;--c5:#e3bd52;
"""

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"@media print{{:root{{color-scheme:light;{_LIGHT}}}}}"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
  font-variant-numeric:tabular-nums}
main{max-width:68rem;margin:0 auto;padding:3rem 2rem 4rem}
header{margin-bottom:2rem}
.eyebrow{color:var(--soft);font-size:.8rem;letter-spacing:.08em;text-transform:uppercase;margin:0 0 .5rem}
h1{font-size:2rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
.lead{color:var(--soft);margin:.5rem 0 0;max-width:58rem;overflow-wrap:anywhere}
section{margin-top:3rem}
h2{font-size:1.15rem;font-weight:650;letter-spacing:-.005em;margin:0 0 .25rem}
h3{font-size:.9rem;font-weight:650;margin:1.5rem 0 .35rem}
p{margin:.25rem 0 .75rem;max-width:48rem}
.soft,figcaption{color:var(--soft);font-size:.875rem}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
.warnings{background:var(--warn-wash);border-left:3px solid var(--warn-line);padding:.8rem 1.1rem;margin:1.5rem 0 0;
  border-radius:0 4px 4px 0}
.warnings strong{color:var(--warn);font-weight:650}
.warnings ul{margin:.25rem 0 0;padding-left:1.1rem}
.warnings li{margin:.15rem 0;overflow-wrap:anywhere}
.scores+p{margin-top:1.25rem}
.scores{display:grid;grid-template-columns:repeat(auto-fill,minmax(11.5rem,1fr));gap:2rem 2.5rem;margin-top:2.25rem}
.score{border-top:1px solid var(--ink);padding-top:.55rem}
.score .title{font-size:.875rem;color:var(--soft);display:flex;justify-content:space-between;gap:.5rem}
.score .title span{color:var(--faint)}
.score .number{font-size:2.6rem;line-height:1.15;font-weight:350;letter-spacing:-.03em;display:block;margin:.1rem 0}
.score .range{font-size:.875rem;color:var(--soft);min-height:1.4em;display:block}
svg.bar{display:block;width:100%;height:12px;margin:.35rem 0 0;overflow:visible}
.bar line{vector-effect:non-scaling-stroke}
.bar .rail{stroke:var(--line);stroke-width:1}
.bar .interval{fill:var(--c0);opacity:.38}
.bar .band{fill:var(--soft);opacity:.14}
.bar .value{stroke:var(--c0);stroke-width:2}
svg.chart{display:block;width:100%;max-width:38rem;height:auto;margin:.5rem 0}
.chart text{font-size:12px;fill:var(--soft);font-family:inherit}
.chart .name{fill:var(--ink)}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart .axis{stroke:var(--faint);stroke-width:1}
.chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.chart .fit{fill:none;stroke-width:1.4;stroke-dasharray:4 4;opacity:.8}
.chart .whisker{fill:none;stroke-width:1.4}
.chart .dot{stroke:var(--paper);stroke-width:1.2}
.chart .ring{fill:none;stroke:var(--ink);stroke-width:1.4}
.chart .tick{stroke-width:1.6}
.chart .strong{stroke-width:2.4}
"""
    + "".join(
        f".chart .c{i}{{stroke:var(--c{i})}}.chart .dot.c{i}{{fill:var(--c{i});stroke:var(--paper)}}.key.c{i}{{background:var(--c{i})}}"
        for i in range(6)
    )
    + """
.chart .dot.hollow{fill:var(--paper);stroke:var(--c0);stroke-width:1.6}
.key{display:inline-block;width:.75rem;height:.2rem;vertical-align:.25rem;margin-right:.4rem}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.875rem;color:var(--soft)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem 2.5rem;align-items:start}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{text-align:left;vertical-align:top;padding:.4rem 1.25rem .4rem 0;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--soft)}
thead th{color:var(--ink);font-weight:650;border-bottom:1px solid var(--ink);vertical-align:bottom}
td{overflow-wrap:anywhere}
.facts th{width:14rem}
td.num,th.num{text-align:right;padding-right:1.25rem;white-space:nowrap}
tr.best td,tr.best th{background:var(--wash);font-weight:650;color:var(--ink)}
.facts-grid{columns:2 24rem;column-gap:3rem;margin-top:1rem}
.facts-grid>div{break-inside:avoid-column;margin-bottom:1.25rem}
.facts-grid h3{margin-top:0}
.facts-grid th{width:42%}
.samples{display:grid;grid-template-columns:repeat(8,1fr);gap:.35rem;margin:.75rem 0 0}
.samples img,.strip img{display:block;width:100%;height:auto;background:var(--wash)}
img.pixels{image-rendering:pixelated}
.classes{display:grid;gap:.5rem;margin-top:.75rem}
.class{display:grid;grid-template-columns:12.5rem 1fr;gap:1rem;align-items:center;border-top:1px solid var(--line);padding-top:.5rem}
.class .who{font-size:.9rem;overflow-wrap:anywhere}
.class .who b{font-weight:600;display:block;line-height:1.3}
.strip{display:grid;grid-template-columns:repeat(8,minmax(0,6rem));gap:.25rem}
blockquote{margin:.5rem 0 0;padding:.9rem 1.1rem;background:var(--wash);border-radius:4px;font-size:.95rem;overflow-wrap:anywhere;
  max-width:none}
details{margin-top:1rem}
summary{cursor:pointer;color:var(--soft);font-size:.9rem}
figure{margin:.75rem 0}
pre{overflow-x:auto;background:var(--wash);padding:1rem;border-radius:4px;font-size:.78rem;line-height:1.45}
ul.notes{padding-left:1.1rem;margin:.4rem 0;max-width:52rem}
ul.notes li{margin:.3rem 0}
.compare th:first-child{position:sticky;left:0;background:var(--paper);min-width:9rem}
.compare thead .soft{font-weight:400}
.compare td,.compare thead th{min-width:11rem}
.compare td .number{font-size:1.35rem;font-weight:400;letter-spacing:-.02em}
.compare td .soft{white-space:nowrap}
.compare td{overflow-wrap:normal;word-break:break-word}
.delta{font-size:.875rem;display:block;margin-top:.15rem}
.good{color:var(--good)}.bad{color:var(--bad)}.void{color:var(--warn)}
td.other{box-shadow:inset 2px 0 0 var(--c1);padding-left:.6rem}
footer{margin-top:3.5rem;color:var(--faint);font-size:.8rem;border-top:1px solid var(--line);padding-top:.75rem}
@media (max-width:40rem){
main{padding:1.5rem 1.1rem 2.5rem}
h1{font-size:1.5rem}
section{margin-top:2.25rem}
.scores{grid-template-columns:1fr 1fr;gap:1.4rem 1.4rem;margin-top:1.5rem}
.score .number{font-size:2rem}
.samples{grid-template-columns:repeat(4,1fr)}
.class{grid-template-columns:1fr;gap:.35rem}
.strip{grid-template-columns:repeat(8,1fr)}
th,td{padding-right:.75rem}
.facts th,.facts-grid th{width:42%}
.compare td,.compare thead th{min-width:8.2rem}
.compare td .soft{white-space:normal}
.compare td .number{display:block}
.compare th:first-child{min-width:5.5rem;max-width:6.5rem}
}
@media print{
html{font-size:12px}
main{max-width:none;padding:0}
section{margin-top:1.5rem}
.score,.class,tr,svg,blockquote,.facts-grid>div{break-inside:avoid}
h2,h3{break-after:avoid}
.scroll{overflow:visible}
svg,.warnings,blockquote,.other{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.samples{grid-template-columns:repeat(8,1fr)}
.facts-grid{columns:2}
.class{grid-template-columns:10rem 1fr}
.raw{display:none}
}
"""
)


def document(title: str, body: str) -> str:
    """A whole page; `body` is markup, `title` plain text."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def escape(value: Any) -> str:
    """Text as it stands on the page, whatever characters it has."""
    # lone surrogates (from undecodable file names) cannot be written as UTF-8
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def breakable(value: Any) -> str:
    """As `escape`, for long names of files: a narrow page may break the line after / and _."""
    return escape(value).replace("/", "/<wbr>").replace("_", "_<wbr>")


def section(title: str, *parts: str) -> str:
    """A part of the page with a heading of plain text; empty if nothing stands in it."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def warning_box(title: str, lines: Iterable[str]) -> str:
    """What a reader must not miss; empty if there is nothing."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="warnings" role="note"><strong>{escape(title)}</strong><ul>{items}</ul></div>' if items else ""


def facts_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Rows of a name, its key (shown on pointing) and a value, all plain text."""
    lines = [f'<tr><th scope="row" title="{escape(key)}">{escape(title)}</th><td>{escape(value)}</td></tr>' for title, key, value in rows]
    return f'<table class="facts">{"".join(lines)}</table>' if lines else ""


def image_tag(image: np.ndarray, max_side: int, description: str) -> str:
    """An uint8 [H, W, 3] image as PNG within the page, made smaller if a side is longer than `max_side`."""
    picture = Image.fromarray(image)
    longest = max(picture.size)
    if longest > max_side:
        width, height = (max(1, round(side * max_side / longest)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    style = ' class="pixels"' if longest <= 64 else ""
    text = escape(description)
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    return (
        f'<img{style} width="{picture.width}" height="{picture.height}" alt="{text}" title="{text}" src="data:image/png;base64,{encoded}">'
    )


def legend(names: Sequence[str]) -> str:
    """Names of lines beside their colours (classes c0, c1, ...)."""
    items = "".join(f'<span><span class="key c{i % 6}"></span>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{items}</div>'
