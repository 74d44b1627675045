"""Samples: load STVQA-7K or a look-alike, check every row, build prompts, resize, and order batches.

    samples = load_samples("OX-PIXL/STVQA-7K", split="train")   # or a .parquet, .jsonl or save_to_disk folder
    samples[0].question, samples[0].load_images()

One prompt builder and one image path serve training, vLLM and evaluation, so that all three see the same
tokens. Boxes are in the pixels of the original image, whatever size the model is shown; the prompt states it.
"""

import base64
import functools
import io
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from rewards import parse_ground_truth

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
}
OPTIONAL_COLUMNS = ("id", "problem", "category", "level", "completion")

# The first is the released inference template, word for word: the published checkpoints expect it.
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
SIZE_IN_PROMPT = re.compile(r"Image size: \(?(?:(\d+) x (\d+)|Unknown)\)?")

# Why a row is not trained on. Trained on are rows with boxes over the edge (clipped and counted), a whole
# graph of sixty objects, relationships with objects that the scene lacks, wrong options that repeat, stray
# blanks in options (taken out of the prompt), an answer with other capitals or full stops than its option
# (rewarded as the prompt shows it), and "Image size: (Unknown)" in the prompt (the image's size is filled
# in).
REASONS = {
    "image": "missing, damaged, or of more pixels than can be meant",
    "question": "empty, or with a control token of the model, such as <|image_pad|>",
    "options": "not 2 to 10 texts",
    "answer": "none of the options, or another one in the gold scene's text",
    "repeated_answer": "also stands under another letter: of two right replies the reward would punish one",
    "size": "stated for the prompt, but not the image's: the boxes, or the question, are of another file",
    "scene": "outside the grammar of rewards.py: its JSON, an id, a box without area",
    "box_outside": "a gold box that does not show in the image: rounding is not that wrong, another frame is",
    "empty_scene": "a gold scene without objects, for which the dense reward would pay who does not look",
    "prompt": "none can be built, for lack of text or of an image of usable proportions",
    "long_prompt": "more than max_prompt_length tokens; none is cut, as half a question has no answer",
}
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
OPTION_LINE = re.compile(r"^[ \t]*(\([A-J]\))(.*)$", re.M)
LETTERED = re.compile(r"\(\s*([A-Ja-j])\s*\)\s*(.*)", re.S)
# What PIL raises for damaged files beside OSError.
DAMAGED = (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


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
    size: tuple[int, int]  # (W, H) of the first image, pixels: the frame of every box
    question: str  # with its lettered options
    options: tuple[str, ...]
    answer: str  # "(C) holding"
    ground_truth: str  # "<scene>{json}</scene>\n<answer>(C) holding</answer>"; the answer where no scene is
    problem: str = ""  # the row's own full prompt
    category: str = ""
    level: str = ""
    completion: str = ""
    kind: str = "choice"  # or yes_no, number, word, point, sequence: how answers.py reads the answer
    meta: dict = field(default_factory=dict)  # what a benchmark's official score groups by

    def load_images(self) -> list[Image.Image]:
        return [to_rgb(open_image(e)) for e in self.encoded_images]


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: on white where it is transparent, a depth map of more bits scaled to 8."""
    if image.mode.startswith(("I", "F")):  # PIL would cut them off
        depth = np.asarray(image, dtype=np.float64)
        known = depth[np.isfinite(depth)]
        near, far = (known.min(), known.max()) if known.size else (0, 0)
        shades = np.nan_to_num(255 * (depth - near) / max(far - near, 1e-9), nan=0, posinf=255, neginf=0)
        image = Image.fromarray(shades.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # tags that only some of the later readers would follow: turn me, these are my colours
    return image


def open_image(encoded: dict) -> Image.Image:
    """The upright PIL image behind a {"bytes", "path"} record. Raises: OSError, whatever is wrong with it.

    Only the header is read until pixels are asked for, unless it says that the image lies on its side.
    """
    if not isinstance(encoded, dict) or not (encoded.get("bytes") or encoded.get("path")):
        raise OSError(f"expected bytes or a path, got {str(encoded)[:80]}")
    try:
        image = Image.open(io.BytesIO(encoded["bytes"]) if encoded.get("bytes") else encoded["path"])
        # A PNG without the tag in its header would be read to its end for one.
        tags = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        return ImageOps.exif_transpose(image) if tags.get(ExifTags.Base.Orientation, 1) != 1 else image
    except DAMAGED as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def check_pixels(encoded: dict):
    """Read an image to its end: its header says nothing of what was cut off. Raises: OSError."""
    image = open_image(encoded)
    try:
        if image.format == "PNG":
            image.verify()  # the checksums
        else:
            image.draft("L", (1, 1))  # of a JPEG an eighth of each side: all is read, little computed
            image.load()
    except DAMAGED as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


class Samples(Sequence):
    """The usable rows of a table, decoded one at a time, so that memory does not grow with their number."""

    def __init__(self, table, columns, need_scene, name, total):
        self.table, self.columns, self.need_scene = table, columns, need_scene
        self.name, self.total = name, total  # rows looked at
        self.rows: list[int] = []
        self.max_images = 0  # of one row
        self.clipped = 0  # rows with a gold box clipped to the image
        self.overhang = 0.0  # the most that was cut off a box, pixels
        self.skipped: list[str] = []  # a message for each row left out
        self.reasons = Counter()  # {one of REASONS: rows}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.rows[i]
        return row_to_sample(self.table[row], self.columns, row, self.need_scene)[0]


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
) -> Samples:
    """Load a data set and check every row before anything is trained on it.

    Args:
        source: Hub id, .parquet or .jsonl file, folder of parquet files, or `save_to_disk` folder.
        columns: names that differ from STVQA-7K's, as {our name: their name}; ours are the keys of COLUMNS.
        need_scene: the row must hold a gold scene (False for the sparse reward).
        max_bad_rows: the largest share of rows that may be left out, for one of REASONS; `.reasons` counts
            them and `.skipped` names them. It never changes which rows are used.
        prompt_length, max_prompt_length: count a prompt's tokens, and how many it may have.
        skip_bad_rows, skip_long_prompts: older forms of max_bad_rows=1.
    Raises: ValueError naming the source, what is wrong with how many rows, and the first of them.
    """
    if unknown := set(columns or {}) - set(COLUMNS):
        raise ValueError(f"columns: expected some of {list(COLUMNS)}, got {sorted(unknown)}")
    columns = COLUMNS | (columns or {})
    table = read_table(source, split, revision, [columns["images"]])
    needed = [
        c
        for key, c in columns.items()
        if key not in OPTIONAL_COLUMNS and (key != "scene_answer" or need_scene)
    ]
    name = f"{source} ({split})"
    if not len(table):
        raise ValueError(f"{name}: no rows")
    if missing := [c for c in needed if c not in table.column_names]:
        raise ValueError(f"{name}: expected columns {needed}, missing {missing}, got {table.column_names}")

    total = min(limit or len(table), len(table))
    samples = Samples(table, columns, need_scene, name, total)
    for row in tqdm(range(total), desc=f"checking {name}", disable=None, leave=False):
        try:
            sample, overhang = row_to_sample(table[row], columns, row, need_scene, to_train=True)
            if prompt_length:
                check_length(sample, row, prompt_length, max_prompt_length)
        except BadRow as error:
            samples.skipped.append(f"{error.reason}: {error}")
            samples.reasons[error.reason] += 1
            continue
        samples.rows.append(row)
        samples.clipped += overhang > 0
        samples.overhang = max(samples.overhang, overhang)
        samples.max_images = max(samples.max_images, len(sample.encoded_images))
    allowed = 1.0 if skip_bad_rows or skip_long_prompts else max_bad_rows
    if (bad := len(samples.skipped)) > allowed * total or not samples.rows:
        # One of each reason, since a thousand rows with one flaw should not hide another.
        examples = {message.partition(":")[0]: message for message in reversed(samples.skipped)}.values()
        raise ValueError(
            f"{name}: {'' if samples.rows else 'no usable rows: '}{bad} of {total} rows cannot be used, "
            f"{bad / total:.2%} where max_bad_rows={allowed:g} allows {allowed:.2%}: "
            + count_reasons(samples.reasons)
            + "".join(f"\n  {message}" for message in examples)
        )
    return samples


def count_reasons(reasons: Counter) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items(), key=lambda i: (-i[1], i[0])))


def report_rows(loaded: Mapping[str, Samples], listing: Path | None = None) -> str:
    """A line for each part of the data, and one for the rows left out; `listing` takes all their messages."""
    lines = []
    for part, s in loaded.items():
        boxes = f", {s.clipped} with a gold box clipped to the image by at most {s.overhang:g} px"
        lines.append(f"{part}: {len(s)} of {s.total} rows of {s.name}" + boxes * (s.clipped > 0))
    reasons = sum((samples.reasons for samples in loaded.values()), Counter())
    if reasons and listing:
        messages = [f"{part}: {message}\n" for part, samples in loaded.items() for message in samples.skipped]
        listing.write_text("".join(messages), encoding="utf-8")
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


def read_table(
    source: str, split: str, revision: str | None, image_columns: Sequence[str], config: str | None = None
):
    """The rows as a memory-mapped `datasets.Dataset` whose images are left encoded.

    Args: source: Hub id (with `config`), .parquet, .jsonl or .tsv file (images in base64), or folder.
    Raises: ValueError naming the source, with what was expected and found.
    """
    if not source:
        raise ValueError("data: expected a Hub id, a file or a folder, got nothing")
    path, table = Path(source), open_table(source, split, revision, config)
    return leave_encoded(table, image_columns, path if path.is_dir() else path.parent, path.suffix == ".tsv")


def open_table(source: str, split: str, revision: str | None, config: str | None):
    """The rows as `datasets` reads them."""
    import datasets

    path = Path(source)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        table = datasets.load_from_disk(source)
        if not isinstance(table, datasets.DatasetDict):  # one split was saved by itself
            return table
        if split not in table:
            raise ValueError(f"{source}: expected split {split!r}, got {list(table)}")
        return table[split]
    if path.is_dir():
        files = []
        for part in split.split("+"):  # "a+b" is how the Hub names the union of two splits
            # Not at any depth: below a folder of benchmarks lie other data sets with the same split names.
            files += sorted(path.glob(f"{part}*.parquet")) or sorted(path.glob(f"data/{part}*.parquet"))
        if not files:
            found = sorted(p.name for p in path.iterdir())
            raise ValueError(f"{source}: expected {split}*.parquet in the folder, got {found}")
        return datasets.Dataset.from_parquet([str(f) for f in files])
    if path.suffix in (".parquet", ".jsonl", ".json", ".tsv"):
        if not path.exists():
            raise ValueError(f"{source}: no such file")
        # Without keep_default_na=False an option "None" or "NA" would be read as nothing.
        read_tsv = functools.partial(datasets.Dataset.from_csv, sep="\t", keep_default_na=False)
        readers = {".parquet": datasets.Dataset.from_parquet, ".tsv": read_tsv}
        try:
            return readers.get(path.suffix, datasets.Dataset.from_json)(str(path))
        except StopIteration:  # of an empty file
            raise ValueError(f"{source}: no rows") from None
        except datasets.exceptions.DatasetsError as error:  # says what failed in its cause only
            raise ValueError(f"{source}: {error.__cause__ or error}") from None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        return datasets.load_dataset(source, config, split=split, revision=revision)
    raise ValueError(
        f"{source}: expected a Hub id, a .parquet, .jsonl or .tsv file, or a folder; found none of these"
    )


def leave_encoded(table, image_columns: Sequence[str], base: Path, in_base64: bool):
    """The table with every image, or list of images, as the {"bytes", "path"} record that `open_image` takes.

    Args: base: folder that paths written as text start from; in_base64: text is no path but the image itself.
    """
    import datasets

    untyped = []  # columns of plain text or bytes, as JSONL and hand-made parquet have them
    for name in image_columns:
        feature = table.features.get(name)
        # Decoded, every row that is looked at would cost its pixels, though most checks need the header only.
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        elif feature is not None:
            untyped.append(name)

    def as_record(value):
        if value is None or isinstance(value, list):
            return value and [as_record(one) for one in value]
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if isinstance(value, str) and in_base64:
            return {"bytes": base64.b64decode(value), "path": None}
        record = value if isinstance(value, dict) else {"path": value}
        path = record.get("path")
        return {"bytes": record.get("bytes"), "path": path and str(base / path)}

    def as_records(batch):
        return {
            name: [as_record(value) for value in values] if name in untyped else values
            for name, values in batch.items()
        }

    # A transform runs when a row is read. To map over the table would write a copy of it into the cache.
    return table.with_transform(as_records) if untyped else table


def row_to_sample(
    row: dict, columns: dict[str, str], index: int, need_scene: bool, to_train: bool = False
) -> tuple[Sample, float]:
    """-> (sample, by how many pixels its gold boxes were clipped).

    Args: to_train: read the images to their end, and refuse what only the reward minds: evaluation reads a
        letter. Raises: BadRow naming the row and the column.
    """

    def get(key):
        return row.get(columns[key])

    # The number beside the id: ids repeat in real data, and a table is opened by number.
    row_id = f"{get('id')} (#{index})" if get("id") is not None else f"#{index}"

    def bad(reason, key, expected, got):
        return BadRow(reason, f"row {row_id}, column {columns[key]}: expected {expected}, got {got}")

    images = get("images")
    images = images if isinstance(images, list) else [images]
    if not images or any(e is None for e in images):
        raise bad("image", "images", "an image", images or "nothing")
    try:
        size = open_image(images[0]).size
        for encoded in images if to_train else ():
            check_pixels(encoded)
    except OSError as error:
        raise bad("image", "images", "a readable image", error) from None

    question, problem = get("question"), get("problem") or ""
    if not isinstance(question, str) or not question.strip():
        raise bad("question", "question", "a question", repr(question))
    if not isinstance(problem, str):
        raise bad("question", "problem", "a text", repr(problem)[:80])
    if token := CONTROL_TOKEN.search(question) or CONTROL_TOKEN.search(problem):
        raise bad("question", "question", "no control token of a model", token[0])
    question, problem = tidy(question), tidy(problem)
    options, answer = read_answer(question, get("options"), get("answer"), bad)
    texts = [plain(o) for o in options]
    if to_train and texts.count(plain(LETTERED.fullmatch(answer.strip())[2])) > 1:
        raise bad("repeated_answer", "options", f"one option with the text of {answer!r}", options)

    # The prompt states the frame of the boxes. Where it is that of another image file, every box is wrong.
    if stated := SIZE_IN_PROMPT.search(problem):
        if stated[1] and tuple(map(int, stated.groups())) != size:
            raise bad("size", "problem", f"the image's size {size}", f"{stated[0]!r}")
        if not stated[1]:
            problem = SIZE_IN_PROMPT.sub(f"Image size: ({size[0]} x {size[1]})", problem)

    ground_truth, overhang = answer, 0.0
    if need_scene:
        ground_truth, n_objects, overhang = gold_scene(get("scene_answer"), answer, size, bad)
        if to_train and not n_objects:
            raise bad("empty_scene", "scene_answer", "a gold scene with objects", "none")
    sample = Sample(
        id=str(row_id if get("id") is None else get("id")),
        encoded_images=tuple(images),
        size=size,
        question=question,
        options=options,
        answer=answer,
        ground_truth=ground_truth,
        problem=problem,
        category=get("category") or "",
        level=get("level") or "",
        completion=get("completion") or "",
    )
    return sample, overhang


def tidy(text: str) -> str:
    """A prompt in which a line for each option has single blanks only, as whoever copies it will write it."""
    return OPTION_LINE.sub(lambda line: f"{line[1]} {' '.join(line[2].split())}", text)


def plain(text: str) -> str:
    """As texts of options are compared: without case, runs of blanks and a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


def read_answer(question: str, options, answer, bad: Callable) -> tuple[tuple[str, ...], str]:
    """(options, gold answer), the latter as a reply is rewarded that copies the option from the question."""
    # As many as there are letters for the reader of answers, which sees every sample during training.
    if not isinstance(options, list) or not 2 <= len(options) <= 10 or any(o is None for o in options):
        raise bad("options", "options", "a list of 2 to 10 options", repr(options))
    options = tuple(map(str, options))
    if not all(map(plain, options)):
        raise bad("options", "options", "a list of 2 to 10 options with text", options)
    by_letter = dict(zip("ABCDEFGHIJ", options, strict=False))
    found = LETTERED.fullmatch(answer.strip()) if isinstance(answer, str) else None
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


def gold_scene(text, answer: str, size: tuple[int, int], bad: Callable) -> tuple[str, int, float]:
    """(the gold text with boxes inside the image, number of objects, the most that was clipped in pixels).

    A box that shows in the image is clipped to it: annotation tools round, those of Visual Genome end a pixel
    or two outside. One that does not show could not be earned: in a reply such a box is malformed.
    """
    try:
        scene, scene_answer = parse_ground_truth(text)
    except ValueError as error:
        raise bad("scene", "scene_answer", "a gold scene and answer", error) from None
    gold, found = LETTERED.fullmatch(answer.strip()), LETTERED.fullmatch(scene_answer)
    if not found or (found[1].upper(), plain(found[2])) != (gold[1].upper(), plain(gold[2])):
        raise bad("answer", "scene_answer", f"the answer {answer!r}", repr(scene_answer))
    overhang, (w, h) = 0.0, size
    for o in scene["objects"]:
        x1, y1, x2, y2 = o["bbox"]
        if x1 >= w or y1 >= h or x2 <= 0 or y2 <= 0:
            frame = f"boxes that show in the image {size}"
            raise bad("box_outside", "scene_answer", frame, f"{o['id']} {o['bbox']}")
        overhang = max(overhang, -x1, -y1, x2 - w, y2 - h)
        o["bbox"] = [max(x1, 0), max(y1, 0), min(x2, w), min(y2, h)]
    # Else the row's own text: written anew, it might not be the annotator's to the last digit.
    if overhang or scene_answer.strip().lower() != answer.strip().lower():
        text = f"<scene>{json.dumps(scene)}</scene>\n<answer>{answer.strip()}</answer>"
    return text, len(scene["objects"]), overhang


# ---- prompts -----------------------------------------------------------------------------------------------
def build_prompt_text(template: str, question: str, size: tuple[int, int], box_frame: str = "pixel") -> str:
    """The user's words: instructions, the boxes' frame where they are asked for, the question.

    The frame is the image's size (W x H), or with box_frame "per_mille" the sentence PER_MILLE.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {[*TEMPLATES, 'problem']}, got {template!r}")
    frame = f"Image size: ({size[0]} x {size[1]})" if box_frame == "pixel" else PER_MILLE
    return "\n\n".join([TEMPLATES[template], *([frame] if template in SHOWS_SIZE else []), question])


def build_prompt(sample: Sample, template: str, box_frame: str = "pixel") -> list[dict]:
    """Chat messages for a sample: its images in order, then the text. Template "problem": the row's own."""
    if template != "problem":
        text = build_prompt_text(template, sample.question, sample.size, box_frame)
    else:
        text = sample.problem + (f"\n\n{PER_MILLE}" if sample.problem and box_frame == "per_mille" else "")
    text = text.replace("<image>", "").lstrip()  # the data set marks the image's place, which is the first
    if not text:
        raise ValueError(f"row {sample.id}: template 'problem' needs the column {COLUMNS['problem']}")
    images = [{"type": "image"} for _ in sample.encoded_images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def smart_size(
    width: int, height: int, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """(W, H), multiples of `factor` with W * H in [min_pixels, max_pixels]: what a Qwen-VL sees."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    h, w = smart_resize(height, width, factor, min_pixels, max_pixels)
    return w, h


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
        return len(self.processor.tokenizer(self.text(sample))["input_ids"]) + sum(cells) - len(cells)


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
