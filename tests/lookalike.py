"""Rows as STVQA-7K is likely to hold them, flaws included, on made-up photographs.

    python tests/lookalike.py 7000 rows.parquet      # 0.6 GB, a minute

The data set cannot be shipped. Columns, texts and options are laid out as its description has them. Flaws are
those that its published generator lets through and that boxes of Visual Genome have. How often each comes is
an assumption.
"""

import io
import json
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(500, 375), (500, 375), (375, 500), (500, 333), (640, 480), (800, 600), (1024, 768), (1024, 683)]
LABELS = (
    "man woman boy dog horse bench car bus tree building table chair plate cup laptop umbrella boat bike "
    "wave sign lamp bag hat shirt fence sink bear vase skateboard"
).split()
PREDICATES = "on|in front of|behind|under|holding|riding|near|sitting on|above|next to|wearing|between".split(
    "|"
)
CATEGORIES = {  # in %
    "relation": 52.3, "reach": 7.3, "existence": 6.7, "depth": 6.6, "instance_location": 6.5, "size": 5.9,
    "distance": 5.7, "orientation": 5.1, "count": 3.9,
}  # fmt: skip
INSTRUCTION = """<image>You answer a question about the image with four blocks, in this order and each once.
First <observe>: say what the image shows, and which of its objects and relations the question is about.
Then <scene>: draw these objects and relations as a scene graph in JSON. Every object has an id, which is its
name, a full stop and a number (man.1, man.2), and a box [x1, y1, x2, y2] in pixels of the image, its top left
corner first. Every relation has the id of a subject, a predicate and the id of an object.
Then <think>: reason step by step from the scene to the answer. Last <answer>: letter and text of one option.

Example of the layout:
<observe>A man rides a bike along a street, the question is about the two.</observe>
<scene>{"objects": [{"id": "man.1", "bbox": [120, 40, 260, 330]},
{"id": "bike.1", "bbox": [90, 180, 300, 400]}],
"relationships": [{"subject": "man.1", "predicate": "riding", "object": "bike.1"}]}</scene>
<think>The man sits on the bike and his feet are on its pedals, so he is riding it.</think>
<answer>(B) riding</answer>

"""


# ---- pictures ----
@cache
def photo(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of about 0.25 bytes a pixel, as photographs have: soft patches and grain."""
    (w, h), rng = size, np.random.default_rng([*size, seed])
    patches = rng.integers(0, 255, (h // 24, w // 24, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC), dtype=float)
    pixels = np.clip(soft + rng.normal(0, 9, (h, w, 1)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


# ---- rows ----
def draft(rng: random.Random, n_photos: int) -> dict:
    """A row without flaws, in parts."""
    size = rng.choice(SIZES)
    objects = place(rng, size, rng.sample(LABELS, rng.randint(2, 4)))
    (a, _), (b, _) = objects[:2]
    options = rng.sample(PREDICATES, rng.choices((2, 3, 4), (2, 5, 3))[0])
    gold = rng.randrange(len(options))
    return {
        "size": size,
        "photo": photo(size, rng.randrange(n_photos)),
        "stated": f"({size[0]} x {size[1]})",
        "objects": objects,
        "relationships": [(a, options[gold], b)],
        "question": f"Where is the {a.split('.')[0]} with respect to the {b.split('.')[0]}?",
        "options": options,
        "gold": gold,
        "answer": options[gold],
    }


def place(rng, size, labels) -> list[tuple[str, list[int]]]:
    """(id, box) of each label: boxes of at least 40 pixels a side, wholly inside the image."""
    objects = []
    for label in labels:
        w, h = (rng.randint(40, side // 2) for side in size)
        x, y = rng.randint(0, size[0] - w), rng.randint(0, size[1] - h)
        number = 1 + sum(name.partition(".")[0] == label for name, _ in objects)
        objects.append((f"{label}.{number}", [x, y, x + w, y + h]))
    return objects


def row(image_id: str, parts: dict, rng) -> dict:
    """The parts in STVQA-7K's columns."""
    objects = [{"id": name, "bbox": box} for name, box in parts["objects"]]
    relations = [
        dict(zip(("subject", "predicate", "object"), r, strict=True)) for r in parts["relationships"]
    ]
    scene = f"<scene>{json.dumps({'objects': objects, 'relationships': relations})}</scene>"
    letter, text = "ABCD"[parts["gold"]], parts["answer"]
    listed = [f"({x}) {o}" for x, o in zip("ABCD", parts["options"], strict=False)]
    question = "\n".join([parts["question"], "Options:", *listed])
    return {
        "image_id": image_id,
        "images": {"bytes": parts["photo"], "path": None},
        "problem": f"{INSTRUCTION}Image size: {parts['stated']}\nNow answer the question.\nQ. {question}",
        "question_only": parts["question"],
        "answer": f"{scene}\n<answer>{letter}</answer>",
        "answer_only": letter,
        "answer_text": f"{scene}\n<answer>{text}</answer>",
        "answer_text_only": text,
        "answer_option_text": f"{scene}\n<answer>({letter}) {text}</answer>",
        "answer_option_text_only": f"({letter}) {text}",
        "category": rng.choices(list(CATEGORIES), list(CATEGORIES.values()))[0],
        "level": rng.choices(("easy", "medium", "hard"), (40, 40, 20))[0],
        "question_with_options": question,
        "options": parts["options"],
        "rating": rng.randint(7, 10),
    }


# ---- flaws ----
def first_box(parts, box):
    (name, _), *others = parts["objects"]
    return {"objects": [(name, box), *others]}


def over(pixels):
    """One side of the first box that many pixels outside the image."""

    def change(parts, rng):
        box, (w, h), side = list(parts["objects"][0][1]), parts["size"], rng.randrange(4)
        box[side] = (-pixels, -pixels, w + pixels, h + pixels)[side]
        return first_box(parts, box)

    return change


def outside(parts, rng):
    w, h = parts["size"]
    return first_box(parts, [w, h // 3, w + 2, h // 2])


def flat(parts, rng):
    x1, y1, _, y2 = parts["objects"][0][1]
    return first_box(parts, [x1, y1, x1, y2])


def two_words(parts, rng):
    return {"objects": [*parts["objects"], ("traffic light.1", [0, 0, 50, 50])]}


def whole_graph(parts, rng):
    old, new = parts["objects"], place(rng, parts["size"], rng.choices(LABELS, k=60 - len(parts["objects"])))
    new = [(f"{name.partition('.')[0]}.{i}", box) for i, (name, box) in enumerate(new, 10)]
    ends = [name for name, _ in new]
    pairs = [rng.sample(ends, 2) for _ in range(20)]
    more = [(subject, rng.choice(PREDICATES), object_) for subject, object_ in pairs]
    return {"objects": old + new, "relationships": parts["relationships"] + more}


def repeat(right: bool):
    """Four options, two of them the same: the right one, or wrong ones."""

    def change(parts, rng):
        wrong = [p for p in PREDICATES if p != parts["answer"]][:2]
        options = [wrong[0], parts["answer"], wrong[1], parts["answer"] if right else wrong[0]]
        return {"options": options, "gold": 1}

    return change


def every_text(write):
    """Options and answer in another dress, which the prompt shows."""

    def change(parts, rng):
        return {"options": [write(o) for o in parts["options"]], "answer": write(parts["answer"])}

    return change


def lies_on_its_side(parts, rng):
    image = Image.open(io.BytesIO(parts["photo"])).transpose(Image.Transpose.ROTATE_90)
    file, tags = io.BytesIO(), Image.Exif()
    tags[274] = 6  # turn me by a quarter, clockwise
    image.save(file, "JPEG", exif=tags)
    return {"photo": file.getvalue()}


FLAWS = {  # name: (assumed share, what changes); a row has one at most
    "one pixel over": (0.05, over(1)),
    "two pixels over": (0.03, over(2)),
    "ten pixels over": (0.005, over(10)),
    "outside": (0.001, outside),
    "flat box": (0.001, flat),
    "whole graph": (0.03, whole_graph),
    "empty scene": (0.006, lambda parts, rng: {"objects": [], "relationships": []}),
    "name of two words": (0.001, two_words),
    "wrong options repeat": (0.005, repeat(right=False)),
    "right option repeats": (0.002, repeat(right=True)),
    "blanks everywhere": (0.005, every_text(lambda text: f" {text} ")),
    "stops everywhere": (0.005, every_text(lambda text: f"{text}.")),
    "blank in the answer": (0.005, lambda parts, rng: {"answer": f" {parts['answer']} "}),
    "stop in the answer": (0.005, lambda parts, rng: {"answer": f"{parts['answer']}."}),
    "capital in the answer": (0.005, lambda parts, rng: {"answer": parts["answer"].capitalize()}),
    "stop in the options": (0.005, lambda parts, rng: {"options": [f"{o}." for o in parts["options"]]}),
    "no such answer": (0.0005, lambda parts, rng: {"answer": "left of"}),
    "size unknown": (0.003, lambda parts, rng: {"stated": "(Unknown)"}),
    "size of another file": (0.002, lambda parts, rng: {"stated": "(1280 x 853)"}),
    "on its side": (0.001, lies_on_its_side),
    "half a file": (0.0005, lambda parts, rng: {"photo": parts["photo"][: len(parts["photo"]) // 2]}),
}  # fmt: skip


def rows(n: int, counts: dict[str, int], seed: int = 0, n_photos: int = 1):
    """n rows in a shuffled order, of which counts[flaw] have that flaw; an id begins with its flaw's name."""
    rng = random.Random(seed)
    flaws = [flaw for flaw, count in counts.items() for _ in range(count)]
    flaws += ["fine"] * (n - len(flaws))
    for i, flaw in enumerate(rng.sample(flaws, n)):
        parts = draft(rng, n_photos)
        if flaw != "fine":
            parts |= FLAWS[flaw][1](parts, rng)
        yield row(f"{flaw} {i}", parts, rng)


def write(path, rows):
    from stvqa import write_parquet

    write_parquet(path, rows)
    return str(path)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    n = int(sys.argv[1])
    counts = {flaw: round(share * n) for flaw, (share, _) in FLAWS.items()}
    write(sys.argv[2], rows(n, counts, n_photos=32))
    print(f"wrote {sys.argv[2]}: {counts}")
