"""What shards hold as one HTML file: no script, nothing from elsewhere, and no word of theirs taken for markup."""

from __future__ import annotations

import base64
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vlscale.data.looking.cards import Box, Card, Thumbnail

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5c6672; --line: #dde1e6;
  --bar: #3b73b9; --box: #ff3d81; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1e2227; --ink: #e6e9ed; --soft: #9aa4b0;
  --line: #30363d; --bar: #6ea3e0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; } p { margin: .3rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .85rem; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; }
.tile b { display: block; font-size: 1.25rem; } .card { min-width: 0; }
.key { font: .8rem/1.3 ui-monospace, monospace; overflow-wrap: anywhere; }
.pictures { display: flex; gap: .4rem; margin-bottom: .4rem; }
.pictures svg { flex: 1; min-width: 0; max-height: 16rem; }
.tag { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: 0 .5rem; margin: .1rem; }
ul { margin: .3rem 0; padding-left: 1.1rem; } li { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: right; padding: .15rem .4rem; }
td:first-child, th:first-child { text-align: left; min-width: 3.5rem; overflow-wrap: anywhere; }
td:last-child { white-space: nowrap; } tr + tr td { border-top: 1px solid var(--line); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.bar { fill: var(--bar); } .axis { stroke: var(--line); }
.box { fill: none; stroke: var(--box); stroke-width: 1.5; }
svg text.label { fill: #fff; font-size: 10px; paint-order: stroke; stroke: #000; stroke-width: 2.5px; }
"""
TURNS = ("LRE", "LRO", "LRI", "RLE", "RLO", "RLI", "FSI", "PDF", "PDI")  # of Unicode's bidirectional controls
WIDTH, HEIGHT = 340, 130  # of a diagram
HISTOGRAMS = {  # of the figures -> heading
    "caption_words": "Words of a caption",
    "captions_per_sample": "Captions of a sample",
    "picture_short_side": "Short side of a picture, pixels",
    "aspect_ratio": "Width over height of a picture",
    "regions_per_sample": "Regions of a sample",
    "frames_per_sample": "Frames of a sample",
}


def page(title: str, figures: Mapping[str, Any], cards: Sequence[Card]) -> str:
    """The file's text.

    Args:
        title: what is described, such as the shards' names.
        figures: of `vlscale.data.looking.describe`.
        cards: samples to show.
    """
    drawn = figures["described"]
    share = "" if drawn == figures["samples"] else f" The figures are of {drawn:,} samples, evenly drawn."
    body = [
        f"<h1>{_safe(title)}</h1>",
        _tiles(figures),
        f"<p class='soft'>Lengths are words between spaces.{share}</p>",
        "<h2>What there is</h2><div class='grid wide'>",
        *(_histogram(heading, figures["histograms"][name]) for name, heading in HISTOGRAMS.items()),
        _answers(figures["commonest_answers"] or {}, figures["questions"]),
        _fields(figures),
        "</div>",
        f"<h2>Samples drawn at random ({len(cards)})</h2><div class='grid'>",
        *map(_card, cards),
        "</div>",
    ]
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    )
    return (
        f"{head}<title>{_safe(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _safe(text: str, most: int | None = None) -> str:
    """Text for any place in the file: no markup, no control characters, nothing that turns what follows."""
    cut = text if most is None or len(text) <= most else f"{text[:most]} ..."
    return escape("".join("\ufffd" if _is_control(letter) else letter for letter in cut), quote=True)


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs") or unicodedata.bidirectional(letter) in TURNS


def _tiles(figures: Mapping[str, Any]) -> str:
    told = {
        "samples": f"{figures['samples']:,}",
        "shards": f"{figures['shards']:,}",
        "size": _bytes(figures["bytes"]),
        "captions": f"{figures['captions']:,}",
        "statements": f"{figures['statements']:,}",
        "questions": f"{figures['questions']:,}",
        "answers": f"{figures['answers']:,}",
        "classes": f"{figures['classes'] or 0:,}",
        "unreadable members": f"{figures['unreadable_members']:,}",
    }
    shown = {name: value for name, value in told.items() if value != "0"}
    return f"<div class='tiles'>{''.join(f'<div class=tile><b>{v}</b>{name}</div>' for name, v in shown.items())}</div>"


def _bytes(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _histogram(heading: str, bins: Sequence[Mapping[str, Any]]) -> str:
    """Upright bars, a word under the first, the middle and the last."""
    if not bins:
        return ""
    most = max(each["count"] for each in bins)
    step = min(WIDTH / len(bins), 48)
    parts = []
    for n, each in enumerate(bins):
        tall = each["count"] / most * (HEIGHT - 34)
        place = (
            f"x='{n * step + 1:.1f}' y='{HEIGHT - 18 - tall:.1f}' width='{max(step - 2, 1):.1f}' height='{tall:.1f}'"
        )
        parts.append(f"<rect class='bar' {place}><title>{_range(each)}: {each['count']:,}</title></rect>")
    few = len(bins) < 4
    for n in range(len(bins)) if few else (0, len(bins) // 2, len(bins) - 1):
        anchor = "start" if n == 0 else "end" if n == len(bins) - 1 and not few else "middle"
        x = step * {"start": 0, "middle": n + 0.5, "end": n + 1}[anchor]
        parts.append(f"<text x='{x:.1f}' y='{HEIGHT - 4}' text-anchor='{anchor}'>{_range(bins[n])}</text>")
    parts.append(f"<text x='{WIDTH}' y='10' text-anchor='end'>most: {most:,}</text>")
    parts.append(f"<path class='axis' d='M0 {HEIGHT - 17.5}H{WIDTH}'/>")
    label = escape(f"{heading}: " + ", ".join(f"{_range(each)} {each['count']}" for each in bins), quote=True)
    drawing = f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label=\"{label}\">{''.join(parts)}</svg>"
    return f"<div class='card'><h3>{heading}</h3>{drawing}</div>"


def _range(each: Mapping[str, Any]) -> str:
    start, end = each["from"], each["to"]
    if end is None:
        return f"{start:.3g} or more"
    if start == end:
        return f"{start:,}"
    return (
        f"{start:,}-{end:,}" if isinstance(start, int) and isinstance(end, int) and start else f"{start:.3g}-{end:.3g}"
    )


def _answers(answers: Mapping[str, int], questions: int) -> str:
    """Lying bars with the answers under them."""
    if not answers:
        return ""
    parts = []
    for n, (answer, count) in enumerate(answers.items()):
        y, share = n * 30, count / questions
        parts.append(f"<rect class='bar' x='0' y='{y}' width='{share * WIDTH:.1f}' height='10'/>")
        parts.append(f"<text x='0' y='{y + 22}'>{_safe(answer, 40)}: {count:,} ({share:.1%})</text>")
    drawing = f"<svg viewBox='0 0 {WIDTH} {30 * len(answers)}' role='img' aria-label='answers'>{''.join(parts)}</svg>"
    return f"<div class='card'><h3>Commonest answers</h3>{drawing}</div>"


def _fields(figures: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td>{_safe(name, 40)}</td><td>{count:,}</td><td>{count / max(figures['described'], 1):.0%}</td>"
        f"<td>{_bytes(figures['field_bytes'][name])}</td></tr>"
        for name, count in list(figures["fields"].items())[:40]
    ]
    head = "<tr><th>field</th><th>members</th><th>of the samples</th><th>size</th></tr>"
    return f"<div class='card'><h3>Members</h3><table>{head}{''.join(rows)}</table></div>"


def _card(card: Card) -> str:
    alt = card.captions[0] if card.captions else f"picture of {card.key}"
    pictures = "".join(_picture(each, alt) for each in card.pictures)
    parts = [
        f"<div class='pictures'>{pictures}</div>" if pictures else "",
        _listed(_safe(caption) for caption in card.captions),
        _listed(f"{_safe(question)} <b>{_safe(answer)}</b>" for question, answer in card.questions),
        "<p>" + "".join(f"<span class='tag soft'>{_safe(tag)}</span>" for tag in card.tags) + "</p>"
        if card.tags
        else "",
        *(f"<p class='soft'>{_safe(note)}</p>" for note in card.notes),
        f"<p class='key soft' title=\"{_safe(card.shard)}\">{_safe(card.key)}</p>",
        f"<p class='soft'>{_safe(', '.join(card.fields), 80)}</p>",
    ]
    return f"<div class='card'>{''.join(parts)}</div>"


def _listed(texts: Iterable[str]) -> str:
    items = "".join(f"<li dir='auto'>{text}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _picture(picture: Thumbnail, alt: str) -> str:
    """The picture and its boxes in one drawing, so that they stay together at any size."""
    width, height = picture.width, picture.height
    data = base64.b64encode(picture.jpeg).decode()
    image = f"<image href='data:image/jpeg;base64,{data}' width='{width}' height='{height}'/>"
    boxes = "".join(_drawn(box, width, height) for box in picture.boxes)
    label = _safe(alt)
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label=\"{label}\">{image}{boxes}</svg>"


def _drawn(box: Box, width: int, height: int) -> str:
    """A box, with its name in it where there is room and in any case for whoever points at it."""
    x, y, wide, tall = (
        *(box.left * width, box.top * height),
        *((box.right - box.left) * width, (box.bottom - box.top) * height),
    )
    name = _safe(box.label)
    fits = 5 * len(box.label) < 1.5 * wide
    label = f"<text class='label' x='{x + 2:.1f}' y='{y + 10:.1f}'>{name}</text>" if name and fits else ""
    place = f"x='{x:.1f}' y='{y:.1f}' width='{wide:.1f}' height='{tall:.1f}'"
    return f"<rect class='box' {place}><title>{name}</title></rect>{label}"
