"""Self-contained HTML pages: tables, pictures as embedded data, and pairs to look into.

A page loads nothing: its styles, scripts and volumes are inside, and its security policy forbids requests.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import string
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from adregnet_jax.report import tables
from adregnet_jax.report.viewer import ViewedPair, pack

LARGEST_BYTES = 25_000_000  # of a page with pairs to look into
FEWEST_BYTES = 1_000_000  # for the volumes of all pairs, whatever the tables and pictures take
VERDICTS = {
    "pass": "The registration passes",
    "check": "Check this registration",
    "fail": "The registration fails",
    None: "No verdict",
}


class Section(NamedTuple):
    heading: str
    body: str  # HTML


def page(
    title: str,
    protocol: str,
    sections: Sequence[Section],
    *,
    verdict: tables.Row | None = None,
    numbers: Sequence[tuple[str, str]] = (),
    pairs: Sequence[ViewedPair] = (),
) -> str:
    """A page: the verdict, the pairs to look into, the protocol as plain text, and the sections.

    Args:
      title: heading and title.
      protocol: how the numbers were made.
      sections: tables and pictures.
      verdict: the row of an `Assessment`; None leaves it out.
      numbers: names and values shown next to it.
      pairs: to look into slice by slice; they share what `LARGEST_BYTES` leaves to the volumes.
    """
    blocks = [f"<h2>{html.escape(section.heading)}</h2>\n{section.body}" for section in sections]
    parts = {
        "kind": "interactive" if pairs else "static",
        "title": html.escape(title),
        "verdict": ("" if verdict is None else verdict_html(verdict)) + _numbers_html(numbers),
        "protocol": html.escape(protocol.strip()),
        "sections": "\n".join(blocks),
        "style": _file("page.css") + (_file("viewer.css") if pairs else ""),
        "scripts": f"<script>{_file('tables.js')}</script>",
        "viewer": "",
    }
    if pairs:
        volumes, niivue = _volumes(pairs, sum(map(len, parts.values()))), _niivue()
        parts["viewer"] = _file("viewer.html") + volumes
        parts["scripts"] += f"<script>{niivue}</script>\n<script>{_file('viewer.js')}</script>"
    return string.Template(_file("page.html")).substitute(parts)


def picture(png: bytes, caption: str) -> str:
    """A PNG as an HTML figure, embedded as base64."""
    data = base64.b64encode(png).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def verdict_html(row: tables.Row) -> str:
    """A verdict with its reasons, and the predicted error, as HTML."""
    verdict = row["verdict"]
    numbers = []
    if row["score"] is not None:
        numbers.append(f"score {row['score']:.2f}")
    if row["predicted_error_mm"] is not None:
        low, high = row["predicted_error_90_mm"]
        numbers.append(
            f"predicted error {row['predicted_error_mm']:.3g} mm, 90 % of places {low:.3g} to {high:.3g} mm"
        )
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in row["reasons"])
    return (
        f'<div class="verdict {verdict or "none"}"><strong>{VERDICTS[verdict]}</strong>'
        f"<span>{html.escape('; '.join(numbers))}</span><ul>{reasons}</ul></div>"
    )


def _numbers_html(numbers: Sequence[tuple[str, str]]) -> str:
    """Names and values, as HTML; nothing without them."""
    cells = [
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in numbers
    ]
    return f'<dl class="numbers">{"".join(cells)}</dl>' if cells else ""


def _volumes(pairs: Sequence[ViewedPair], other_bytes: int) -> str:
    """The data of the viewer: one element for the description, and one for each volume."""
    left = LARGEST_BYTES - other_bytes - len(_niivue()) - len(_file("viewer.js")) - len(_file("viewer.html"))
    each = max(left - 10_000, FEWEST_BYTES) / len(pairs)
    packed = [pack(pair, limit_bytes=each) for pair in pairs]
    # "<" would let a name end the element.
    described = json.dumps([one.record for one in packed], allow_nan=False).replace("<", r"\u003c")
    elements = [f'<script type="application/json" id="pairs">{described}</script>']
    elements += [
        f'<script type="text/plain" id="volume-{number}-{name}">{content}</script>'
        for number, one in enumerate(packed)
        for name, content in one.volumes.items()
    ]
    return "\n".join(elements)


@functools.cache
def _file(name: str) -> str:
    return resources.files("adregnet_jax.report").joinpath("template", name).read_text(encoding="utf-8")


@functools.cache
def _niivue() -> str:
    """The build of NiiVue, which `tools/vendor_niivue.py` fetches."""
    script = resources.files("adregnet_jax.report").joinpath("niivue", "niivue.umd.js")
    return script.read_text(encoding="utf-8")
