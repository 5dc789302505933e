"""A report as one HTML file that needs nothing beside itself, as Markdown with figures, and as LaTeX tables."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from recsys.report.study import Section
from recsys.report.tables import render
from recsys.results import atomic, write_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto; max-width: 76rem;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
nav a { margin-right: 1rem; } a { color: #1b6ca8; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: .8rem 0; }
th { text-align: right; border-bottom: 1.5px solid #444; padding: .25rem .6rem; vertical-align: bottom; }
td { text-align: right; border-bottom: 1px solid #eee; padding: .2rem .6rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: .6rem 1rem .6rem 0; } figure img { max-width: 100%; }
figcaption { font-size: 12px; color: #666; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""


def html_page(title: str, sections: Sequence[Section]) -> str:
    """One file: no script, no link outside, figures as SVG inside."""
    links = "".join(f'<a href="#{_anchor(one)}">{html.escape(one.title)}</a>' for one in sections)
    body = "\n".join(_html_section(one) for one in sections)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>Scaling study: {name}</h1><nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def _html_section(section: Section) -> str:
    parts = [f'<h2 id="{_anchor(section)}">{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
    parts += [f'<div class="wide">{_html_table(frame)}</div>' for _, frame in section.tables]
    for name, figure in section.figures:
        data = base64.b64encode(svg(figure)).decode()
        caption = html.escape(name)
        image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    for name, text in section.listings:
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>")
    return "\n".join(parts)


def _html_table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _anchor(section: Section) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in section.title.lower())


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "recsys", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """With the figures as files in `figures/`."""
    parts = [f"# Scaling study: {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        parts += [f"{text}\n" for text in section.text]
        parts += [render(frame, "markdown") for _, frame in section.tables]
        parts += [f"![{name}](figures/{name}.png)\n" for name, _ in section.figures]
        parts += [
            f"<details><summary>{name}</summary>\n\n```\n{text}```\n\n</details>\n" for name, text in section.listings
        ]
    return "\n".join(parts)


def write_report(title: str, sections: Sequence[Section], directory: Path) -> list[Path]:
    """`report.html`, `report.md`, `figures/*.png` and `tables/*.tex`; gives the two pages."""
    for folder in ("figures", "tables"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for section in sections:
        for name, figure in section.figures:
            with atomic(directory / "figures" / f"{name}.png") as path:
                figure.savefig(path, dpi=160, format="png", metadata={"Software": None})
        for name, frame in section.tables:
            write_text(directory / "tables" / f"{name}.tex", render(frame, "latex"))
    pages = {"report.html": html_page(title, sections), "report.md": markdown_page(title, sections)}
    for name, text in pages.items():
        write_text(directory / name, text)
    return [directory / name for name in pages]
