"""The benchmarks of the paper as a table: where they lie, how rows become items, how they are scored.

    DATASETS["cv-bench"].sources[0].hub
    load_items("cv-bench", Selection(limit=100)).items[0]      # a data.Sample

Each has plain accuracy, which the paper reports, and where there is one its official score beside it. Columns
are those of the data sets' cards and of the code of lmms-eval and of the paper's evaluator; those of the
mirrors under hunarbatra/ are known from the latter alone. No row of the Hub has been seen: what is found is
checked, and how an answer is graded (letter, yes or no, number, word, point, sequence) follows from the row.
To add a benchmark, add its line to DATASETS.
"""

import ast
import csv
import functools
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tqdm import tqdm

from answers import LETTERS, parse_polygon, read_number
from data import COLUMNS, FIT, MARK, UNFIT, Sample, other_columns, row_to_sample, with_hint
from images import check_pixels, open_image, read_bytes
from results import (
    cv_bench,
    cv_bench_2d,
    hallusionbench,
    mmstar,
    mmvp_pairs,
    robospatial,
    short_hash,
    spatialbench,
    summarise_run,
    three_d_sr,
)
from tables import read_table


# ---- the benchmarks ----
@dataclass(frozen=True)
class Source:
    """Where a benchmark lies and what its columns are called."""

    hub: str
    split: str
    question: str = "prompt"
    answer: str = "answer"
    choices: str | tuple[str, ...] | None = None  # column of a list, columns, or None: in the question
    images: tuple[str, ...] = ("image",)
    task: str | None = None
    meta: tuple[str, ...] = ()  # columns that the official score groups by
    extra: tuple[str, ...] = ()  # the same, of columns that only some of its files have
    config: str | None = None
    keep: tuple[str, str] | None = None  # (column, value) of the rows that belong to it
    gold: tuple[tuple[str, str], ...] = ()  # written answer -> answer
    frame: str = "unit"  # of points: unit, per_mille or pixel
    rows: int = 0  # where they are not as many as the benchmark's

    @property
    def columns(self) -> tuple[str, ...]:
        """All that must be there. Further images may be missing; so may a column of choices, if the question
        holds the options."""
        return (
            *self.images[:1],
            self.question,
            self.answer,
            *filter(None, (self.task,)),
            *self.meta,
            *(self.keep or ())[:1],
        )


@dataclass(frozen=True)
class Benchmark:
    sources: tuple[Source, ...]  # the first that can be had is read
    rows: int  # 0: not known
    official: Callable[[Sequence[dict]], dict] | None = None  # None: plain accuracy
    scored_by: str = "accuracy"  # the official score, in words
    tables: tuple[str, ...] = ()  # meta columns that get a table of their own
    pair: str = ""  # rows 2k and 2k + 1 belong together: "question" if they ask the same, else "place"
    released: bool = True  # whether the paper's evaluator reads letters as `answers.released_letter` does
    ending: str = ""  # what the paper's evaluator writes behind its questions
    known_wrong: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # row: (right letter, its text)
    shares: str = ""  # another benchmark with the same questions, which `all` takes instead
    note: str = ""


CV = Source("nyu-visionx/CV-Bench", "test", choices="choices", task="task", meta=("type", "source"))
STVQA = Source(
    "OX-PIXL/STVQA-7K",
    "val",
    question=COLUMNS["question"],
    answer=COLUMNS["answer"],
    choices=COLUMNS["options"],
    images=(COLUMNS["images"],),
    task=COLUMNS["category"],
)
MMVP = Source("hunarbatra/MMVP", "train", question="text", answer="label")
# Columns of Questions.csv of MMVP/MMVP too, whose rows on the Hub are images and nothing else.
MMVP_CSV = Source(
    "lmms-lab-eval/MMVP", "train", question="Question", answer="Correct Answer", choices="Options"
)
MMVP_WRONG = {98: ("B", "short"), 99: ("A", "long"), 278: ("B", "sitting"), 279: ("A", "standing")}
SR = Source("hunarbatra/3DSRBench", "test", choices="choices", task="task")
# Columns of upstream's .tsv files too, whose rows on the Hub have no images; the circular one has a qid.
SR_TSV = Source(
    "oscarqjh/3DSRBench_lmmseval",
    "test",
    question="question",
    task="category",
    choices=("A", "B", "C", "D"),
    extra=("qid",),
    config="3dsr",
)
ROBO = Source(
    "hunarbatra/RoboSpatial-Home",
    "train",
    choices="options",
    task="category",
    images=("image", "depth_image"),
)
ROBO_HOME = Source(
    "chanhee-luke/RoboSpatial-Home",
    "compatibility+configuration+context",
    question="question",
    task="category",
    images=("img", "depth_image"),
    rows=350,
)
IN_TAGS = " Please give the final answer within answer tags."


def blink(config: str, rows: int) -> Benchmark:
    images = ("image_1", "image_2", "image_3", "image_4")
    source = Source("BLINK-Benchmark/BLINK", "val", choices="choices", images=images, config=config)
    return Benchmark((source,), rows)


DATASETS = {
    "cv-bench": Benchmark((CV,), 2638, cv_bench, "means over sources", ("type", "source")),
    "cv-bench-2D": Benchmark((replace(CV, keep=("type", "2D")),), 1438,
                             cv_bench_2d, "mean over sources",
                             ("source",), shares="cv-bench"),
    "cv-bench-3D": Benchmark((replace(CV, keep=("type", "3D")),), 1200, shares="cv-bench"),
    "blink-spatial": blink("Spatial_Relation", 143),
    "blink-depth": blink("Relative_Depth", 124),
    "blink-object": blink("Object_Localization", 122),
    "blink-counting": blink("Counting", 120),
    "blink-multi-view": blink("Multi-view_Reasoning", 133),
    "blink-jigsaw": blink("Jigsaw", 150),
    "realworld_qa": Benchmark((Source("visheratin/realworldqa", "test", question="question"),
                               Source("xai-org/RealworldQA", "test", question="question")), 765,
                              released=False),
    "spatialbench": Benchmark((Source("hunarbatra/SpatialBench", "train", question="text", task="category",
                                      meta=("question_id",)),), 174, spatialbench, "pairs, counting error",
                              released=False, ending=IN_TAGS),
    "mmvp": Benchmark((MMVP, MMVP_CSV), 300, mmvp_pairs, "pairs", pair="question", released=False,
                      ending=IN_TAGS, known_wrong=MMVP_WRONG, note="2 pairs have known wrong labels"),
    "3dsrbench": Benchmark((SR, SR_TSV), 2625, three_d_sr, "circular and flip (upstream file)"),
    "3dsrbench_full": Benchmark((replace(SR, hub="hunarbatra/3DSRBench-Full"),), 0, mmvp_pairs, "pairs",
                                pair="place", shares="3dsrbench", note="each image, and mirrored"),
    "lego": Benchmark((Source("hunarbatra/LEGO-Puzzles", "train", choices="choices", task="category"),), 1000,
                      note="and 100 of sort, graded as exact sequences"),
    "spatialreasoner": Benchmark((Source("hunarbatra/SpatialReasonerEval", "train", choices="choices",
                                         task="task"),), 1200, note="likely the questions of cv-bench-3D"),
    "robospatial": Benchmark((ROBO, ROBO_HOME), 228, robospatial, "yes/no, points",
                             note="colour and depth image"),
    "robospatial_rgb": Benchmark((replace(ROBO, images=("image",)), replace(ROBO_HOME, images=("img",))), 228,
                                 robospatial, "yes/no, points", note="robospatial without the depth image"),
    "robospatial_home": Benchmark((replace(ROBO_HOME, images=("img",)),), 350, robospatial, "yes/no, points",
                                  shares="robospatial_rgb", note="and 122 of points"),
    "stvqa": Benchmark((STVQA, replace(STVQA, hub="hunarbatra/STVQA-7K")), 692, tables=("level",)),
    "hallusionbench": Benchmark((Source(
        "lmms-lab/HallusionBench", "image", question="question", answer="gt_answer", task="subcategory",
        meta=("category", "subcategory", "set_id", "figure_id", "question_id"),
        gold=(("0", "no"), ("1", "yes"))),), 951, hallusionbench, "mean of aAcc, qAcc, fAcc",
        ("category",), ending="\nOptions:\n(A) Yes \n(B) No"),
    "vstarbench": Benchmark((Source("lmms-lab/vstar-bench", "test", question="text", answer="label",
                                    task="category"),), 191),
    "mmstar": Benchmark((Source("Lin-Chen/MMStar", "val", question="question", task="category",
                                meta=("l2_category",)),), 1500, mmstar, "mean over l2 categories",
                        ("l2_category",)),
}  # fmt: skip

OWN_FILE = Benchmark((STVQA,), 0, tables=("level",))  # a file with STVQA-7K's columns

# Accuracy in % that the paper reports (arXiv 2511.07403): greedy, zero-shot, at most 2,048 new tokens.
PAPER_COLUMNS = (
    "3dsrbench cv-bench-2D cv-bench-3D cv-bench blink-spatial blink-depth mmvp spatialreasoner "
    "spatialbench stvqa mmstar vstarbench realworld_qa robospatial hallusionbench"
).split()
PAPER = {model: dict(zip(PAPER_COLUMNS, map(float, figures.split()), strict=True)) for model, figures in {
    "gpt-4o": "44.3 75.8 83.0 79.4 82.5 78.2 70.7 85.8 67.0 77.0 64.7 66.0 75.4 68.4 55.0",
    "qwen2.5-vl-3b-instruct": "44.0 59.9 60.2 60.0 66.4 54.0 67.0 68.0 49.9 74.3 55.9 74.9 58.2 58.7 46.3",
    "spatialthinker-3b": "52.9 71.0 76.3 73.6 81.8 66.9 69.0 76.5 61.5 92.5 57.6 78.0 66.3 70.6 62.5",
    "qwen2.5-vl-7b-instruct": "48.4 69.1 68.0 68.6 84.0 52.4 72.3 70.6 62.5 77.5 63.9 75.9 68.4 70.6 52.9",
    "spatialthinker-7b": "56.4 77.7 78.7 78.2 86.0 72.6 78.0 82.7 66.4 92.8 65.9 81.7 69.2 76.3 66.4",
}.items()}  # fmt: skip


MODELS = {  # shorter names of the paper's models, for --model_path
    "spatialthinker-3b": "OX-PIXL/SpatialThinker-3B",
    "spatialthinker-7b": "OX-PIXL/SpatialThinker-7B",
    "spatialthinker-30b": "hunarbatra/SpatialThinker-30B",  # on Qwen3-VL-30B-A3B; not in the paper
}


def paper_figure(model_path: str, dataset: str) -> float | None:
    """What the paper reports for a model, by the last part of its name: a share, or None."""
    name = model_path.rstrip("/").rpartition("/")[2].lower()
    name = "gpt-4o" if name.startswith("gpt-4o-20") else name
    percent = PAPER.get(name, {}).get(dataset)
    return None if percent is None else percent / 100


def summarise_results(header: dict, records: list[dict]) -> dict:
    """The summary of a results file, with the official score and the paper's figure of its benchmark."""
    name, model = header["config"]["dataset"], header["config"]["model_path"]
    return summarise_run(header, records, DATASETS.get(name), paper_figure(model, name))


# ---- the prompts of the paper's evaluator, to the letter ----
# The names in braces were never filled in: this is what the models were shown. W and H are those of the first
# image, Q is the question.
RELEASED = {
    "released": (
        "You FIRST observe the image in <observe> </observe> tags, then visualise the relevant scene graph "
        "in <scene> </scene> tags, followed by thinking about the reasoning process as an internal monologue "
        "within <think> </think> tags and then provide the final answer. The final answer MUST BE put within "
        "<answer> </answer> tags, and only return the final choice including the correct option and answer "
        "within the answer tags, e.g., <answer> ({correct_option}) {correct_answer} </answer>.\n\n"
        "Image size: {Width} x {Height}\n(%W x %H)\n\nNow answer the following question:\n%Q"
    ),
    "released_reasoning": (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final "
        "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST "
        "BE put within <answer> </answer> tags, and only return the final choice including the correct "
        "option and answer within the answer tags, e.g., <answer> ({correct_option}) {correct_answer} "
        "</answer>.\n"
        "Question: %Q"
    ),
}
_ONLY_LETTER = "Please answer directly with only the letter of the correct option and nothing else."


def released_prompt(template: str, question: str, size: tuple[int, int]) -> str:
    """What the paper's evaluator asks, with "released" less the sentence that asks for a letter alone."""
    if template == "released":
        question = question.replace(_ONLY_LETTER, "")
    filled = {"%W": str(size[0]), "%H": str(size[1]), "%Q": question}
    return re.sub("%[WHQ]", lambda gap: filled[gap[0]], RELEASED[template])


# ---- rows -> items ----
_MARK = re.compile(  # (A) left  A) left  A: left  A. left, and at the head of a line A.left and B left
    r"(?<!\w)(?:(?P<round>\()(?P<a>[A-Ja-j])\)|(?P<b>[A-Ja-j])(?:[):]|\.(?=\s)|(?<=\n.)\.))\s*"
    r"|(?<=\n)(?P<c>[B-J]) (?=\S)"
)
_DIRECT = re.compile(r"(?:\n|(?<=[.?!)]) )(?:please )?answer (?:directly )?with [^\n?]*$", re.I)


def find_options(text: str) -> list[tuple[int, int]]:
    r"""Where the texts of the last lettered options in a question stand: [(start, end)], or [].

    >>> text = "Which? (A) a cup (B) a plate"
    >>> [text[start:end] for start, end in find_options(text)]
    ['a cup', 'a plate']
    """
    # The last chain A, B, C ... wins, since a question may speak of points "A." and "B." before it lists its
    # options. All marks of a chain are of one dress: in "(A) B: near (B) C: far" the "B:" is text. Only
    # the last 100 marks are looked at, so that a long question costs no more than that squared.
    marks = [
        (m.start(), m.end(), (m["a"] or m["b"] or m["c"]).upper(), bool(m["round"]))
        for m in _MARK.finditer(text)
    ][-100:]
    for first in reversed(range(len(marks))):
        if marks[first][2] != "A":
            continue
        chain = [marks[first]]
        for mark in marks[first + 1 :]:
            if mark[2] == LETTERS[len(chain)] and mark[3] == chain[0][3]:
                chain.append(mark)
            if len(chain) == len(LETTERS):
                break
        if len(chain) > 1:
            line_end = text.find("\n", chain[-1][1])
            ends = [mark[0] for mark in chain[1:]] + [len(text) if line_end < 0 else line_end]
            spans = [(mark[1], end) for mark, end in zip(chain, ends, strict=True)]
            return [(start, start + len(text[start:end].rstrip(" ,;\n"))) for start, end in spans]
    return []


def gold_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of a gold answer written as B, (b), B. or (B) text, or as the text of one option."""
    # "B is closer" may be the text of option A: a letter counts only alone or with the very text of its
    # option behind it; else the whole has to be the text of exactly one option.
    answer, letters = answer.strip(), LETTERS[: len(options)]
    same = [letter for letter, o in zip(letters, options, strict=True) if same_texts([o], [answer])]
    found = re.fullmatch(r"\(?([A-Ja-j])(?:[).:]|\)[.:])?(?:\s+(.+))?", answer, re.S)
    if found and found[1].upper() in letters:
        if not found[2] or same_texts([found[2]], [options[letters.index(found[1].upper())]]):
            return found[1].upper()
    return same[0] if len(same) == 1 else None


def same_texts(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether options are the same but for case, blanks and full stops."""
    return [" ".join(o.lower().split()).rstrip(".") for o in a] == [
        " ".join(o.lower().split()).rstrip(".") for o in b
    ]


def kind_of(answer: str, shown: bool = False) -> str:
    """How an answer that is no option is graded, from the gold; shown: whether the question has options."""
    if answer.lower().rstrip(".") in ("yes", "no"):
        return "yes_no"
    if re.match(r"\[\s*[(\[]", answer):
        return "point"
    if shown and re.fullmatch(r"[A-H]{2,8}", answer) and len(set(answer)) == len(answer):
        return "sequence"
    # One word, as "three cups" may be read as 3 but asks for the cups as well.
    return "number" if len(answer.split()) == 1 and read_number(answer)[0] is not None else "word"


class NoAnswer(ValueError):
    """A row that nobody can answer and every run leaves out: its gold, or all options but one, are "nan"."""


def benchmark_sample(
    row: dict,
    index: int,
    source: Source,
    template: str = "",
    ending: str = "",
    right: Mapping[int, tuple[str, str]] = MappingProxyType({}),
) -> Sample:
    """A benchmark's row as a Sample.

    Args: template: "", or one of RELEASED, whose prompt becomes the sample's `problem`, with the `ending` of
        its benchmark; right: {row: (letter, a word of its option)}, gold to put in the place of the row's.
    Raises: ValueError naming the row and the column; NoAnswer.
    """

    def bad(column, expected, got, kind=ValueError):
        return kind(f"row #{index}, column {column}: expected {expected}, got {str(got)[:200]!r}")

    images = [row.get(column) for column in source.images]
    images = [e for image in images for e in (image if isinstance(image, list) else [image]) if e is not None]
    if not images:
        raise bad(source.images[0], "an image", None)
    question, answer = read_question(row, source, bad)
    asked = row[source.question].replace(MARK, "") if template else ""
    options_of_release = ending if template and find_options(ending) else ""
    shown, options = show_options(
        question + options_of_release, answer, read_options(row, source, bad), source, bad
    )
    asked += shown[len(question) :] if template else ""
    if index in right:
        answer, word = right[index]
        if word not in dict(zip(LETTERS, options, strict=False)).get(answer, "").lower():
            raise bad(source.question, f"{word!r} in option {answer}, to correct the label", options)
    question, asked, answer, options, gone = leave_out_nan(shown, asked, answer, options, source, bad)
    kind, answer, meta = settle_gold(question, answer, options, source, bad)
    question = with_hint(question, kind)
    try:
        size = open_image(images[0]).size
    except OSError as error:
        raise bad(source.images[0], "a readable image", error) from None
    if ending and not options_of_release:
        asked += "." * (not asked.endswith(".")) + ending
    return Sample(
        str(index),
        tuple(images),
        size,
        question,
        tuple(options) if kind == "choice" else (),
        answer,
        answer,
        problem=released_prompt(template, asked, size) if template else "",
        category=label(row[source.task]) if source.task else "",
        kind=kind,
        meta={key: label(row[key]) for key in (*source.meta, *source.extra) if key in row} | meta | gone,
    )


def label(value) -> str:
    """A category or another value to group by, whatever the file has there."""
    return "" if value is None else str(value)


def is_nan(text) -> bool:
    return str(text).strip().lower() == "nan"


def leave_out_nan(
    question: str, asked: str, answer: str, options: list[str], source: Source, bad: Callable
) -> tuple[str, str, str, list[str], dict]:
    """(question, question of the release, gold, options, {"nan_options": letters} if any), all without
    options that are "nan", as pandas writes what was empty. The others move up, and the gold with them."""
    letter = gold_letter(answer, options) if options else None
    kept = [i for i, o in enumerate(options) if not is_nan(o)]
    if is_nan(answer) or (letter and LETTERS.index(letter) not in kept):
        raise bad(source.answer, "an answer", "nan", NoAnswer)
    if len(kept) == len(options):
        return question, asked, answer, options, {}
    if len(kept) < 2:
        raise bad(source.answer, "two options", options, NoAnswer)
    texts = [options[i] for i in kept]
    gone = "".join(x for i, x in enumerate(LETTERS[: len(options)]) if i not in kept)
    answer = f"({LETTERS[kept.index(LETTERS.index(letter))]})" if letter else answer
    question, asked = (fewer_options(text, texts, len(options)) for text in (question, asked))
    return question, asked, answer, texts, {"nan_options": gone}


def fewer_options(text: str, options: list[str], n: int) -> str:
    """A question that shows n options, with the first letters in front of those left, and no others."""
    spans = find_options(text)
    if len(spans) != n:
        return text
    text = text[: spans[len(options) - 1][1]] + text[spans[-1][1] :]
    for (start, end), option in reversed(list(zip(spans, options, strict=False))):
        text = text[:start] + option + text[end:]
    return text


def read_question(row: dict, source: Source, bad: Callable) -> tuple[str, str]:
    """(question without its closing instruction, gold answer as written) of a row."""
    question, answer = row[source.question], str(row[source.answer]).strip()
    if not isinstance(question, str) or not question.strip():
        raise bad(source.question, "a question", question)
    if not answer or row[source.answer] is None:
        raise bad(source.answer, "an answer", row[source.answer])
    if source.gold:
        if answer not in dict(source.gold):
            raise bad(source.answer, f"one of {[written for written, _ in source.gold]}", answer)
        answer = dict(source.gold)[answer]
    question = question.replace(MARK, "").strip()  # the paper's evaluator shows images first
    # "Please answer directly with the letter and nothing else." would contradict a template that asks for
    # thoughts and tags: how to answer is the template's to say.
    return _DIRECT.sub("", question).strip(), answer


def show_options(
    question: str, answer: str, options: list[str], source: Source, bad: Callable
) -> tuple[str, list[str]]:
    """(question with its options and their letters, the options), whichever of the two the row has them in.

    Options come from a column, from the question, or from both, and then have to be the same: a letter that
    is graded by another list than the one shown is the worst of errors, since every score looks plausible.
    """
    if len(options) == 1 and find_options(options[0]):  # "(a) Open (b) Closed": one text with all of them
        question, options = f"{question}\n{options[0]}", []
    shown = [question[start:end] for start, end in find_options(question)]
    # Options yes and no without letters, and gold yes or no: a yes/no question, which needs no letters.
    plain = {o.strip().lower() for o in options} == {"yes", "no"} and answer.lower() in ("yes", "no")
    if options and not shown and not plain:
        question += "\n" + "\n".join(f"({letter}) {o}" for letter, o in zip(LETTERS, options, strict=False))
    elif options and shown and not same_texts(options, shown):
        raise bad(source.question, f"the options {options}", shown)
    options = [] if plain and not shown else options or shown
    if len(options) == 1 or len(options) > len(LETTERS):
        raise bad(source.choices, f"2 to {len(LETTERS)} options", options)
    return question, options


def settle_gold(
    question: str, answer: str, options: list[str], source: Source, bad: Callable
) -> tuple[str, str, dict]:
    """(kind, gold answer as a Sample has it, what grading has to know beside it).

    In this order: an option named by letter or text makes a choice; whatever else is among options must be
    an order of their letters; without options the answer itself says what it is. A lone letter without
    options is refused, as its question lost them on the way: graded as a word it would never be right.
    """
    if options and (letter := gold_letter(answer, options)):
        return "choice", f"({letter}) {options[LETTERS.index(letter)]}", {}
    kind = kind_of(answer, shown=bool(options))
    if options and not (kind == "sequence" and max(answer) <= LETTERS[len(options) - 1]):
        raise bad(source.answer, f"one of the {len(options)} options", answer)
    if kind == "word" and re.fullmatch(r"\(?[A-Ja-j][).:]*", answer):
        raise bad(source.question, f"lettered options, since the answer is {answer!r}", question)
    if kind == "point":
        try:
            parse_polygon(answer)
        except ValueError as error:
            raise bad(source.answer, "a polygon", error) from None
        return kind, answer, {"frame": source.frame}
    if kind == "number":
        return kind, str(read_number(answer)[0]), {}
    return kind, answer.rstrip(".") if kind == "yes_no" else answer, {}


def read_options(row: dict, source: Source, bad: Callable) -> list[str]:
    """The options of a row, from a list, a list written as text, several columns, or nowhere; "nan" where
    one of several is missing."""
    if isinstance(source.choices, tuple):
        options = [label(row.get(column)).strip() for column in source.choices]
        while options and not options[-1]:
            options.pop()
        return [o or "nan" for o in options]  # one between others has a letter, which theirs must not take
    options = row.get(source.choices) if source.choices else None
    if isinstance(options, str) and options.strip().startswith("["):
        try:
            commas = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", options.strip())  # numpy: "['lamp' 'chair']"
            bare = re.sub(r"(?<=[\[,])\s*nan\s*(?=[,\]])", "None", commas)  # numpy: "['lamp', nan]"
            options = ast.literal_eval(bare)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise bad(source.choices, "a list", options) from None
    options = [options] if isinstance(options, str) and options.strip() else options or []
    if not isinstance(options, list | tuple):
        raise bad(source.choices, "a list", options)
    options = ["nan" if o is None else str(o).strip() for o in options]
    # "(A) lamp" -> "lamp"; not where this would make two of them equal: then the letter is part of the text.
    bare = [re.sub(r"^\(([A-J])\)\s+", "", o).strip() for o in options]
    alike = len(set(bare)) < len(bare) - max(0, sum(map(is_nan, bare)) - 1)
    return options if alike else bare


def stvqa_sample(row: dict, index: int, need_scene: bool, template: str = "") -> Sample:
    named = {key: label(row.get(COLUMNS[key])) for key in ("category", "level")}
    sample = row_to_sample(
        row | {COLUMNS[key]: text for key, text in named.items()}, COLUMNS, index, need_scene
    )[0]
    if template:
        asked = row[COLUMNS["question"]].replace(MARK, "")  # it shows images first
        sample = replace(sample, problem=released_prompt(template, asked, sample.size))
    return replace(sample, id=str(index), meta=sample.meta | {"level": sample.level, "item": sample.id})


def permuted(sample: Sample, order: Sequence[int]) -> Sample:
    """The same question with its options in another order: option order[0] becomes (A), and so on."""
    spans = find_options(sample.question)
    shown = [sample.question[start:end] for start, end in spans]
    if not same_texts(shown, sample.options):
        raise ValueError(
            f"row {sample.id}: options that the question does not show cannot be reordered: "
            f"expected {list(sample.options)}, got {shown}"
        )
    question = sample.question
    # Texts change places, letters and all else stay; from the end, so that the spans before still hold.
    for (start, end), i in reversed(list(zip(spans, order, strict=True))):
        question = question[:start] + shown[i] + question[end:]
    options = tuple(sample.options[i] for i in order)
    gold = order.index(LETTERS.index(sample.answer.strip()[1].upper()))
    answer = f"({LETTERS[gold]}) {options[gold]}"
    block = f"<answer>{answer}</answer>"
    scene = re.sub("<answer>.*?</answer>", lambda _: block, sample.ground_truth, flags=re.S)
    return replace(
        sample,
        question=question,
        options=options,
        answer=answer,
        ground_truth=scene if "<scene>" in scene else answer,
    )


# ---- items ----
@dataclass(frozen=True)
class Selection:
    """What is asked of a benchmark: which rows, and how they are changed."""

    local_path: str | None = None  # file or folder (with NAME.parquet) to read instead of the Hub
    revision: str | None = None  # of the Hub's data
    skip_bad_rows: bool = False
    limit: int | None = None  # that many rows, drawn by category
    seed: int = 0  # of the drawing and of shuffled options
    circular: bool = False  # all rotations of the options
    shuffle_options: bool = False
    blind: bool = False  # without the image
    correct_labels: bool = False  # where the benchmark's are known to be wrong
    template: str = ""  # of the prompt; those of RELEASED change the question

    @classmethod
    def of(cls, config: Mapping) -> "Selection":
        """Of flags or of a results header's config, which hold other keys as well; older ones lack some."""
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


@dataclass(frozen=True)
class Loaded:
    """A benchmark, read and checked."""

    items: "Items"
    rows: int  # before --limit
    fingerprint: str  # of all that is asked
    clusters: dict[int, str]  # row -> what it shares with rows that are not independent of it: image or pair
    questions: dict[int, str]  # row -> hash of first image, question and answer
    skipped: int  # bad rows left out


class Items(Sequence):
    """The items of a benchmark, read one at a time: a row, with --circular in a rotation of its options."""

    def __init__(
        self, table, convert: Callable[[dict, int], Sample], keys: list[tuple[int, int]], selection: Selection
    ):
        self.table, self.convert, self.selection = table, convert, selection
        self.keys = keys  # (row, turn) of every item
        self.turns = Counter(row for row, _ in keys)  # of every row

    def __len__(self):
        return len(self.keys)

    def id_of(self, i: int) -> str:
        row, turn = self.keys[i]
        return f"{row}@{turn}" if self.selection.circular else f"{row}"

    def __getitem__(self, i):
        return replace(self.shown(i), encoded_images=()) if self.selection.blind else self.shown(i)

    def shown(self, i: int) -> Sample:
        """The item with its images, also where --blind hides them from the model."""
        row, turn = self.keys[i]
        sample = self.convert(self.table[row], row)
        n = len(sample.options)
        if sample.kind == "choice" and self.selection.shuffle_options:
            order = random.Random(f"{self.selection.seed} {row}").sample(range(n), n)
            sample = permuted(sample, order)
        if turn:
            sample = permuted(sample, [(j + turn) % n for j in range(n)])
        return replace(sample, id=self.id_of(i))


def load_items(name: str, selection: Selection) -> Loaded:
    """Read every row once, before a model is loaded. Raises: ValueError with what was expected and found."""
    benchmark = DATASETS.get(name, OWN_FILE)
    table, source = open_table(name, benchmark, selection)
    rows = list(range(len(table)))
    if source.keep:
        rows = [i for i, value in enumerate(table.column(source.keep[0])) if str(value) == source.keep[1]]
    template = selection.template if selection.template in RELEASED else ""
    if source.answer == STVQA.answer:
        scenes = COLUMNS["scene_answer"] in table.column_names
        convert = functools.partial(stvqa_sample, need_scene=scenes, template=template)
    else:
        right = benchmark.known_wrong if selection.correct_labels else {}
        ending = benchmark.ending if template else ""
        convert = functools.partial(
            benchmark_sample, source=source, template=template, ending=ending, right=right
        )
    checked, fingerprint, skipped = check_rows(name, table, rows, convert, source, selection)
    if not checked:
        raise ValueError(f"{name} ({source.hub}): no rows" + (f" with {source.keep}" if source.keep else ""))
    expected = source.rows or benchmark.rows
    if expected and len(rows) != expected:
        print(f"warning: {name} has {len(rows)} rows here, {expected} were expected")
    clusters = {row: c.images_hash for row, c in checked.items()}
    if benchmark.pair and len(checked) == len(rows):  # a row left out would shift the pairs behind it
        clusters = pair_clusters(name, checked, benchmark.pair == "question") or clusters
    chosen = list(checked)
    if selection.limit and selection.limit < len(rows):
        categories = [c.category for c in checked.values()]
        chosen = [chosen[i] for i in stratified(categories, selection.limit, selection.seed)]
    keys = [(row, turn) for row in chosen for turn in range(checked[row].turns)]
    return Loaded(
        items=Items(table, convert, keys, selection),
        rows=len(rows),
        fingerprint=fingerprint,
        clusters=clusters,
        questions={row: c.question_hash for row, c in checked.items()},
        skipped=skipped,
    )


class CheckedRow(NamedTuple):
    """What is kept of a row that can be asked."""

    question: str  # lower case, runs of blanks as one
    images_hash: str  # of all images
    question_hash: str  # of first image, question and answer
    category: str
    turns: int  # items to make of it


def check_rows(
    name: str, table, rows: Sequence[int], convert: Callable, source: Source, selection: Selection
) -> tuple[dict[int, CheckedRow], str, int]:
    """({row: what is kept of it}, fingerprint of all, bad rows skipped). Raises: ValueError at a bad row.

    Images are read to their end here, as one that is damaged behind its header would fail when it is asked.
    """
    digest, checked, skipped, nan_options = hashlib.sha256(), {}, 0, []
    for row in tqdm(rows, desc=f"checking {name}", disable=None, leave=False):
        try:
            sample = convert(table[row], row)
            texts = sample.question, *sample.options, sample.answer, sample.problem, sample.category
            if token := UNFIT.search(" ".join([*texts, *map(str, sample.meta.values())])):
                raise ValueError(f"row #{row}: expected {FIT}, got {token[0]!r}")
            images = [check_image(row, encoded) for encoded in sample.encoded_images]
            if sample.kind == "choice" and (selection.circular or selection.shuffle_options):
                permuted(sample, range(len(sample.options)))  # raises if it cannot be reordered
        except NoAnswer as error:
            print(f"{name}: left out: {error}")
            continue
        except ValueError as error:
            if not selection.skip_bad_rows:
                raise ValueError(f"{name} ({source.hub}): {error} (--skip_bad_rows leaves it out)") from None
            print(f"{name}: left out: {error}")
            skipped += 1
            continue
        if letters := sample.meta.get("nan_options"):
            nan_options.append(f"#{row} {letters}")
        asked = [row, sample.question, sample.options, sample.ground_truth, sample.problem, images]
        digest.update(json.dumps(asked).encode())
        checked[row] = CheckedRow(
            question=" ".join(sample.question.lower().split()),
            images_hash=short_hash("".join(images) or sample.question),
            question_hash=short_hash("".join(images[:1]) + sample.question + sample.answer),
            category=sample.category,
            turns=len(sample.options) if sample.kind == "choice" and selection.circular else 1,
        )
    if nan_options:
        rest = f" and {len(nan_options) - 20} more" if len(nan_options) > 20 else ""
        print(f"{name}: options that are 'nan' are left out of rows {', '.join(nan_options[:20])}{rest}")
    return checked, digest.hexdigest()[:16], skipped


def check_image(row: int, encoded: dict) -> str:
    """A hash of an image that a model can be shown. Raises: ValueError naming the row."""
    try:
        content = read_bytes(encoded)
        check_pixels(content)
        w, h = open_image({"bytes": content}).size
    except OSError as error:
        raise ValueError(f"row #{row}: expected a readable image, got {error}") from None
    if max(w, h) > 200 * min(w, h):
        raise ValueError(f"row #{row}: expected an image of a ratio up to 200:1, got {w} x {h} pixels")
    return short_hash(content)


def pair_clusters(name: str, checked: dict[int, CheckedRow], same: bool) -> dict[int, str] | None:
    """{row: its pair} of a benchmark of pairs 2k, 2k + 1, or None where they do not ask the `same`."""
    questions = [c.question for c in checked.values()]
    if same and any(a != b for a, b in zip(questions[::2], questions[1::2], strict=False)):
        print(f"warning: rows 2k and 2k + 1 of {name} ask different things: no score of pairs")
        return None
    return {row: f"pair {place // 2}" for place, row in enumerate(checked)}


def open_table(name: str, benchmark: Benchmark, selection: Selection):
    """The rows and the Source that fits their columns: --local_path, or the first source that can be had."""
    local = selection.local_path or (name if name not in DATASETS else None)
    misses = []
    for source in benchmark.sources:
        if local:
            inside = [Path(local, f"{name}.parquet"), Path(local, name), Path(local, source.config or "-")]
            where, config = str(next((p for p in inside if p.exists()), local)), None
        else:
            where, config = source.hub, source.config
        try:
            if Path(where, "Questions.csv").exists():
                table = read_mmvp_folder(Path(where))
            else:
                table = read_table(where, source.split, selection.revision, source.images, config)
        except (
            ValueError,
            OSError,
            RuntimeError,
            csv.Error,
        ) as error:  # not there, no such split, no network
            misses.append(f"{where}: {str(error).removeprefix(f'{where}: ').splitlines()[0][:300]}")
            continue
        if set(source.columns) <= set(table.column_names):
            return table, source
        misses.append(f"{where}: {other_columns(source.columns, table.column_names)}")
    unique = list(dict.fromkeys(misses))
    raise ValueError(
        f"{name} cannot be read"
        + "".join(f"\n  {miss}" for miss in unique)
        + ("" if local else "\n  --local_path reads a file or folder instead of the Hub")
    )


def read_mmvp_folder(folder: Path):
    """MMVP as it is published: Questions.csv, and in "MMVP Images" N.jpg for the row with the index N."""
    import datasets

    table, source = folder / "Questions.csv", MMVP_CSV
    with open(table, newline="", encoding="utf-8-sig") as f:
        rows = list(csv.DictReader(f))
    wanted = (source.question, source.choices, source.answer)
    if not rows or (missing := [c for c in wanted if c not in rows[0]]):
        got = f"missing {missing}, got {list(rows[0])}" if rows else "no rows"
        raise ValueError(f"{table}: expected columns {list(wanted)}, {got}")
    whole = []
    for place, row in enumerate(rows, 1):
        # The column's name is misspelt in some copies; it is the first, and counts from 1.
        if (index := str(next(iter(row.values()))).strip()) != str(place):
            raise ValueError(f"{table}: expected the indices 1, 2, ..., got {index!r} in row {place}")
        image = {"bytes": None, "path": str(folder / "MMVP Images" / f"{place}.jpg")}
        whole.append({c: row[c] for c in wanted} | {"image": image})
    return datasets.Dataset.from_list(whole)


def stratified(categories: Sequence[str], limit: int, seed: int) -> list[int]:
    """Indices in order of `limit` items drawn at random, each category by its share (largest remainder)."""
    groups = defaultdict(list)
    for i, category in enumerate(categories):
        groups[category].append(i)
    share = {c: limit * len(members) / len(categories) for c, members in groups.items()}
    take = {c: int(share[c]) for c in groups}
    for c in sorted(groups, key=lambda c: (take[c] - share[c], c))[: limit - sum(take.values())]:
        take[c] += 1
    rng = random.Random(seed)
    return sorted(i for c in sorted(groups) for i in rng.sample(groups[c], take[c]))
