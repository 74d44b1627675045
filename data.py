"""Samples: load STVQA-7K or a look-alike, check every row, build prompts, resize, and order batches.

    samples = load_samples("OX-PIXL/STVQA-7K", split="train")   # or a .parquet, .jsonl or save_to_disk folder
    samples[0].question, samples[0].load_images()

One prompt builder and one image path serve training, vLLM and evaluation, so that all three see the same
tokens. Boxes are in the pixels of the original image, whatever size the model is shown; the prompt states it.
Of several images it is the first that boxes are of. Images stand at the `<image>` marks of the text, before
it where it has none or begins with them. A row may be text alone, and its answer of any of `answers.KINDS`.
"""

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from answers import KINDS, POINT_RANGE, is_right, read
from config import BoxFormat, write_whole
from images import Passed, damage_named, digest, open_image, to_rgb
from rewards import parse_ground_truth
from tables import read_table

# The column names of STVQA-7K. Another data set maps its own: columns={"question": "my_question", ...}.
COLUMNS = {
    "id": "image_id",
    "images": "images",
    "problem": "problem",
    "question": "question_with_options",
    "options": "options",
    "scene_answer": "answer_option_text",  # <scene>{json}</scene>\n<answer>(C) holding</answer>
    "answer": "answer_option_text_only",  # (C) holding
    "category": "category",
    "level": "level",
    "completion": "completion",  # a worked example, for supervised training only
    "kind": "kind",  # of the answer, one of answers.KINDS; without one: a choice of the options
    "frame": "frame",  # of a point or box, where the question states it: unit, per_mille or pixel
}
OPTIONAL_COLUMNS = ("id", "problem", "category", "level", "completion", "kind", "frame")

# The first is that of the published checkpoints' model card, with the size in brackets as STVQA-7K's own
# prompts have it. The paper's evaluator words it otherwise: `testsets.RELEASED`.
TEMPLATES = {
    "spatial_thinker": (
        "You FIRST observe the image in <observe> </observe> tags, then visualise the relevant scene graph "
        "in <scene> </scene> tags, followed by thinking about the reasoning process as an internal monologue "
        "within <think> </think> tags and then provide the final answer. The final answer MUST BE put within "
        "<answer> </answer> tags, and only return the final choice including the correct option and answer "
        "within the answer tags, e.g., <answer> (A) cat </answer>."
    ),
    "reasoning": (
        "First reason step by step within <think> </think> tags, then give the final answer within <answer> "
        "</answer> tags: the letter of the correct option and its text, e.g., <answer> (A) cat </answer>."
    ),
    "no_reasoning": "Answer with the letter of the correct option and its text, e.g., (A) cat.",
}
SHOWS_SIZE = ("spatial_thinker",)  # only boxes need the frame they live in
PER_MILLE = (  # what a prompt says with box_frame=per_mille, also below a row's own text about pixels
    "Write every bounding box as [x1, y1, x2, y2] in thousandths of the image's width and height, from 0 to "
    "1000, not in pixels."
)
_OPEN = "Answer with a single word or number."  # one for both, lest it tell which
HINTS = {"yes_no": "Answer with yes or no.", "number": _OPEN, "word": _OPEN}
POINTING = {"point": "one point (x, y)", "box": "one bounding box [x1, y1, x2, y2]"}
FRAMES = {
    "pixel": "in pixels of the image",
    "per_mille": "in thousandths of the image's width and height, from 0 to 1000",
}
ROUND = str.maketrans("()", "[]")
MARK = "<image>"  # in a text: here stands an image
NO_SCENE = '<scene>{"objects": [], "relationships": []}</scene>'  # the gold scene of a row of text alone
NO_IMAGE = (1, 1)  # the size of a row of text alone
VIDEO_COLUMNS = ("video", "videos")
VIDEO = re.compile(r"\.(?:mp4|mov|avi|mkv|webm|m4v)$", re.I)
SIZE_IN_PROMPT = re.compile(r"Image size: \(?(?:(\d+) x (\d+)|Unknown)\)?")

# Why a row is not trained on. Trained on are rows with boxes a little over the edge (clipped and counted), a
# whole graph of sixty objects, relationships with objects that the scene lacks, stray blanks in options
# (taken out of the prompt), an answer with other capitals or full stops than its option (rewarded as the
# prompt shows it), and "Image size: (Unknown)" in the prompt (the image's size is filled in).
REASONS = {
    "record": "no JSON object, or a column of another type",
    "image": "missing, damaged, of more pixels than can be meant, or 200 times as long as wide",
    "video": "none is taken: its frames can be a row's images",
    "marks": "of images in the text, neither one for each image nor none",
    "text": "empty, or with a control token of the model, such as <|image_pad|>, or half a surrogate pair",
    "kind": "of the answer, not one of answers.KINDS, or a frame that is none",
    "options": "not 2 to 10 texts, each another; or some beside an open answer",
    "answer": "none of the options, not of its kind, or another one in the gold scene's text",
    "size": "stated for the prompt, but not the image's: the boxes, or the question, are of another file",
    "scene": "outside the grammar of rewards.py: its JSON, an id, a box without area",
    "box_frame": "gold boxes that do not fit the image: rounding is not that wrong, another box_format is",
    "empty_scene": "a gold scene without objects, for which the dense reward would pay who does not look",
    "trained_on": "held out, but also among the training rows",
    "prompt": "none can be built, for lack of text or of an image size between min_pixels and max_pixels",
    "long_prompt": "more than max_prompt_length tokens; none is cut, as half a question has no answer",
}
PARTS = {"norm1": 1, "norm1000": 1000}  # of a side
OVER_EDGE = 0.1  # of the image's side: the most that a gold box may reach over it
LONGEST_SIDE = 200  # times the other: from there on Qwen2-VL's processor refuses an image
UNFIT = re.compile(r"<\|\w+\|>|[\ud800-\udfff]")  # in a text: no tokeniser or file takes half a pair
FIT = "no control token of a model and no half of a surrogate pair"
OPTION_LINE = re.compile(r"^[ \t]*(\([A-J]\))(.*)$", re.M)
LETTERED = re.compile(r"\(\s*([A-Ja-j])\s*\)\s*(.*)", re.S)


# ---- samples -----------------------------------------------------------------------------------------------
class BadRow(ValueError):
    """A row that cannot be used: one of REASONS, and what was expected and found."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """One question about one or more images; the images stay encoded until `load_images`."""

    id: str
    encoded_images: tuple[dict, ...]  # {"bytes": ..., "path": ...} as the datasets library stores them
    size: tuple[int, int]  # (W, H) of the first image, pixels: the frame of every box; of none NO_IMAGE
    question: str  # with its lettered options
    options: tuple[str, ...]
    answer: str  # "(C) holding"; a point's polygon [(x, y), ...] and a box in shares of the image
    ground_truth: str  # "<scene>{json}</scene>\n<answer>(C) holding</answer>"; the answer where no scene is
    problem: str = ""  # the row's own full prompt
    category: str = ""
    level: str = ""
    completion: str = ""
    kind: str = "choice"  # one of answers.KINDS: how the answer is read
    meta: dict = field(default_factory=dict)  # what a benchmark's official score groups by; a point's frame

    def load_images(self) -> list[Image.Image]:
        """Upright and in RGB. Raises: OSError naming the row: files may have changed since the check."""
        try:
            with damage_named():
                return [to_rgb(open_image(e)) for e in self.encoded_images]
        except OSError as error:
            raise OSError(f"row {self.id}: expected readable images, got {error}") from None


class Samples(Sequence):
    """The usable rows of a table, decoded one at a time, so that memory does not grow with their number."""

    def __init__(self, table, columns, need_scene, box_format, name, total):
        self.table, self.columns, self.need_scene, self.box_format = table, columns, need_scene, box_format
        self.name, self.total = name, total  # rows looked at
        self.rows: list[int] = []
        self.asked: list[str] = []  # a digest of each row's question and pictures
        self.texts = hashlib.blake2b(digest_size=16)  # of what else the rows hold
        self.max_images = 0  # of one row
        self.without_image = 0  # rows
        self.open_answers = 0  # rows that are no choice of options
        self.clipped = 0  # rows with a gold box clipped to the image
        self.overhang = 0.0  # the most that was cut off a box, pixels
        self.skipped: list[str] = []  # a message for each row left out
        self.reasons = Counter()  # {one of REASONS: rows}

    def fingerprint(self) -> dict:
        """What tells these rows, in this order, from others: for the record of a run."""
        asked = digest("".join(self.asked).encode())
        return {"rows": len(self), "fingerprint": f"{asked}{self.texts.hexdigest()}"}

    @functools.cached_property
    def asked_of(self) -> set[str]:
        return set(self.asked)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.rows[i]
        return row_to_sample(self.table[row], self.columns, row, self.need_scene, self.box_format)[0]


def load_samples(
    source: str,
    split: str = "train",
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    need_scene: bool = True,
    max_bad_rows: float = 0.0,
    limit: int | None = None,
    prompt_length: Callable[[Sample], int] | None = None,
    max_prompt_length: int | None = None,
    skip_bad_rows: bool = False,
    skip_long_prompts: bool = False,
    box_format: BoxFormat = "xyxy",
    apart_from: Samples | None = None,
    threads: int = 4,
) -> Samples:
    """Load a data set and check every row, its pictures to their end, before anything is trained on it.

    Args:
        source: Hub id, .parquet or .jsonl file, folder of parquet files, or `save_to_disk` folder.
        columns: names that differ from STVQA-7K's, as {our name: their name}; ours are the keys of COLUMNS.
        need_scene: the row must hold a gold scene (False for the sparse reward).
        max_bad_rows: the largest share of rows that may be left out, for one of REASONS; `.reasons` counts
            them and `.skipped` names them. It never changes which rows are used.
        prompt_length, max_prompt_length: count a prompt's tokens, and how many it may have.
        skip_bad_rows, skip_long_prompts: older forms of max_bad_rows=1.
        box_format: of the gold boxes: xyxy or xywh in pixels, norm1 or norm1000 (x1 y1 x2 y2 of 1 or 1000).
        apart_from: training rows, which held-out rows must not be.
    Raises: ValueError naming the source, what is wrong with how many rows, and the first of them.
    """
    if unknown := set(columns or {}) - set(COLUMNS):
        raise ValueError(f"columns: expected some of {list(COLUMNS)}, got {sorted(unknown)}")
    if box_format not in get_args(BoxFormat):
        raise ValueError(f"box_format: expected one of {get_args(BoxFormat)}, got {box_format!r}")
    columns = COLUMNS | (columns or {})
    table = read_table(source, split, revision, [columns["images"]])
    needed = [
        c
        for key, c in columns.items()
        if key not in OPTIONAL_COLUMNS
        and (key != "scene_answer" or need_scene)
        and (key != "options" or columns["kind"] not in table.column_names)
    ]
    name = f"{source} ({split})"
    if not len(table):
        raise ValueError(f"{name}: no rows")
    total = min(limit or len(table), len(table))
    samples, passed = Samples(table, columns, need_scene, box_format, name, total), Passed(name)
    if set(needed) - set(table.column_names):
        if not table.column_names:  # no line could be read
            check_row(samples, 0, passed)
        raise ValueError(f"{name}: {other_columns(needed, table.column_names)}")

    def check(row):
        try:
            sample, overhang, asked = check_row(samples, row, passed)
            if apart_from and asked in apart_from.asked_of:
                other = f"a row apart from {apart_from.name} (val_data names other rows)"
                raise BadRow("trained_on", f"row {sample.id} (#{row}): expected {other}, got one of it")
            if prompt_length:
                check_length(sample, row, prompt_length, max_prompt_length)
        except BadRow as error:
            return error
        texts = sample.problem, sample.answer, sample.ground_truth, sample.completion
        texts += (sample.kind, sample.meta) if sample.kind != "choice" else ()
        return asked, repr(texts), overhang, len(sample.encoded_images), sample.kind != "choice"

    with ThreadPoolExecutor(threads) as pool:
        checked = pool.map(check, range(total))
        for row, found in enumerate(tqdm(checked, f"checking {name}", total, disable=None, leave=False)):
            if isinstance(found, BadRow):
                samples.skipped.append(f"{found.reason}: {found}")
                samples.reasons[found.reason] += 1
                continue
            asked, texts, overhang, n_images, is_open = found
            samples.rows.append(row)
            samples.asked.append(asked)
            samples.texts.update(texts.encode())
            samples.clipped += overhang > 0
            samples.overhang = max(samples.overhang, overhang)
            samples.max_images = max(samples.max_images, n_images)
            samples.without_image += not n_images
            samples.open_answers += is_open
    passed.save()
    allowed = 1.0 if skip_bad_rows or skip_long_prompts else max_bad_rows
    if len(samples.skipped) > allowed * total or not samples.rows:
        raise ValueError(too_many_bad(samples, allowed))
    return samples


def other_columns(needed: Sequence[str], names: Sequence[str]) -> str:
    """What a table without some of the needed columns is told."""
    video = "; no video is taken, its frames can be" * bool({*VIDEO_COLUMNS} & {*names})
    missing = [name for name in needed if name not in names]
    return f"expected columns {list(needed)}, missing {missing}, got {names}{video}"


def check_row(samples: Samples, row: int, passed: Passed) -> tuple[Sample, float, str]:
    """(sample, overhang of its boxes, digest of its question and pictures). Raises: BadRow."""
    try:
        record = samples.table[row]
    except (ValueError, RecursionError) as error:
        raise BadRow("record", f"row #{row}: {error}") from None
    sample, overhang = row_to_sample(
        record, samples.columns, row, samples.need_scene, samples.box_format, to_train=True
    )
    try:
        pictures = [passed.check(encoded) for encoded in sample.encoded_images]
    except OSError as error:
        where = f"row {sample.id} (#{row}), column {samples.columns['images']}"
        raise BadRow("image", f"{where}: expected a readable image, got {error}") from None
    return sample, overhang, digest(repr((sample.question, pictures)).encode())


def too_many_bad(samples: Samples, allowed: float) -> str:
    """How many rows are bad and why, with one of each reason: many with one flaw should hide no other."""
    bad, total = len(samples.skipped), samples.total
    examples = {message.partition(":")[0]: message for message in reversed(samples.skipped)}.values()
    return (
        f"{samples.name}: {'' if samples.rows else 'no usable rows: '}{bad} of {total} rows cannot be used, "
        f"{bad / total:.2%} where max_bad_rows={allowed:g} allows {allowed:.2%}: "
        + count_reasons(samples.reasons)
        + "".join(f"\n  {message}" for message in examples)
    )


def count_reasons(reasons: Counter) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items(), key=lambda i: (-i[1], i[0])))


def report_rows(loaded: Mapping[str, Samples], listing: Path | None = None) -> str:
    """A line for each part of the data, and one for the rows left out; `listing` takes all their messages."""
    lines = []
    for part, s in loaded.items():
        boxes = f", {s.clipped} with a gold box clipped to the image by at most {s.overhang:g} px"
        shown = f", {s.without_image} without an image" * (s.without_image > 0)
        shown += f", up to {s.max_images} images in one" * (s.max_images > 1)
        lines.append(f"{part}: {len(s)} of {s.total} rows of {s.name}{shown}" + boxes * (s.clipped > 0))
    reasons = sum((samples.reasons for samples in loaded.values()), Counter())
    if reasons and listing:
        messages = [f"{part}: {message}\n" for part, samples in loaded.items() for message in samples.skipped]
        with write_whole(listing) as tmp:
            tmp.write_text("".join(messages), encoding="utf-8")
    where = f"; {listing} names them" if reasons and listing else ""
    lines.append(f"left out: {count_reasons(reasons)}{where}" if reasons else "left out: none")
    return "\n".join(lines)


def check_length(sample: Sample, index: int, prompt_length: Callable[[Sample], int], longest: int):
    """Raises: BadRow where a prompt cannot be built or has more tokens than `longest`."""
    try:
        n = prompt_length(sample)
    except ValueError as error:
        raise BadRow("prompt", f"row {sample.id} (#{index}): {error}") from None
    if n > longest:
        raise BadRow(
            "long_prompt",
            f"row {sample.id} (#{index}): prompt is {n} tokens long, expected at most {longest} "
            "(raise max_prompt_length or lower max_pixels)",
        )


def row_to_sample(
    row: dict,
    columns: dict[str, str],
    index: int,
    need_scene: bool,
    box_format: str = "xyxy",
    to_train: bool = False,
) -> tuple[Sample, float]:
    """-> (sample, by how many pixels its gold boxes were clipped).

    Args: to_train: refuse what only the reward minds: evaluation reads a letter.
    Raises: BadRow naming the row and the column.
    """
    # The number beside the id: ids repeat in real data, and a table is opened by number.
    row_id = row.get(columns["id"])
    row_id = f"{row_id} (#{index})" if row_id is not None else f"#{index}"

    def bad(reason, key, expected, got):
        texts = (" ".join(str(x).split()) for x in (expected, got))
        expected, got = (text if len(text) < 200 else f"{text[:200]}..." for text in texts)
        message = f"row {row_id}, column {columns[key]}: expected {expected}, got {got}"
        return BadRow(reason, message.encode(errors="backslashreplace").decode())

    def get(key, kind=str):
        value = row.get(columns[key])
        if isinstance(value, (int, float)) and key in ("id", "category", "level"):
            value = str(value)
        if value is not None and not isinstance(value, kind):
            raise bad("record", key, "a text" if kind is str else "a list", repr(value))
        if isinstance(value, str) and (token := UNFIT.search(value)):
            raise bad("text", key, FIT, token[0])
        return value

    question, problem = get("question"), get("problem") or ""
    if not question or not question.strip():
        raise bad("text", "question", "a question", repr(question))
    images, size = row_images(row, columns, to_train, bad)
    question, problem = tidy(question), tidy(problem)
    kind, frame = get("kind") or "choice", get("frame")
    if kind not in KINDS:
        raise bad("kind", "kind", f"one of {KINDS}", repr(kind))
    if frame not in (None, "pixel", *POINT_RANGE):
        raise bad("kind", "frame", f"one of {['pixel', *POINT_RANGE]}", repr(frame))
    check_images(row, images, columns, bad)
    if kind == "choice":
        options, answer = read_answer(question, get, bad)
        said = written = answer
        texts = [plain(o) for o in options]
        if to_train and len(set(texts)) < len(texts):
            raise bad("options", "options", "each option to differ", options)
    else:
        if (options := get("options", list)) and kind != "sequence":
            raise bad("options", "options", f"none, as the answer is a {kind}", options)
        options, written = (), row.get(columns["answer"])
        if isinstance(written, bool) or not isinstance(written, (str, int, float, list)):
            raise bad("answer", "answer", f"a {kind}", repr(written))
        written = json.dumps(written) if isinstance(written, list) else str(written).strip()
        if token := UNFIT.search(written):
            raise bad("text", "answer", FIT, token[0])
        answer, said = read_open(kind, written, size, box_format, bad)
        question = with_hint(question, kind)

    graph = get("scene_answer", str if need_scene and images else object)
    ground_truth, overhang = said, 0.0
    if need_scene and not images:
        ground_truth = f"{NO_SCENE}\n<answer>{said}</answer>"
    elif need_scene:
        frame_of = size, box_format
        ground_truth, n_objects, overhang = gold_scene(graph, written, said, *frame_of, bad)
        if to_train and not n_objects:
            raise bad("empty_scene", "scene_answer", "a gold scene with objects", "none")
    sample = Sample(
        id=get("id") or row_id,
        encoded_images=tuple(images),
        size=size,
        question=question,
        options=options,
        answer=answer,
        ground_truth=ground_truth,
        problem=fill_size(problem, size, bad),
        category=get("category") or "",
        level=get("level") or "",
        completion=get("completion") or "",
        kind=kind,
        meta={"frame": frame} if frame else {},
    )
    return sample, overhang


def row_images(row: dict, columns: dict, to_train: bool, bad: Callable) -> tuple[list, tuple[int, int]]:
    """(encoded images, size of the first) of a row, which may have none."""
    images = row.get(columns["images"])
    images = images if isinstance(images, list) else [] if images is None else [images]
    named = [name for name in VIDEO_COLUMNS if row.get(name)]
    named += [columns[key] for key in ("question", "problem") if "<video>" in (row.get(columns[key]) or "")]
    named += [e["path"] for e in images if isinstance(e, dict) and VIDEO.search(e.get("path") or "")]
    if named:
        raise bad("video", "images", "images: no video is taken, its frames can be", f"one in {named[0]}")
    if any(e is None for e in images):
        raise bad("image", "images", "an image", images)
    try:
        sizes = [open_image(encoded).size for encoded in (images if to_train else images[:1])]
    except OSError as error:
        raise bad("image", "images", "a readable image", error) from None
    if to_train and (slim := next((s for s in sizes if max(s) >= LONGEST_SIDE * min(s)), None)):
        raise bad("image", "images", f"a side below {LONGEST_SIDE} times the other", slim)
    return images, sizes[0] if sizes else NO_IMAGE


def check_images(row: dict, images: list, columns: dict, bad: Callable):
    """A row's texts have a mark for each image or none; one of text alone has nothing that needs an image."""
    for key in ("question", "problem"):
        text = row.get(columns[key]) or ""
        n = text.count(MARK)
        if n and images and n != len(images):
            raise bad("marks", key, f"{len(images)} {MARK} marks, one for each image, or none", n)
        if not images and (n or SIZE_IN_PROMPT.search(text)):
            raise bad("image", "images", f"an image, of which column {columns[key]} speaks", "nothing")
    if images:
        return
    if row.get(columns["kind"]) in POINTING:
        raise bad("image", "images", f"an image for an answer of kind {row[columns['kind']]}", "nothing")
    if "bbox" in str(row.get(columns["scene_answer"])):
        raise bad("image", "images", "an image for the gold scene", "nothing")


def fill_size(problem: str, size: tuple[int, int], bad: Callable) -> str:
    """A row's own prompt with the image's size where it says Unknown."""
    # It states the frame of the boxes. Where it is that of another image file, every box is wrong.
    if (stated := SIZE_IN_PROMPT.search(problem)) and stated[1] and tuple(map(int, stated.groups())) != size:
        raise bad("size", "problem", f"the image's size {size}", f"{stated[0]!r}")
    if not stated or stated[1]:
        return problem
    return SIZE_IN_PROMPT.sub(f"Image size: ({size[0]} x {size[1]})", problem)


def with_hint(question: str, kind: str) -> str:
    """An open question that says how to answer it, where it does not itself."""
    says = re.search(r"\b(?:answer|respond) with\b", question, re.I)
    return f"{question}\n{HINTS[kind]}" if kind in HINTS and not says else question


def tidy(text: str) -> str:
    """A prompt in which a line for each option has single blanks only, as whoever copies it will write it."""
    return OPTION_LINE.sub(lambda line: f"{line[1]} {' '.join(line[2].split())}", text)


def plain(text: str) -> str:
    """As texts of options are compared: without case, runs of blanks and a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


def read_open(kind: str, written: str, size, box_format: str, bad: Callable) -> tuple[str, str]:
    """(gold as `answers.is_right` takes it, the same as a reply says it) of an answer that is no option.

    What its own reader does not read, no reply could earn.
    """
    if kind in POINTING:
        return read_region(kind, written, size, box_format, bad)
    said = read(kind, f"<answer>{written}</answer>")[0]
    gold = written.rstrip(". ") if kind == "yes_no" else written
    if kind in ("number", "sequence") and said is not None:
        gold = f"{said:.15g}" if kind == "number" else said
    if not is_right(kind, said, gold):
        raise bad("answer", "answer", f"a {kind}", repr(written))
    return gold, gold


def read_region(kind: str, written: str, size, box_format: str, bad: Callable) -> tuple[str, str]:
    """`read_open` of a box, or of the polygon or box that a point has to lie in."""
    expected = "[x1, y1, x2, y2]" + " or [[x, y], ...]" * (kind == "point")
    try:
        numbers = json.loads(written.translate(ROUND))
        is_box = len(numbers) == 4 and not isinstance(numbers[0], list)
        corners = [numbers[:2], numbers[2:]] if is_box else numbers
        corners = [(float(x), float(y)) for x, y in corners]
        if box_format == "xywh" and is_box:
            corners[1] = corners[0][0] + corners[1][0], corners[0][1] + corners[1][1]
        sides = (PARTS[box_format],) * 2 if box_format in PARTS else size
        shares = [tuple(c / side for c, side in zip(corner, sides, strict=True)) for corner in corners]
        (x1, x2), (y1, y2) = ((min(c), max(c)) for c in zip(*shares, strict=True))
        if not (is_box or kind == "point" and len(shares) > 2) or not (x1 < x2 and y1 < y2):
            raise ValueError(written)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise bad("answer", "answer", expected, repr(written)) from None
    of_1 = sides == size and 0 <= min(map(min, corners)) and max(map(max, corners)) <= 1 < max(size) / 2
    if of_1 or not (-OVER_EDGE <= min(x1, y1) and max(x2, y2) <= 1 + OVER_EDGE):
        raise bad("box_frame", "answer", f"a {kind} that fits the image {size} as {box_format}", written)
    if is_box and shares[0] != (x1, y1):
        raise bad("answer", "answer", "x1 < x2 and y1 < y2", written)
    shares = [tuple(min(max(c, 0.0), 1.0) for c in corner) for corner in shares]
    if kind == "point" and is_box:
        (x1, y1), (x2, y2) = shares
        shares = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    pixels = [[c * side for c, side in zip(corner, size, strict=True)] for corner in shares]
    flat = (sum(map(list, shares), []), sum(pixels, [])) if kind == "box" else (shares, pixels)
    return json.dumps(flat[0]), json.dumps(flat[1])


def read_answer(question: str, get: Callable, bad: Callable) -> tuple[tuple[str, ...], str]:
    """(options, gold answer), the latter as a reply is rewarded that copies the option from the question."""
    # As many as there are letters for the reader of answers, which sees every sample during training.
    options = tuple(get("options", list) or ())
    if not 2 <= len(options) <= 10 or not all(isinstance(o, str) and plain(o) for o in options):
        raise bad("options", "options", "a list of 2 to 10 texts, or an open answer's kind", options)
    if token := UNFIT.search(" ".join(options)):
        raise bad("text", "options", FIT, token[0])
    answer = get("answer")
    by_letter = dict(zip("ABCDEFGHIJ", options, strict=False))
    found = LETTERED.fullmatch(answer.strip()) if answer else None
    letter = found and found[1].upper()
    if letter not in by_letter or plain(found[2]) != plain(by_letter[letter]):
        lettered = [f"({letter}) {o}" for letter, o in by_letter.items()]
        raise bad("answer", "answer", f"one of {lettered}", repr(answer))
    # The reward compares letter and text, up to case and outer blanks. What the model can copy is the line of
    # the question, which may have a full stop that the list of options lacks.
    lines = [line[2] for line in OPTION_LINE.finditer(question) if line[1] == f"({letter})"]
    shown = next((line for line in reversed(lines) if plain(line) == plain(found[2])), by_letter[letter])
    rewarded = f"({letter}) {shown.strip()}"
    return options, answer if answer.strip().lower() == rewarded.lower() else rewarded


def gold_scene(
    text, written: str, answer: str, size: tuple[int, int], box_format: str, bad: Callable
) -> tuple[str, int, float]:
    """(the gold text with boxes inside the image, number of objects, the most that was clipped in pixels).

    Args: written: the row's answer, which the text has to have too; answer: what is rewarded for it.

    A box a little over the edge is clipped to it: annotation tools round, those of Visual Genome end a pixel
    or two outside. One that does not show could not be earned: in a reply such a box is malformed.
    """
    try:
        text = in_pixels(text, size, box_format)
        scene, scene_answer = parse_ground_truth(text)
    except (ValueError, OverflowError) as error:
        hint = " (box_format=xywh?)" * ("x1 < x2" in str(error) and box_format == "xyxy")
        raise bad("scene", "scene_answer", "a gold scene and answer", f"{error}{hint}") from None
    if same_answer(scene_answer) != same_answer(written):
        raise bad("answer", "scene_answer", f"the answer {written!r}", repr(scene_answer))
    overhang, (w, h) = 0.0, size
    for o in scene["objects"]:
        x1, y1, x2, y2 = o["bbox"]
        over_x, over_y = max(0, -x1, x2 - w), max(0, -y1, y2 - h)
        hidden = x1 >= w or y1 >= h or x2 <= 0 or y2 <= 0
        of_1 = 0 <= min(o["bbox"]) and max(o["bbox"]) <= 1 < max(size) / 2
        if hidden or of_1 or over_x > OVER_EDGE * w or over_y > OVER_EDGE * h:
            looks = (
                "norm1" if of_1 else "norm1000" if 0 <= min(o["bbox"]) and max(o["bbox"]) <= 1000 else None
            )
            hint = f" (box_format={looks}?)" if looks and box_format not in PARTS else ""
            frame = f"boxes that fit the image {size} as {box_format}{hint}"
            raise bad("box_frame", "scene_answer", frame, f"{o['id']} {o['bbox']}")
        overhang = max(overhang, over_x, over_y)
        o["bbox"] = [max(x1, 0), max(y1, 0), min(x2, w), min(y2, h)]
    # Else the row's own text: written anew, it might not be the annotator's to the last digit.
    if overhang or scene_answer.strip().lower() != answer.strip().lower():
        text = f"<scene>{json.dumps(scene)}</scene>\n<answer>{answer.strip()}</answer>"
    return text, len(scene["objects"]), overhang


def same_answer(text: str) -> tuple[str, str]:
    """(letter or "", text) of an answer as two columns have to agree on it."""
    found = LETTERED.fullmatch(text.strip())
    return (found[1].upper(), plain(found[2])) if found else ("", "".join(plain(text).split()))


def in_pixels(text: str | None, size: tuple[int, int], box_format: str) -> str | None:
    """A gold text whose boxes are x1 y1 x2 y2 in pixels, objects as {"id", "bbox"}; untouched where they are.

    Objects may be {"label", "bbox_2d"} as Qwen writes them, also in a list without relationships: labels get
    numbers, cup.1, cup.2, and a relationship that names a label means its first object.
    """
    found = re.search(r"(?<=<scene>).*(?=</scene>)", text or "", re.S)
    if not found or (box_format == "xyxy" and not re.search(r'"(?:bbox_2d|label)"', found[0])):
        return text
    try:
        scene = json.loads(found[0])
        scene = scene if isinstance(scene, dict) else {"objects": scene}
        objects, names, seen = [], {}, Counter()
        w, h, parts = (*size, PARTS[box_format]) if box_format in PARTS else (1, 1, 1)
        for o in scene["objects"]:
            if (name := o.get("id")) is None:
                label, name = o["label"], "_".join(o["label"].split())
                if not re.search(r"\.\d+$", name):
                    seen[name] += 1
                    name = f"{name}.{seen[name]}"
                names.setdefault(label, name)
            x1, y1, x2, y2 = o["bbox"] if "bbox" in o else o["bbox_2d"]
            if box_format == "xywh":
                x2, y2 = x1 + x2, y1 + y2
            objects.append(
                {"id": name, "bbox": [x1 * w / parts, y1 * h / parts, x2 * w / parts, y2 * h / parts]}
            )
        scene["objects"] = objects
        for relation in scene.get("relationships", ()):
            for end in ("subject", "object"):
                relation[end] = names.get(relation[end], relation[end])
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
        expected = "objects with id or label, and bbox or bbox_2d"
        raise ValueError(f"expected {expected}, got {type(error).__name__} {error}") from None
    return f"{text[: found.start()]}{json.dumps(scene)}{text[found.end() :]}"


# ---- prompts -----------------------------------------------------------------------------------------------
def build_prompt_text(
    template: str, question: str, size: tuple[int, int] | None, box_frame: str = "pixel"
) -> str:
    """The user's words: instructions, the boxes' frame where they are asked for, the question.

    The frame is the image's size (W x H), or with box_frame "per_mille" the sentence PER_MILLE. Args: size:
        None without an image.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {[*TEMPLATES, 'problem']}, got {template!r}")
    shown = []
    if size and template in SHOWS_SIZE:
        shown = [f"Image size: ({size[0]} x {size[1]})" if box_frame == "pixel" else PER_MILLE]
    return "\n\n".join([TEMPLATES[template], *shown, question])


def build_prompt(sample: Sample, template: str, box_frame: str = "pixel") -> list[dict]:
    """Chat messages for a sample: text with its images at their marks. Template "problem": the row's own."""
    with_text_alone = sample.size == NO_IMAGE and not sample.encoded_images
    if template != "problem":
        question = behind_images(sample.question)
        if sample.kind in POINTING and "frame" not in sample.meta:
            question += f"\nAnswer with {POINTING[sample.kind]} {FRAMES[box_frame]}."
        size = None if with_text_alone else sample.size
        text = build_prompt_text(template, question, size, box_frame)
    else:
        text = behind_images(sample.problem)
        text += f"\n\n{PER_MILLE}" if text and box_frame == "per_mille" and not with_text_alone else ""
    if not text.replace(MARK, "").strip():
        raise ValueError(f"row {sample.id}: template 'problem' needs the column {COLUMNS['problem']}")
    return [{"role": "user", "content": lay_out(text, len(sample.encoded_images))}]


def behind_images(text: str) -> str:
    """A text without the marks that it begins with, if it has no others: images come first anyway.

    >>> behind_images("<image>\\n<image> Which?"), behind_images("<image> or <image>?")
    ('Which?', '<image> or <image>?')
    """
    rest = re.sub(rf"^(?:\s*{MARK})+\s*", "", text)
    return text if MARK in rest else rest.lstrip()


def lay_out(text: str, n: int) -> list[dict]:
    """The content of a message with n images: at the text's marks, or before it where it has none.

    Raises: ValueError if there are more or fewer marks than images, of which n = 0 hides all.
    """
    if n == 0:
        text = text.replace(MARK, "")
    first, *others = text.split(MARK)
    if others and len(others) != n:
        raise ValueError(f"expected {n} {MARK} marks in the prompt, one for each image, got {len(others)}")
    pieces = [(0, first), *((1, piece) for piece in others)] if others else [(n, first)]
    content = []
    for images, piece in pieces:
        content += [{"type": "image"}] * images
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def smart_size(
    width: int, height: int, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """(W, H), multiples of `factor` with W * H in [min_pixels, max_pixels]: what a Qwen-VL sees.

    A fixed point: the processor's rule is applied until it changes nothing, since of a slim image it changes
    its own result. Raises: ValueError where it never settles, as in a narrow budget.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    h, w = height, width
    for _ in range(32):
        before, (h, w) = (h, w), smart_resize(h, w, factor, min_pixels, max_pixels)
        if (h, w) == before:
            return w, h
    raise ValueError(
        f"expected room for an image of {width} x {height} in multiples of {factor}, "
        f"got min_pixels {min_pixels}, max_pixels {max_pixels}: widen them"
    )


def resize(image: Image.Image, min_pixels: int, max_pixels: int, factor: int = 28) -> Image.Image:
    """The image at `smart_size`, resized once and here, so that no later stage resizes again."""
    size = smart_size(*image.size, min_pixels, max_pixels, factor)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it: L tokens, of which an image takes a run of equal image tokens."""

    sample: Sample
    images: list[Image.Image]  # resized
    vllm_ids: list[int]  # one image token per image: vLLM expands it to the ids below
    ids: list[int]  # (L,)
    pixel_values: object  # (patches, values of one) float32, or None without images
    image_grid_thw: object  # (images, 3) int64, or None

    @property
    def nbytes(self) -> int:
        """Memory of the images (3 bytes a pixel) and of the pixel values (in float32 24, for two frames)."""
        pixels = sum(3 * math.prod(image.size) for image in self.images)
        return pixels + (self.pixel_values.nbytes if self.pixel_values is not None else 0)


class PromptEncoder:
    """Sample -> Prompt with one processor, template and pixel budget; the sampler gets the same budget.

    Without a processor (None: a model behind an API) only `messages` and `images` work.
    """

    def __init__(self, processor, template: str, min_pixels: int, max_pixels: int, box_frame: str = "pixel"):
        self.processor, self.template, self.box_frame = processor, template, box_frame
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.cell = 28  # pixels, a side of what becomes one image token
        if processor is not None:
            images = getattr(processor, "image_processor", None)
            self.cell = getattr(images, "patch_size", 0) * getattr(images, "merge_size", 0)
            if not self.cell:
                raise ValueError(
                    f"{type(processor).__name__}: expected the processor of a Qwen-VL, with patches that are "
                    "merged into image tokens, got none of that kind"
                )
        area = self.cell**2
        if max_pixels // area * area < min_pixels:
            raise ValueError(
                f"expected a multiple of {self.cell} x {self.cell} = {area} pixels between min_pixels and "
                f"max_pixels, got {min_pixels} and {max_pixels}"
            )
        if processor is not None:
            processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}

    def messages(self, sample: Sample) -> list[dict]:
        return build_prompt(sample, self.template, self.box_frame)

    def images(self, sample: Sample) -> list[Image.Image]:
        return [resize(i, self.min_pixels, self.max_pixels, self.cell) for i in sample.load_images()]

    def text(self, sample: Sample) -> str:
        return self.processor.apply_chat_template(
            self.messages(sample), tokenize=False, add_generation_prompt=True
        )

    def __call__(self, sample: Sample) -> Prompt:
        return self.with_pixels(self.for_engine(sample))

    def for_engine(self, sample: Sample) -> Prompt:
        """The Prompt without pixel values, which an inference engine computes itself."""
        images = self.images(sample)
        vllm_ids = self.processor.tokenizer(self.text(sample))["input_ids"]
        # A cell, 2 x 2 patches merged, is one token: the images are already multiples of it.
        cells = iter([math.prod(image.size) // self.cell**2 for image in images])
        image_token = self.processor.image_token_id
        ids = [i for token in vllm_ids for i in [token] * (next(cells) if token == image_token else 1)]
        return Prompt(sample, images, vllm_ids, ids, None, None)

    def with_pixels(self, prompt: Prompt) -> Prompt:
        """A Prompt of `for_engine` with pixel values as well: two thirds of the work."""
        if not prompt.images:
            return prompt
        seen = self.processor.image_processor(images=prompt.images, return_tensors="pt")
        return replace(prompt, pixel_values=seen["pixel_values"], image_grid_thw=seen["image_grid_thw"])

    def length(self, sample: Sample) -> int:
        """Tokens of the prompt, from the images' headers alone."""
        budget = self.min_pixels, self.max_pixels, self.cell
        cells = [
            math.prod(smart_size(*open_image(e).size, *budget)) // self.cell**2 for e in sample.encoded_images
        ]
        ids = self.processor.tokenizer(self.text(sample))["input_ids"]
        if (n := ids.count(self.processor.image_token_id)) != len(cells):
            raise ValueError(f"expected {len(cells)} image tokens in its prompt, got {n}")
        return len(ids) + sum(cells) - len(cells)


class PromptCache:
    """Prompts by row, made in threads before they are asked for, and kept up to a number of bytes.

    Decoding, resizing and cutting into patches all let go of the interpreter's lock, so that N threads on N
    cores are N times as fast, and a GPU need not wait for them.
    """

    def __init__(self, make: Callable[[int], Prompt], threads: int, max_bytes: float = 0):
        self.make, self.max_bytes, self.pool = make, max_bytes, ThreadPoolExecutor(threads)
        self.made = 0  # prompts, so far
        self.begun: dict[int, Future] = {}
        self.clear()

    def ahead(self, rows: Iterable[int]):
        """Begin to make the prompts of rows that will be asked for."""
        for row in rows:
            if row not in self.kept and row not in self.begun:
                self.begun[row] = self.pool.submit(self.make, row)

    def __call__(self, row: int) -> Prompt:
        if row in self.kept:
            return self.kept[row]
        self.ahead([row])
        prompt = self.begun.pop(row).result()
        self.made += 1
        # Once full, it stays as it is: rows come round in the same order, and to make room for the next one
        # would drop the very row that is asked for next.
        if self.bytes + prompt.nbytes <= self.max_bytes:
            self.kept[row], self.bytes = prompt, self.bytes + prompt.nbytes
        return prompt

    def clear(self):
        """Forget all prompts that are kept."""
        self.kept: dict[int, Prompt] = {}
        self.bytes = 0


# ---- batches -----------------------------------------------------------------------------------------------
def batch_at(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """Indices of step's batch: a pure function, so that a resumed run needs no loader state.

    The steps read through one endless row of epochs, each a permutation of range(n) of its own: nothing is
    dropped or repeated within an epoch, also where a batch straddles two.
    """
    at = range(step * batch_size, (step + 1) * batch_size)
    epochs = {e: np.random.default_rng([seed, e]).permutation(n) for e in {i // n for i in at}}
    return [int(epochs[i // n][i % n]) for i in at]
