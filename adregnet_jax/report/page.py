"""Self-contained HTML pages: tables, and pictures as embedded data. No scripts, no other files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }
pre { background: #f4f4f4; padding: 0.8em; white-space: pre-wrap; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figcaption { color: #555; }
"""


class Section(NamedTuple):
    heading: str
    body: str  # HTML


def page(title: str, protocol: str, sections: Sequence[Section]) -> str:
    """A page whose first block is the protocol, as plain text."""
    blocks = [f"<h2>{html.escape(section.heading)}</h2>\n{section.body}" for section in sections]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f"<pre>{html.escape(protocol.strip())}</pre>",
            *blocks,
            "<p>Research software, not a medical device.</p>",
            "</body></html>\n",
        ]
    )


def picture(png: bytes, caption: str) -> str:
    """A PNG as an HTML figure, embedded as base64."""
    data = base64.b64encode(png).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
