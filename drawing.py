"""Draw a scene graph on a photo for people to read: boxes and names in it, relations in a strip below.

    draw_scene(image, scene["objects"], scene["relationships"], ["answer: (B) in front of"]).save("scene.png")

Lines and letters grow with the picture. What is drawn is 640 to 2,048 pixels on its long side: letters fit on
no smaller one, and a larger one takes seconds to write.
"""

import colorsys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from review import names_of, place_name, short

LEAST, MOST = 640, 2048  # pixels of the long side
MAX_RELATIONS = 40  # in the strip
PAPER, INK, GREY = (250, 250, 250), (25, 25, 25), (150, 150, 150)


def colour_of(i: int) -> tuple[int, int, int]:
    """The i-th of a row of vivid colours without end, of which neighbours differ most."""
    rgb = colorsys.hls_to_rgb((0.57 + 0.618034 * i) % 1, (0.6, 0.45, 0.72)[i % 3], 0.95)
    return tuple(round(255 * c) for c in rgb)


def letters(height: int):
    """A font that has accents and arrows, which PIL's own lacks."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(path, height)


def printable(text: str, longest: int = 40) -> str:
    """A model's words as one short line that a font can draw."""
    return short(" ".join("".join(c if c.isprintable() else " " for c in text).split()), longest)


class Pen:
    """Draws on one canvas with letters and lines of one size."""

    def __init__(self, canvas: Image.Image, height: int):
        self.draw, self.font, self.height = ImageDraw.Draw(canvas), letters(height), height
        self.pad, self.chip = height // 4, height + 2 * (height // 4)  # around a name; the name's height
        self.line = max(2, height // 7)

    def width(self, name: str) -> int:
        return round(self.font.getlength(name)) + 2 * self.pad

    def box(self, box, colour):
        """A rectangle in colour between dark lines, so that it shows on any ground."""
        self.draw.rectangle(box, outline=INK, width=self.line + 2)
        inner = [box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1]
        if inner[0] < inner[2] and inner[1] < inner[3]:
            self.draw.rectangle(inner, outline=colour, width=self.line)

    def name(self, x: float, y: float, name: str, ground, ink=None):
        """A name on a ground of its own, its upper left corner at x, y."""
        light = 0.3 * ground[0] + 0.59 * ground[1] + 0.11 * ground[2] > 128
        self.draw.rectangle([x, y, x + self.width(name) - 1, y + self.chip - 1], fill=ground)
        ink = ink or (INK if light else PAPER)
        self.draw.text((x + self.pad, y + self.chip / 2), name, fill=ink, font=self.font, anchor="lm")


def draw_scene(
    image: Image.Image, objects: Sequence[dict], relationships: Sequence[dict], notes: Sequence[str] = ()
) -> Image.Image:
    """The picture with its boxes and names; below it relations between the names, and lines of text.

    Args: image: upright, RGB; objects: {"id": "cup.1", "bbox": [x1, y1, x2, y2]}, in pixels, inside the
        image; relationships: {"subject", "predicate", "object"} with ids at the ends.
    """
    scale = min(max(1, LEAST / max(image.size)), MOST / max(image.size))
    size = [max(1, round(side * scale)) for side in image.size]
    crisp = scale > 3  # pixels stay pixels
    picture = image.resize(size, Image.Resampling.NEAREST if crisp else Image.Resampling.LANCZOS)
    height = max(16, round(max(size) / 64))  # of the letters
    # The narrowest strip of a picture gets paper beside or below it, so that a name has room.
    width, tall = max(size[0], 24 * height), max(size[1], 2 * height)

    labels = [{**o, "label": o["id"].rpartition(".")[0].replace("_", " ") or o["id"]} for o in objects]
    names = [printable(name, 24) for name in names_of(labels)]
    looks = {o["id"]: (name, colour_of(i)) for i, (o, name) in enumerate(zip(objects, names, strict=True))}
    strip = lay_out(relationships, looks, notes, width, height)

    canvas = Image.new("RGB", (width, tall + strip.height), PAPER)
    canvas.paste(picture, (0, 0))
    canvas.paste(strip, (0, tall))
    pen, taken = Pen(canvas, height), []
    boxes = [[min(c * scale, side - 1) for c, side in zip(o["bbox"], size * 2, strict=True)] for o in objects]
    for i, box in enumerate(boxes):
        pen.box(box, colour_of(i))
    for i, (box, name) in enumerate(zip(boxes, names, strict=True)):
        spot = place_name(box, pen.width(name), pen.chip, (width, tall), taken)
        pen.name(*map(round, spot), name, colour_of(i))
    return canvas


def lay_out(relationships, looks: dict, notes: Sequence[str], width: int, height: int) -> Image.Image:
    """The strip: relations one after the other, as many to a line as fit, then the lines of text."""
    pen = Pen(Image.new("RGB", (1, 1)), height)
    words, gap = [], height  # words: (x, line, text, ground); lines are counted from 0
    x = line = 0
    for r in relationships[:MAX_RELATIONS]:
        subject, object_ = (looks.get(r[end], (printable(r[end], 24), GREY)) for end in ("subject", "object"))
        parts = [subject, (printable(r["predicate"], 28), PAPER), object_]
        needed = sum(pen.width(text) for text, _ in parts)
        if x and x + needed > width - gap:
            x, line = 0, line + 1
        for text, ground in parts:
            if x + pen.width(text) > width - gap:  # longer than a line
                x, line = 0, line + 1
            words.append((gap + x, line, text, ground))
            x += pen.width(text)
        x += gap
    line += bool(words)
    if (more := len(relationships) - MAX_RELATIONS) > 0:
        notes = [f"and {more} more relation{'s' * (more > 1)}", *notes]
    for note in notes:
        for text in textwrap.wrap(printable(note, 400), max(8, int(1.4 * (width - 2 * gap) / height))):
            words.append((gap - pen.pad, line, text, PAPER))
            line += 1
    step = pen.chip + pen.pad
    strip = Image.new("RGB", (width, line * step + (gap if line else 0)), PAPER)
    pen = Pen(strip, height)
    for x, at, text, ground in words:
        pen.name(x, gap // 2 + at * step, text, ground)
    return strip
