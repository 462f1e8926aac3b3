"""A report as a list of blocks, and the two ways it is written: Markdown, and one HTML file that needs no other."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:14px}
td,th{border:1px solid #ddd;padding:.25em .6em;text-align:left}th{background:#f5f5f5}
img{max-width:100%}.agrees{color:#17702d}.disagrees{color:#b3261e}.undecided{color:#8a6d00}"""


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    text: str


@dataclass
class Table:
    rows: Sequence[Sequence[str]]  # the first is the head


@dataclass
class Picture:
    path: Path
    caption: str


Block = Heading | Text | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown; pictures lie beside the file."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return "#" * level + " " + text
        case Table(rows):
            return "\n".join(aligned(rows))
        case Picture(path, caption):
            return f"![{caption}]({path.name})"
    return block.text


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as people read it in a terminal, which is Markdown too."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]


def page(blocks: Sequence[Block]) -> str:
    """Blocks as one HTML file; pictures are inside it."""
    body = "\n".join(_html(block) for block in blocks)
    title = next((html.escape(block.text) for block in blocks if isinstance(block, Heading)), "Report")
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>\n{body}\n'


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Table(rows):
            head, *rest = rows
            lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
            lines += ["".join(_cell(cell) for cell in row) for row in rest]
            return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            return f'<p><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></p>'
    return "<p>" + html.escape(block.text).replace("\n", "<br>") + "</p>"


def _cell(text: str) -> str:
    word = text if text in ("agrees", "disagrees", "undecided") else ""
    return f'<td class="{word}">{html.escape(text)}</td>' if word else f"<td>{html.escape(text)}</td>"
