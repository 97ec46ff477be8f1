"""HTML by hand: elements that escape what they are given, tables, embedded figures, the style."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.figure import Figure

from rlhf_course.plots.style import VERDICTS


class Html(str):
    """Text that is HTML already. Any other string is escaped when it enters a page."""

    __slots__ = ()


def join(parts: Iterable[object]) -> Html:
    """Pieces of a page one after the other; plain text among them is escaped."""
    return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts))


def element(name: str, *content: object, **attributes: object) -> Html:
    """<name attributes>content</name>; a trailing underscore (class_) is dropped."""
    written = "".join(
        f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{join(content)}</{name}>")


def paragraph(*content: object) -> Html:
    """A paragraph of prose."""
    return element("p", *content)


def number(value: object) -> str:
    """Three significant figures; a dash for what is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    if abs(value) < 1e-9:  # 0.1 + 0.2 - 0.3
        return "0"
    return (str(value) if isinstance(value, int) else f"{value:.3g}").replace("-", "−")


def percent(share: float | None) -> str:
    """0.125 -> 12.5 %."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def table(headings: Sequence[object], rows: Iterable[Sequence[object]], class_: str = "") -> Html:
    """A table; its first column is text, the others are numbers. It scrolls on a narrow screen."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    lines = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    inner = element("table", element("thead", head), element("tbody", *lines), class_=class_)
    return element("div", inner, class_="wide")


def picture(figure: Figure, caption: str, least: int = 560) -> Html:
    """A figure as embedded SVG with its caption; narrower than `least` pixels it scrolls."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "rlhf-course"}):  # the same bytes every time
        figure.savefig(buffer, format="svg", metadata=nothing)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = Html(
        f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(caption)}" '
        f'style="min-width:{least}px;max-width:{96 * figure.get_figwidth():.0f}px">'
    )
    return element(
        "figure", element("div", image, class_="wide"), element("figcaption", caption)
    )  # fmt: skip


def verdict(kind: str | None) -> Html:
    """The kind of an answer as a coloured mark, readable without the colour."""
    if kind is None:
        return Html("")
    label, colour, ink = VERDICTS.get(kind, (kind, "#dddddd", "black"))
    style = f"background:{colour};color:{ink}"
    return element("span", label, class_="verdict", style=style)


def document(
    title: str, subtitle: str, sections: Iterable[tuple[str, str, Html]], style: str = ""
) -> str:
    """The whole page. sections: (anchor, title, content); style: further rules."""
    sections = list(sections)
    contents = element(
        "nav", *(element("a", name, href=f"#{anchor}") for anchor, name, _ in sections)
    )  # fmt: skip
    body = join(
        element("section", element("h2", name), content, id=anchor)
        for anchor, name, content in sections
    )
    header = element("header", element("h1", title), paragraph(subtitle), contents)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{element('title', title)}\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n{header}\n{element('main', body)}\n</body>\n</html>\n"
    )


STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #5a5a5a; --line: #d9d9d9; --pale: #f6f6f4;
  --link: #00568a; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem; color: var(--ink);
  background: #fff; font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.015em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: .9rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
header > p { color: var(--soft); }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin-top: 1rem; font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; min-width: 9rem; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal;
  min-width: 3.6rem; line-height: 1.3; }
tbody th { font-weight: 500; }
.bars td:last-child { text-align: left; }
.yes { color: #00714f; font-weight: 600; }
.no { color: #b03a00; font-weight: 700; }
figure { margin: 1.2rem 0; }
img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 46rem; margin-top: .4rem; }
.dialogue { margin: .9rem 0; border: 1px solid var(--line); border-radius: .5rem;
  overflow: hidden; break-inside: avoid; }
.prompt { background: var(--pale); padding: .5rem .9rem; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.answer { padding: .55rem .9rem .7rem; border-top: 1px solid var(--line); }
.answer + .answer { border-left: 1px solid var(--line); }
.who { color: var(--soft); font-size: .8rem; margin-bottom: .15rem; }
.said { overflow-wrap: anywhere; }
.verdict { display: inline-block; font-size: .8rem; line-height: 1.5; padding: 0 .5em;
  margin-top: .35rem; border-radius: .7em; }
.worth { color: var(--soft); font-size: .8rem; margin-left: .5em; }
pre { background: var(--pale); padding: .8rem 1rem; border-radius: .5rem; overflow-x: auto;
  font-size: .84rem; line-height: 1.5; }
dl { columns: 17rem; column-gap: 2rem; font-size: .84rem; margin: .4rem 0; }
dl > div { display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid;
  border-bottom: 1px solid var(--line); }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 34rem) {
  body { padding: 1.25rem .9rem 3rem; }
  h1 { font-size: 1.55rem; }
  .answer + .answer { border-left: 0; }
}
@media print {
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav, details:not([open]) { display: none; }
  h2, h3 { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
  img { min-width: 0 !important; }
  .wide { overflow: visible; }
  pre { white-space: pre-wrap; }
  .verdict { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
