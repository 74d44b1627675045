"""Look at a synthesised data set: one offline page with its figures and samples, to keep or to drop.

    write_page(items, card, "out/report.html", picture)   # per_category=8 samples of every category
    read_decisions("review.csv")                          # {key: "keep" or "drop"}, as the page saved them

The page (assets/review.html, filled in) is one file, loads nothing and runs offline; pictures are inside, a
few MB for the default number of samples. It keeps decisions in the browser where the browser allows that, and
saves and loads review.csv. What annotators and models wrote is escaped, and the page's policy lets no script
but its own run.
"""

import base64
import csv
import hashlib
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from images import damage_named, open_image, to_rgb
from report import e, fill, select, write_html

PAGE = Path(__file__).parent / "assets" / "review.html"  # markup, style and script, with $placeholders
LONGEST = 512  # pixels of a picture's longer side
NEEDED = ("key", "category", "form", "level", "text", "options", "answer", "image_id", "width", "height")
FILTERS = ("category", "form", "level", "source", "split")
LEVELS = ("easy", "medium", "hard")
COLOURS = 6  # of boxes: .c0 to .c5 in the page's style
MARKS = ("quota", "target", "chance")  # columns drawn as a mark that the bar is read against
SIGNS = {"right": "✓", "wrong": "✗", "unreadable": "?", "error": "!"}  # of a vote's state
DECISIONS = ("keep", "drop")


# ---- samples ----
def choose(items: Iterable[dict], per_category: int) -> list[dict]:
    """Of every category those whose keys have the smallest hashes: the same ones in every run."""
    cells = defaultdict(list)
    for item in items:
        cells[item["category"]].append(item)
    return [item for name in sorted(cells) for item in sorted(cells[name], key=place)[:per_category]]


def place(item: dict) -> str:
    return hashlib.sha256(item["key"].encode(errors="replace")).hexdigest()


def check_items(items: Sequence[dict]):
    """Raises: ValueError naming the first item that lacks a field, or the first key that comes twice."""
    seen = set()
    for i, item in enumerate(items):
        if lacks := [name for name in NEEDED if name not in item]:
            raise ValueError(f"item {item.get('key', i)}: expected {', '.join(NEEDED)}, got no {lacks[0]}")
        if item["key"] in seen:
            raise ValueError(f"items: expected every key once, got {item['key']} twice")
        seen.add(item["key"])


# ---- pictures and boxes ----
def picture_uri(encoded: bytes) -> str:
    """The upright picture as the data URI of a JPEG of at most LONGEST pixels. Raises: OSError if damaged."""
    with damage_named():
        image = open_image({"bytes": encoded})
        image.draft("RGB", (LONGEST, LONGEST))  # a large JPEG is decoded at a half, a quarter, an eighth
        image = to_rgb(image)
    image.thumbnail((LONGEST, LONGEST))
    small = max(image.size) <= 256
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90 if small else 75, subsampling=0 if small else 2, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def short(text: str, longest: int = 40) -> str:
    """
    >>> short("traffic light", 8)
    'traffic…'
    """
    return text if len(text) <= longest else text[: longest - 1] + "…"


def names_of(objects: Sequence[dict]) -> list[str]:
    """What each box is called on the picture: its label, with its number where the label comes twice.

    >>> names_of([{"id": "cup.1", "label": "cup"}, {"id": "cup.2", "label": "cup"}, {"label": "dog"}])
    ['cup 1', 'cup 2', 'dog']
    """
    labels = [str(o["label"]) for o in objects]
    return [
        f"{label} {str(o.get('id', '')).rpartition('.')[2]}".strip() if labels.count(label) > 1 else label
        for o, label in zip(objects, labels, strict=True)
    ]


def place_name(box, width: float, height: float, size, taken: list) -> tuple[float, float]:
    """Where a name `width` wide and `height` high begins: beside its box, inside the picture, off `taken`."""
    x1, y1, x2, y2 = box
    columns = [min(max(x, 0), max(size[0] - width, 0)) for x in (x1, x2 - width)]
    rows = (y1 - 1.15 * height, y1 + 0.1 * height, y2 + 0.1 * height, y2 - 1.15 * height)
    spots = [(x, y) for y in rows for x in columns if 0 <= y <= size[1] - height]

    def free(spot):
        x, y = spot
        return not any(x < a + w and a < x + width and y < b + height and b < y + height for a, b, w in taken)

    x, y = next(filter(free, spots), (spots or [(columns[0], 0)])[0])
    taken.append((x, y, width))
    return x, y


def draw_boxes(item: dict) -> str:
    """A rectangle and a name for every gold object, in the pixels of the picture."""
    objects = item.get("objects", [])
    size = item["width"], item["height"]
    height = max(size) / 27  # of the letters
    halos, lines, words, taken = [], [], [], []
    for i, (o, name) in enumerate(zip(objects, names_of(objects), strict=True)):
        box, name = [round(v, 1) for v in o["box"]], short(name, 28)
        x1, y1, x2, y2 = box
        frame = f'x="{x1:g}" y="{y1:g}" width="{max(x2 - x1, 0):g}" height="{max(y2 - y1, 0):g}"'
        halos.append(f'<rect class="halo" {frame}/>')
        lines.append(f'<rect class="c{i % COLOURS}" {frame}/>')
        x, y = place_name(box, 0.58 * height * len(name), height, size, taken)
        spot = f'x="{x:.1f}" y="{y + 0.82 * height:.1f}" font-size="{height:.1f}"'
        words.append(f'<text class="c{i % COLOURS}" {spot}>{e(name)}</text>')
    return "".join(halos + lines + words)


def draw_picture(item: dict, uri: str | None, missing: str = "") -> str:
    """The picture under its boxes; a grey frame of its size with the path where there is none."""
    width, height = item["width"], item["height"]
    if uri:
        under = f'<image href="{uri}" width="{width}" height="{height}"/>'
    else:
        under = f'<rect class="missing" width="{width}" height="{height}"/>'
    named = e("picture with " + ", ".join(names_of(item.get("objects", []))))
    crisp = ' class="crisp"' if max(width, height) <= 256 else ""
    head = f'<svg{crisp} viewBox="0 0 {width} {height}" role="img" aria-label="{named}">'
    foot = f'<p class="fault">no picture: {e(missing)}</p>' if missing else ""
    return f"{head}{under}{draw_boxes(item)}</svg>{foot}"


# ---- items ----
def show_options(item: dict) -> str:
    """The options in their order, the right one marked; a line if answer, options and letter disagree."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    rows = []
    for letter, option in zip(letters, item["options"], strict=False):
        right = option == item["answer"]
        sign = '<b class="sign" title="the answer">✓<i> the answer</i></b>' if right else ""
        mark = ' class="right"' if right else ""
        rows.append(f"<li{mark}><b>{letter}</b><span>{e(str(option))}</span>{sign}</li>")
    keyed = [x for x, option in zip(letters, item["options"], strict=False) if option == item["answer"]]
    fault = ""
    if keyed != [item.get("letter") or "".join(keyed)]:
        said = f"{item['answer']} under {item.get('letter') or 'no letter'}"
        fault = f'<p class="fault">expected the answer under its letter, once; got {e(said)}</p>'
    return f'<ol class="options">{"".join(rows)}</ol>{fault}'


def show_votes(title: str, votes: Sequence) -> str:
    """One line: how many were right, and what each model said."""
    if not votes:
        return ""
    by_model = defaultdict(list)
    for vote in votes:
        vote = vote if isinstance(vote, dict) else {"said": vote}
        state = str(vote.get("state", ""))
        said = "nothing" if vote.get("said") is None else str(vote["said"])
        sign, full = SIGNS.get(state, "·"), short(str(vote.get("raw") or said), 300)
        by_model[str(vote.get("model", ""))].append(
            f'<span class="vote {e(state)}" title="{e(f"{state}: {full}")}">{sign} {e(short(said))}</span>'
        )
    right = sum(isinstance(vote, dict) and vote.get("state") == "right" for vote in votes)
    lines = "".join(f"<div>{e(model)} {''.join(chips)}</div>" for model, chips in by_model.items())
    return f'<dt>{title}</dt><dd class="{title}"><em>{right} of {len(votes)} right</em>{lines}</dd>'


def show_facts(item: dict) -> str:
    """Why the answer holds, who says so, and where it all comes from."""
    fact = f"<dt>because</dt><dd>{e(str(item['fact']))}</dd>" if item.get("fact") else ""
    triples = "".join(f"<div>{e(' '.join(map(str, r)))}</div>" for r in item.get("relationships", []))
    relations = f"<dt>relations</dt><dd>{triples}</dd>" if triples else ""
    boxes = "".join(
        f'<span class="chip"><i class="c{i % COLOURS}"></i>{e(name)} '
        f"<small>{', '.join(f'{v:g}' for v in o['box'])}</small></span>"
        for i, (o, name) in enumerate(
            zip(item.get("objects", []), names_of(item.get("objects", [])), strict=True)
        )
    )
    boxes = f"<dt>boxes</dt><dd>{boxes}</dd>" if boxes else ""
    votes = show_votes("validators", item.get("votes", [])) + show_votes("blind", item.get("blind", []))
    names = ("writer", "source", "licence", "image_id", "key")
    origin = " · ".join(f"{name.removesuffix('_id')} {item[name]}" for name in names if item.get(name))
    return f'<dl>{fact}{relations}{boxes}{votes}<dt>origin</dt><dd class="origin">{e(origin)}</dd></dl>'


def show_item(item: dict, picture: str) -> str:
    """One article of the page."""
    data = " ".join(f'data-{name}="{e(str(item.get(name, "")))}"' for name in ("key", *FILTERS))
    rating = f"rating {item['rating']}" if item.get("rating") is not None else ""
    tags = (item["category"], item["form"], item["level"], rating, item.get("split"))
    tags = "".join(f'<span class="tag">{e(str(tag))}</span>' for tag in tags if tag)
    verdict = "".join(
        f'<button type="button" class="{name}" value="{name}" aria-pressed="false">{name}</button>'
        for name in DECISIONS
    )
    note = '<input class="note" placeholder="note" aria-label="note" autocomplete="off">'
    words = f'<h3 dir="auto">{e(str(item["text"]))}</h3>{show_options(item)}{show_facts(item)}'
    return (
        f'<article tabindex="-1" {data} data-decision="open"><div class="look">{picture}</div>'
        f'<div class="words"><p class="tags">{tags}</p>{words}'
        f'<div class="verdict">{verdict}{note}</div></div></article>\n'
    )


# ---- tables ----
def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def written(value, share: bool = False) -> str:
    """
    >>> written(12345), written(0.625, share=True), written(None), written("4 / 5")
    ('12,345', '62.5 %', '–', '4 / 5')
    """
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    if share:
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def draw_table(title: str, rows: Sequence[Sequence]) -> str:
    """A table with a bar a row.

    Args: rows of (label, value, ...). A first row of texts only names the columns. Whole numbers are counts,
    stacked into one bar ("total" is not drawn); where a table has fractions they are drawn instead, one thin
    bar each, and shown in percent if none exceeds 1. Columns named as in MARKS are a mark across the bar.
    """
    rows, head = [list(row) for row in rows], None
    texts_only = len(rows[0]) > 1 and all(isinstance(v, str) for v in rows[0])
    if texts_only and any(map(is_number, sum(rows[1:], []))):
        head, *rows = rows
    n = max(map(len, rows), default=1)
    rows = [row + [None] * (n - len(row)) for row in rows]
    head = head and (head + [""] * n)[:n]
    columns = [[row[k] for row in rows if is_number(row[k])] for k in range(n)]
    fractions = [k for k in range(1, n) if any(isinstance(v, float) for v in columns[k])]
    marks = [k for k in range(1, n) if head and head[k].lower() in MARKS and columns[k]]
    shares = bool(fractions) and max(v for k in fractions for v in columns[k]) <= 1
    total = [k for k in range(1, n) if head and head[k].lower() == "total"]
    drawn = [k for k in fractions or range(1, n) if columns[k] and k not in marks and k not in total]
    sums = [[row[k] for k in drawn if is_number(row[k])] for row in rows]
    longest = [max(values, default=0) if fractions else sum(values) for values in sums]
    scale = 1 if shares else max([*longest, *(v for k in marks for v in columns[k]), 0]) or 1
    keys = {k: f'<i class="k{drawn.index(k) % 4}"></i>' for k in drawn if len(drawn) > 1}
    keys |= {k: '<i class="mark"></i>' for k in marks}
    lines = []
    for row in rows:
        bar = draw_bar([row[k] for k in drawn], [row[k] for k in marks], scale, stacked=not fractions)
        cells = "".join(cell("td", written(row[k], shares and k in fractions)) for k in range(1, n))
        lines.append(f'<tr>{cell("th", str(row[0]), "row")}<td class="bar">{bar}</td>{cells}</tr>')
    names = ""
    if head:
        cells = "".join(cell("th", head[k], "col", keys.get(k, "")) for k in range(1, n))
        names = f"<thead><tr>{cell('th', head[0], 'col')}<td></td>{cells}</tr></thead>"
    table = f"<table>{names}<tbody>{''.join(lines)}</tbody></table>"
    return f'<figure><figcaption>{e(title)}</figcaption><div tabindex="0">{table}</div></figure>'


def cell(tag: str, text: str, scope: str = "", key: str = "") -> str:
    """A cell that stays narrow: a longer text is cut, and whole in its title."""
    scope = f' scope="{scope}"' if scope else ""
    title = f' title="{e(text)}"' if len(text) > 28 else ""
    return f"<{tag}{scope}{title}>{key}{e(short(text, 28))}</{tag}>"


def draw_bar(values: Sequence, marks: Sequence, scale: float, stacked: bool) -> str:
    """Bars of one row, as shares of `scale`; values that are no numbers leave their place empty."""
    parts, x = [], 0.0
    high = 14 if stacked else max(14, 7 * len(values))
    for k, value in enumerate(values):
        width = min(max(100 * value / scale, 0), 100 - x) if is_number(value) else 0
        y, tall = (3, high - 6) if stacked else (high * k / len(values) + 1, high / len(values) - 2)
        parts.append(f'<rect class="k{k % 4}" x="{x:.4g}" y="{y:g}" width="{width:.4g}" height="{tall:g}"/>')
        x += width if stacked else 0
    for mark in filter(is_number, marks):
        x = min(max(100 * mark / scale, 0), 100)
        parts.append(f'<path class="mark" d="M{x:.4g} 0V{high}"/>')
    size = f'viewBox="0 0 100 {high}" height="{high}" preserveAspectRatio="none"'
    return f'<svg {size} aria-hidden="true">{"".join(parts)}</svg>'


# ---- page ----
def pairs_of(value) -> list[tuple[str, str]]:
    """(name, text) of a dict, a list of texts or one text: models and cost come as any of these."""
    if isinstance(value, dict):
        return [(str(k), ", ".join(map(str, v)) if isinstance(v, list | tuple) else written(v))
                for k, v in value.items()]  # fmt: skip
    if value is None or value == "":
        return []
    return [("", written(v)) for v in (value if isinstance(value, list | tuple) else [value])]


def dollars(value):
    """A fraction as money; whole numbers are something else, such as tokens.

    >>> dollars(1234.5), dollars(0.00421), dollars(0.0), dollars(1200), dollars("free")
    ('$1,234.50', '$0.0042', '$0.00', 1200, 'free')
    """
    if not isinstance(value, float):
        return value
    return f"${value:,.2f}" if value >= 0.1 or not value else f"${value:.2g}"


def show_head(card: dict) -> str:
    """Counts as tiles, then models, cost and notes."""
    totals = card.get("totals", {}).items()
    tiles = "".join(f"<div><b>{e(written(v))}</b><span>{e(str(k))}</span></div>" for k, v in totals)
    cost = card.get("cost")
    cost = {k: dollars(v) for k, v in cost.items()} if isinstance(cost, dict) else dollars(cost)
    made = ""
    for title, value in (("Models", card.get("models")), ("Cost", cost)):
        lines = "".join(f"<dt>{e(k)}</dt><dd>{e(v)}</dd>" for k, v in pairs_of(value))
        made += f"<section><h2>{title}</h2><dl>{lines}</dl></section>" if lines else ""
    notes = "".join(f"<li>{e(text)}</li>" for _, text in pairs_of(card.get("notes")))
    made += f"<section><h2>Notes</h2><ul>{notes}</ul></section>" if notes else ""
    return f'<div class="tiles">{tiles}</div><div class="made">{made}</div>'


def read_pictures(items: Sequence[dict], picture: Callable[[dict], bytes]) -> list[tuple[str | None, str]]:
    """(data URI, "") of every item; (None, the path and what is wrong) where there is none."""
    found = []
    for item in items:
        try:
            found.append((picture_uri(picture(item)), ""))
        except OSError as error:
            path = error.filename or item.get("image") or item["image_id"]
            found.append((None, f"{path}: {error.strerror or error}"))
    return found


def write_page(items: Iterable[dict], card: dict, path, picture: Callable[[dict], bytes], per_category=8):
    """Write the page; prints one line of warning if pictures are missing.

    Args:
        items: {key, split, category, form, level, rating, text, options, answer, letter, objects: [{id,
            label, box}], relationships, fact, votes, blind, writer, source, licence, image_id, width,
            height}; votes and blind are records with model, said, state, raw.
        card: {name, totals: {name: n}, tables: {title: rows, see draw_table}, models, cost, notes}; the last
            three are a dict, a list of texts or one text, and a float is a cost in dollars.
        picture: the encoded picture of an item. OSError: it is missing, and a grey frame stands for it.
    Raises: ValueError naming an item that lacks a field, or a key that comes twice.
    """
    items = list(items)
    check_items(items)
    shown = choose(items, per_category)
    pictures = read_pictures(shown, picture)
    if missing := [reason for uri, reason in pictures if not uri]:
        print(f"warning: {len(missing)} of {len(shown)} pictures are missing on the page, first {missing[0]}")
    articles = [show_item(item, draw_picture(item, *found))
                for item, found in zip(shown, pictures, strict=True)]  # fmt: skip
    values = {name: {str(item[name]) for item in shown if item.get(name)} for name in FILTERS}
    order = {level: i for i, level in enumerate(LEVELS)}
    selects = [select(name, sorted(texts, key=lambda v: (order.get(v, 0), v)))
               for name, texts in values.items() if len(texts) > 1]  # fmt: skip
    keys = "\n".join(sorted(str(item["key"]) for item in items)).encode(errors="replace")
    text = fill(
        PAGE,
        title=e(card["name"]),
        store=e(f"review {card['name']} {hashlib.sha256(keys).hexdigest()[:16]}"),
        head=show_head(card),
        tables="".join(draw_table(title, rows) for title, rows in card.get("tables", {}).items() if rows),
        selects="".join(selects),
        shown=f"{len(shown):,} of {len(items):,} items",
        items="".join(articles),
    )
    write_html(Path(path), text)


# ---- decisions ----
def read_decisions(path) -> dict[str, str]:
    """{key: "keep" or "drop"} of a CSV file that the page or a spreadsheet saved.

    Fields are separated by commas, semicolons or tabs, columns stand in any order, among others or not; a row
    without a decision says nothing. Raises: ValueError naming the file, the line, expected and got.
    """
    raw = Path(path).read_bytes()
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # keys and decisions are plain; only notes are read wrongly
    head = next((line for line in text.splitlines() if line.strip()), "")
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=max(",;\t", key=head.count))
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected CSV, got: {error}") from None
    rows = [(line, row) for line, row in rows if any(row)]
    names = [name.lower() for name in rows[0][1]] if rows else []
    if names.count("key") != 1 or names.count("decision") != 1:
        got = ", ".join(names) or "none"
        raise ValueError(f"{path}: expected one column key and one column decision, got {got[:200]}")
    decisions = {}
    for line, row in rows[1:]:
        cells = dict(zip(names, row, strict=False))
        key, decision = cells.get("key", ""), cells.get("decision", "").lower()
        if decision and (decision not in DECISIONS or not key):
            got = f"{decision!r} for {key!r}"
            raise ValueError(f"{path}, line {line}: expected keep or drop for a key, got {got}")
        if decision and decisions.setdefault(key, decision) != decision:
            raise ValueError(f"{path}, line {line}: expected one decision for {key}, got keep and drop")
    return decisions
