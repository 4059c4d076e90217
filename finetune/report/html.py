"""Pieces that pages are made of. Other people's text passes through `text` before it goes into one."""

from __future__ import annotations

import html
from pathlib import Path

text = html.escape


def document(title: str, *sections: str) -> str:
    """A page that stands alone."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, lead: str, *parts: str) -> str:
    """A section of the page, `lead` escaped; `parts` are markup already, and empty ones are left out."""
    return (
        f'<section id="{name}">\n<h2>{title}</h2>\n<p class="lead">{text(lead)}</p>\n'
        + "\n".join(filter(None, parts))
        + "\n</section>"
    )


def image(address: str, alternative: str, small: bool) -> str:
    """An image by its address, which may be a `data:` URL."""
    return f'<img src="{text(address)}" alt="{text(alternative)}"{" class=small" if small else ""} loading="lazy">'
