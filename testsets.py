"""The benchmarks of the paper as a table of data: where they lie, how their rows read, how they are scored.

    DATASETS["cv-bench"].sources[0].hub, benchmark_sample(row, index, source)

Each has plain accuracy, which the paper reports, and where there is one its official score beside it. Columns
of the mirrors under hunarbatra/ are known from the paper's evaluator alone: what is found is checked, and how
an answer is graded (letter, yes or no, number, word, point, sequence) follows from the row.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from data import COLUMNS, Sample, open_image, row_to_sample
from grading import LETTERS, parse_polygon, read_number, tally


# ---- official scores: records of all items, in order -> {name: value}, the headline first ----
def accuracy(records: Sequence[dict]) -> float | None:
    return tally(records)["accuracy"] if records else None


def mean(values: Sequence[float | None]) -> float | None:
    return sum(values) / len(values) if values and None not in values else None


def grouped(records: Sequence[dict], key: Callable[[dict], object]) -> dict:
    """Records by what `key` gives of them, in order."""
    groups = defaultdict(list)
    for r in records:
        groups[key(r)].append(r)
    return groups


def by_meta(records: Sequence[dict], *keys: str) -> dict:
    """Records grouped by the named values of their rows."""
    return grouped(records, lambda r: tuple(r["meta"].get(key) for key in keys))


def all_right(groups) -> float | None:
    """Share of the groups in which every record is right."""
    return mean([float(all(r["correct"] for r in group)) for group in groups])


def cv_bench(records):
    two_d = mean([accuracy([r for r in records if r["meta"]["source"] == s]) for s in ("ADE20K", "COCO")])
    three_d = accuracy([r for r in records if r["meta"]["source"] == "Omni3D"])
    return {"mean of 2D and 3D": mean([two_d, three_d]), "2D": two_d, "3D": three_d}


def mmvp_pairs(records):
    pairs = [pair for pair in grouped(records, lambda r: r["cluster"]).values() if len(pair) == 2]
    return {"pairs": all_right(pairs)} if 2 * len(pairs) == len(records) else {}


def spatialbench(records):
    """Pairs of opposite questions about one image; counting by its mean relative error, at most 1 an item."""
    scores = {}
    for task, group in grouped(records, lambda r: r["category"]).items():
        if task in ("existence", "reach", "size"):
            images = grouped(group, lambda r: r["cluster"])
            pairs = [image[i : i + 2] for image in images.values() for i in range(0, len(image), 2)]
            scores[f"{task} pairs"] = all_right(pairs)
        elif task == "counting":
            counts = [(float(r["gold"]), r["parsed"]) for r in group if r["kind"] == "number"]
            errors = [1.0 if said is None else abs(said - gold) / max(gold, 1) for gold, said in counts]
            scores["counting, 1 - error"] = 1 - mean([min(1.0, x) for x in errors]) if errors else None
        else:
            scores[task] = accuracy(group)
    return {"mean": mean(list(scores.values())), **scores}


def three_d_sr(records):
    """Where the file has them: all rotations of the options, and the mirrored image as well."""
    turns, flips = defaultdict(list), defaultdict(list)
    for r in records:
        if found := re.fullmatch(r"(.+?)(-flip)?(?:-(\d+))?", str(r["meta"].get("qid") or "")):
            turns[found[1], found[2]].append(r)
            flips[found[1]].append(r)
    scores = {"circular and flip": all_right(flips.values()), "circular": all_right(turns.values())}
    return scores if len(flips) < len(records) and turns else {}


def hallusionbench(records):
    shown = [r for r in records if (r["meta"]["category"], str(r["meta"]["figure_id"])) != ("VS", "0")]
    figures = by_meta(shown, "category", "subcategory", "set_id", "figure_id")
    questions = by_meta(records, "category", "subcategory", "set_id", "question_id")
    return {
        "aAcc": accuracy(records),
        "qAcc": all_right(questions.values()),
        "fAcc": all_right(figures.values()),
    }


def mmstar(records):
    groups = by_meta(records, "l2_category").values()
    return {"mean over l2 categories": mean([accuracy(group) for group in groups])}


def robospatial(records):
    kinds = {"yes_no": "yes/no", "point": "points"}
    return {
        name: accuracy(found)
        for kind, name in kinds.items()
        if (found := [r for r in records if r["kind"] == kind])
    }


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
    config: str | None = None
    keep: tuple[str, str] | None = None  # (column, value) of the rows that belong to it
    gold: tuple[tuple[str, str], ...] = ()  # written answer -> answer
    frame: str = "unit"  # of points: unit, per_mille or pixel

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
    rows: int
    official: Callable[[Sequence[dict]], dict] | None = None  # None: plain accuracy
    scored_by: str = "accuracy"  # the official score, in words
    tables: tuple[str, ...] = ()  # meta columns that get a table of their own
    pair: bool = False  # rows 2k and 2k + 1 ask the same about two images
    released: bool = True  # whether the paper's evaluator reads letters as `grading.released_letter` does
    part_of: str = ""  # the benchmark that holds the same questions
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
)


def blink(config: str, rows: int) -> Benchmark:
    images = ("image_1", "image_2", "image_3", "image_4")
    source = Source("BLINK-Benchmark/BLINK", "val", choices="choices", images=images, config=config)
    return Benchmark((source,), rows)


DATASETS = {
    "cv-bench": Benchmark((CV,), 2638, cv_bench, "means over sources", ("type", "source")),
    "cv-bench-2D": Benchmark((replace(CV, keep=("type", "2D")),), 1438,
                             lambda records: {"2D": cv_bench(records)["2D"]}, "mean over sources",
                             ("source",), part_of="cv-bench"),
    "cv-bench-3D": Benchmark((replace(CV, keep=("type", "3D")),), 1200, part_of="cv-bench"),
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
                              released=False),
    "mmvp": Benchmark((MMVP, Source("MMVP/MMVP", "train", question="Question", answer="Correct Answer",
                                    choices="Options")), 300, mmvp_pairs, "pairs", pair=True, released=False),
    "3dsrbench": Benchmark((Source("hunarbatra/3DSRBench", "test", choices="choices", task="task"),
                            Source("ccvl/3DSRBench", "test", question="question", task="category",
                                   choices=("A", "B", "C", "D"), meta=("qid",))),
                           2625, three_d_sr, "circular and flip (upstream file)"),
    "lego": Benchmark((Source("hunarbatra/LEGO-Puzzles", "train", choices="choices", task="category"),), 1000,
                      note="and 100 of sort, graded as exact sequences"),
    "spatialreasoner": Benchmark((Source("hunarbatra/SpatialReasonerEval", "train", choices="choices",
                                         task="task"),), 1200, note="likely the questions of cv-bench-3D"),
    "robospatial": Benchmark((ROBO, ROBO_HOME), 228, robospatial, "yes/no, points",
                             note="colour and depth image"),
    "robospatial_rgb": Benchmark((replace(ROBO, images=("image",)), replace(ROBO_HOME, images=("img",))), 228,
                                 robospatial, "yes/no, points", note="robospatial without the depth image"),
    "stvqa": Benchmark((STVQA,), 692, tables=("level",)),
    "hallusionbench": Benchmark((Source(
        "lmms-lab/HallusionBench", "image", question="question", answer="gt_answer", task="subcategory",
        meta=("category", "subcategory", "set_id", "figure_id", "question_id"),
        gold=(("0", "no"), ("1", "yes"))),), 951, hallusionbench, "aAcc, qAcc, fAcc", ("category",)),
    "vstarbench": Benchmark((Source("lmms-lab/vstar-bench", "test", question="text", answer="label",
                                    task="category"),), 191),
    "mmstar": Benchmark((Source("Lin-Chen/MMStar", "val", question="question", task="category",
                                meta=("l2_category",)),), 1500, mmstar, "mean over l2 categories",
                        ("l2_category",)),
}  # fmt: skip

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


def paper_figure(model_path: str, dataset: str) -> float | None:
    """What the paper reports for a model, by the last part of its name: a share, or None."""
    name = model_path.rstrip("/").rpartition("/")[2].lower()
    name = "gpt-4o" if name.startswith("gpt-4o-20") else name
    percent = PAPER.get(name, {}).get(dataset)
    return None if percent is None else percent / 100


# ---- rows -> items ----
_MARK = re.compile(  # (A) left  A) left  A: left  A. left, and at the head of a line A.left and B left
    r"(?<!\w)(?:(?P<round>\()(?P<a>[A-Ja-j])\)|(?P<b>[A-Ja-j])(?:[):]|\.(?=\s)|(?<=\n.)\.))\s*"
    r"|(?<=\n)(?P<c>[B-J]) (?=\S)"
)
_DIRECT = re.compile(r"(?:\n|(?<=[.?!)]) )(?:please )?answer (?:directly )?with [^\n?]*$", re.I)
_OPEN = "Answer with a single word or number."  # one for both, lest it tell which
_HINTS = {"yes_no": "Answer with yes or no.", "number": _OPEN, "word": _OPEN}


def find_options(text: str) -> list[tuple[int, int]]:
    r"""Where the texts of the last lettered options in a question stand: [(start, end)], or [].

    >>> text = "Which? (A) a cup (B) a plate"
    >>> [text[start:end] for start, end in find_options(text)]
    ['a cup', 'a plate']
    """
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
    return "number" if len(answer.split()) == 1 and read_number(answer)[0] is not None else "word"


def benchmark_sample(row: dict, index: int, source: Source) -> Sample:
    """A benchmark's row as a Sample. Raises: ValueError naming the row and the column."""

    def bad(column, expected, got):
        return ValueError(f"row #{index}, column {column}: expected {expected}, got {str(got)[:200]!r}")

    images = [row.get(column) for column in source.images]
    images = [e for image in images for e in (image if isinstance(image, list) else [image]) if e is not None]
    if not images:
        raise bad(source.images[0], "an image", None)
    question, answer = row[source.question], str(row[source.answer]).strip()
    if not isinstance(question, str) or not question.strip():
        raise bad(source.question, "a question", question)
    if not answer or row[source.answer] is None:
        raise bad(source.answer, "an answer", row[source.answer])
    if source.gold:
        if answer not in dict(source.gold):
            raise bad(source.answer, f"one of {[written for written, _ in source.gold]}", answer)
        answer = dict(source.gold)[answer]
    question = question.replace("<image>", "").strip()
    question = _DIRECT.sub("", question).strip()  # the template says how to answer

    options = read_options(row, source, bad)
    if len(options) == 1 and find_options(options[0]):
        question, options = f"{question}\n{options[0]}", []  # one text with all of them
    shown = [question[start:end] for start, end in find_options(question)]
    plain = {o.strip().lower() for o in options} == {"yes", "no"} and answer.lower() in ("yes", "no")
    if options and not shown and not plain:
        question += "\n" + "\n".join(f"({letter}) {o}" for letter, o in zip(LETTERS, options, strict=False))
    elif options and shown and not same_texts(options, shown):
        raise bad(source.question, f"the options {options}", shown)
    options = [] if plain and not shown else options or shown
    if len(options) == 1 or len(options) > len(LETTERS):
        raise bad(source.choices, f"2 to {len(LETTERS)} options", options)

    kind, meta = "choice", {key: row[key] for key in source.meta}
    if options and (letter := gold_letter(answer, options)):
        answer = f"({letter}) {options[LETTERS.index(letter)]}"
    else:
        kind = kind_of(answer, shown=bool(options))
        if options and not (kind == "sequence" and max(answer) <= LETTERS[len(options) - 1]):
            raise bad(source.answer, f"one of the {len(options)} options", answer)
        if kind == "word" and re.fullmatch(r"\(?[A-Ja-j][).:]*", answer):
            raise bad(source.question, f"lettered options, since the answer is {answer!r}", question)
        options = []
    if kind == "point":
        meta["frame"] = source.frame
        try:
            parse_polygon(answer)
        except ValueError as error:
            raise bad(source.answer, "a polygon", error) from None
    if kind == "number":
        answer = str(read_number(answer)[0])
    if kind == "yes_no":
        answer = answer.rstrip(".")
    hint = _HINTS.get(kind, "")
    question += f"\n{hint}" if hint and not re.search(r"\b(?:answer|respond) with\b", question, re.I) else ""
    try:
        size = open_image(images[0]).size
    except OSError as error:
        raise bad(source.images[0], "a readable image", error) from None
    return Sample(
        str(index),
        tuple(images),
        size,
        question,
        tuple(options),
        answer,
        answer,
        category=str(row[source.task]) if source.task else "",
        kind=kind,
        meta=meta,
    )


def read_options(row: dict, source: Source, bad) -> list[str]:
    """The options of a row, from a list, a list written as text, several columns, or nowhere."""
    if isinstance(source.choices, tuple):
        return [str(row[c]).strip() for c in source.choices if row.get(c) is not None and str(row[c]).strip()]
    options = row.get(source.choices) if source.choices else None
    if isinstance(options, str) and options.strip().startswith("["):
        try:
            commas = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", options.strip())  # numpy writes none
            options = ast.literal_eval(commas)
        except (ValueError, SyntaxError):
            raise bad(source.choices, "a list", options) from None
    options = [options] if isinstance(options, str) and options.strip() else options or []
    bare = [re.sub(r"^\(([A-J])\)\s+", "", str(o)).strip() for o in options]
    return bare if len(set(bare)) == len(bare) else [str(o).strip() for o in options]


def stvqa_sample(row: dict, index: int, need_scene: bool) -> Sample:
    sample = row_to_sample(row, COLUMNS, index, need_scene)[0]
    return replace(sample, id=str(index), meta={"level": sample.level, "item": sample.id})


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
