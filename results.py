"""What a reply is worth and what many are worth together: records, grades, official scores, comparisons.

    grade(sample, reply)          # parsed, correct, and with a gold scene the reward's terms and matches
    summarise(records)            # accuracy with its interval, counts of what went wrong, means of the terms
    compare("A.jsonl", "B.jsonl")

A results file is JSON lines: a header that says what was run, then one Record a reply, appended at once.

What differs from the paper's evaluator: replies that are unreadable, cut off or failed are counted beside the
score, where it reads most of them as option A; official scores stand beside plain accuracy; intervals and
tests are given.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NotRequired, TypedDict

from answers import is_right, normalised, read, released_letter
from config import append, write_whole
from rewards import TERMS, Weights, label_similarity, parse_ground_truth, parse_scene, score_completion


# ---- the record ----
class Grade(TypedDict):
    """What a reply is worth. The keys from `terms` on are there if the sample has a gold scene."""

    parsed: object  # letter, "yes", number, words, letters, (x, y) or a box, as answers.read; None: unread
    method: str  # how it was found (answer_tag, boxed, phrase, letter, text), or why it was not
    correct: bool
    released: NotRequired[bool]  # right as the paper's evaluator reads the reply; choices only
    terms: NotRequired[dict[str, float]]  # reward, format, count, accuracy (called exact in means), spatial
    reason: NotRequired[str | None]  # why the completion was rejected as malformed; None: it was not
    matches: NotRequired[list[list]]  # [predicted index, gold index, IoU, CIoU] a pair; none if malformed
    gold_objects: NotRequired[int]
    mean_iou: NotRequired[float | None]  # over `matches`; None: there are none
    mean_ciou: NotRequired[float | None]  # likewise
    recall50: NotRequired[float | None]  # share of the gold objects matched at IoU >= 0.5; None: no objects
    object_jaccard: NotRequired[float]  # overlap of the predicted and the gold sets of labels; 1: both empty
    triplet_jaccard: NotRequired[float]  # the same of (subject label, predicate, object label)


class Record(Grade):
    """One reply, a line of a results file: all that a new grading needs, all that explains this one."""

    id: str  # the row, with --circular ROW@TURN
    row: int  # of the data
    turns: int  # items made of this row: with --circular as many as it has options, else 1
    category: str
    kind: str  # choice, yes_no, number, word, sequence, point or box
    gold: str  # "(B) text" for a choice
    choices: list[str]  # option texts in the order asked
    size: list[int]  # [W, H] of the first image, pixels
    meta: dict  # what the official score groups by
    ground_truth: NotRequired[str]  # gold scene and answer; only where there is a scene
    box_frame: NotRequired[str]  # of the reply's boxes; absent: pixel
    cluster: str  # what it shares with rows that are not independent of it: hash of its images, or its pair
    question_hash: str  # of first image, question and answer, before any reordering
    prompt_hash: str  # of cluster and prompt, as asked
    reply: str
    finish_reason: str  # stop, length or failed
    n_tokens: int  # generated
    prompt_tokens: int
    latency_s: float
    error: NotRequired[str]  # why it failed; absent otherwise
    read_by: NotRequired[str]  # the model (provider:model) that was shown a reply which the rules left unread
    read: NotRequired[object]  # what it read, as `parsed`; None: no answer
    read_correct: NotRequired[bool]
    read_reply: NotRequired[str]  # what it said
    stop_reason: NotRequired[str]  # a server's own word for the end, where it says more than finish_reason
    note: NotRequired[str]  # what was sent otherwise than asked for: another parameter, coarser images


def short_hash(what: bytes | str) -> str:
    return hashlib.sha256(what.encode() if isinstance(what, str) else what).hexdigest()[:12]


# ---- grading ----
def read_reply(
    sample, reply: str, finish_reason: str = "stop", box_frame: str = "pixel"
) -> tuple[object, str]:
    """(what a reply answers to a sample, method) or (None, why not), as of `answers.read`.

    Args: sample: a data.Sample, or anything with its kind, options, size and meta; finish_reason: of a reply
        cut off ("length") little counts (answers.read), of a failed one nothing; box_frame: of points and
        boxes that the question itself states none for.
    """
    frame = sample.meta.get("frame") or box_frame
    parsed, method = read(sample.kind, reply, sample.options, frame, sample.size, finish_reason)
    if finish_reason == "failed":
        return None, "failed"
    return parsed, method


def judge(sample, reply: str, finish_reason: str = "stop", box_frame: str = "pixel") -> dict:
    """Whether a reply, read by `read_reply`, answers a sample: {"parsed", "method", "correct"} of `grade`."""
    parsed, method = read_reply(sample, reply, finish_reason, box_frame)
    return {"parsed": parsed, "method": method, "correct": is_right(sample.kind, parsed, sample.answer)}


def grade(
    sample,
    reply: str,
    weights: Weights = Weights(),  # noqa: B008 frozen
    similarity: Callable[[str, str], float] = label_similarity,
    finish_reason: str = "stop",
    box_frame: str = "pixel",
) -> Grade:
    """What a reply to a sample, which has a `ground_truth` as well, is worth; `judge` explains the rest.

    Args: box_frame: of the reply's boxes, as for `rewards.in_pixels`.
    """
    graded = judge(sample, reply, finish_reason, box_frame)
    if sample.kind == "choice":
        graded["released"] = released_letter(reply, sample.options) == sample.answer.strip()[1].upper()
    if "<scene>" not in sample.ground_truth:
        return graded
    how = {"weights": weights, "similarity": similarity, "box_frame": box_frame}
    score = score_completion(reply, sample.ground_truth, sample.size, **how)
    gold_objects, gold_triplets, n_gold = gold_labels(sample.ground_truth)
    objects, triplets = scene_labels(parse_scene(reply))
    ious, cious = [m[2] for m in score.matches], [m[3] for m in score.matches]
    return graded | {
        "terms": {term: getattr(score, term) for term in TERMS},
        "reason": score.reason,
        "matches": [list(m) for m in score.matches],
        "gold_objects": n_gold,
        "mean_iou": mean(ious),
        "mean_ciou": mean(cious),
        "recall50": sum(iou >= 0.5 for iou in ious) / n_gold if n_gold else None,
        "object_jaccard": jaccard(objects, gold_objects),
        "triplet_jaccard": jaccard(triplets, gold_triplets),
    }


def regrade(record: Record) -> Record:
    """A record with the grade that the present code gives its reply."""
    sample = SimpleNamespace(
        kind=record["kind"],
        options=tuple(record["choices"]),
        answer=record["gold"],
        ground_truth=record.get("ground_truth", record["gold"]),
        size=tuple(record["size"]),
        meta=record["meta"],
    )
    how = {key: record[key] for key in ("finish_reason", "box_frame") if key in record}
    return record | grade(sample, record["reply"], **how)


def scene_labels(scene: dict | None) -> tuple[frozenset, frozenset]:
    """(labels, triplets of labels) of a scene, without the numbers of the instances: "traffic_light.1" and
    "traffic-light.2" are both a traffic light."""
    if scene is None:
        return frozenset(), frozenset()

    def label_of(instance):
        return normalised(instance.rpartition(".")[0].replace("_", " ") or instance)

    triplets = frozenset(
        (label_of(r["subject"]), normalised(r["predicate"]), label_of(r["object"]))
        for r in scene["relationships"]
    )
    return frozenset(label_of(o["id"]) for o in scene["objects"]), triplets


@lru_cache(maxsize=4096)
def gold_labels(ground_truth: str) -> tuple[frozenset, frozenset, int]:
    """(labels, triplets, number of objects) of a gold scene."""
    scene = parse_ground_truth(ground_truth)[0]
    return *scene_labels(scene), len(scene["objects"])


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


# ---- figures over records ----
def mean(values: Iterable[float | None]) -> float | None:
    """None if there are none, or if one of them is: a mean over what happens to be there compares nothing."""
    values = list(values)
    return sum(values) / len(values) if values and None not in values else None


def wilson(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion k / n; (0, 1) for n = 0. Default z: 95 %.

    >>> [round(end, 3) for end in wilson(8, 10)]
    [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p, shrink = k / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(records: Sequence[dict]) -> dict:
    """n, correct, accuracy and its Wilson interval ci95."""
    n, correct = len(records), sum(r["correct"] for r in records)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n if n else 0.0,
        "ci95": list(wilson(correct, n)),
    }


def summarise(records: Sequence[dict]) -> dict:
    """Figures over the results of `grade`, each optionally with category and finish_reason.

    Returns: n, correct, accuracy = correct / n, ci95 (Wilson); unparsed, truncated, failed (counts, part
        of n); methods {method: n}; categories {name: n, correct, accuracy, ci95}; released (accuracy as the
        paper's evaluator reads the replies, over the multiple-choice items); and over the items with a gold
        scene:
        scenes        their number
        reward, format, count, spatial  means of these reward terms
        exact         mean of the reward's accuracy term, which compares letter and text
        rejected      {why a completion was malformed: n}
        mean_iou, mean_ciou  over all matched pairs of all well-formed completions, each pair counting once;
                      0.0 without any pair
        recall50      gold objects matched with IoU >= 0.5 / all gold objects, those of rejected completions
                      too; 1.0 without any
        object_jaccard, triplet_jaccard  means
        right_scene, wrong_scene  n and accuracy of the items whose triplet Jaccard is >= 0.5, and of the rest
    """
    lettered = [r["released"] for r in records if "released" in r]
    summary = (
        tally(records)
        | {
            "unparsed": sum(r["parsed"] is None for r in records),
            "truncated": sum(r.get("finish_reason") == "length" for r in records),
            "failed": sum(r.get("finish_reason") == "failed" for r in records),
            "methods": dict(Counter(r["method"] for r in records).most_common()),
            "categories": {
                name: tally(group)
                for name, group in sorted(grouped(records, lambda r: str(r.get("category") or "")).items())
            },
        }
        | ({"released": sum(lettered) / len(lettered)} if lettered else {})
    )
    scenes = [r for r in records if r.get("terms")]
    return summary | summarise_scenes(scenes) if scenes else summary


def summarise_scenes(scenes: Sequence[dict]) -> dict:
    """The part of `summarise` that is over the items with a gold scene."""
    pairs = [pair for r in scenes for pair in r["matches"]]
    n_gold = sum(r["gold_objects"] for r in scenes)
    terms = {term: mean(r["terms"][term] for r in scenes) for term in TERMS}
    return {
        "scenes": len(scenes),
        **{"exact" if term == "accuracy" else term: value for term, value in terms.items()},
        "rejected": dict(Counter(r["reason"] for r in scenes if r["reason"]).most_common()),
        "mean_iou": mean(iou for *_, iou, _ in pairs) or 0.0,
        "mean_ciou": mean(ciou for *_, ciou in pairs) or 0.0,
        "recall50": sum(iou >= 0.5 for *_, iou, _ in pairs) / n_gold if n_gold else 1.0,
        "object_jaccard": mean(r["object_jaccard"] for r in scenes),
        "triplet_jaccard": mean(r["triplet_jaccard"] for r in scenes),
        "right_scene": tally([r for r in scenes if r["triplet_jaccard"] >= 0.5]),
        "wrong_scene": tally([r for r in scenes if r["triplet_jaccard"] < 0.5]),
    }


# ---- official scores: records of all items, in order -> {name: value}, the headline first ----
def accuracy(records: Sequence[dict]) -> float | None:
    return tally(records)["accuracy"] if records else None


def grouped(records: Sequence[dict], key: Callable[[dict], object]) -> dict:
    """Records by what `key` gives of them, in order."""
    groups = defaultdict(list)
    for r in records:
        groups[key(r)].append(r)
    return groups


def by_meta(records: Sequence[dict], *keys: str) -> dict:
    """Records grouped by the named values of their rows, as texts: a file may have anything there."""
    return grouped(records, lambda r: tuple(str(r["meta"].get(key)) for key in keys))


def all_right(groups: Iterable[Sequence[dict]]) -> float | None:
    """Share of the groups in which every record is right: half a pair is what a coin gets."""
    return mean([float(all(r["correct"] for r in group)) for group in groups])


def cv_bench(records):
    """Sources count alike, whatever their size: 2D is the mean of two, the total that of 2D and 3D."""
    two_d = mean([accuracy([r for r in records if r["meta"].get("source") == s]) for s in ("ADE20K", "COCO")])
    three_d = accuracy([r for r in records if r["meta"].get("source") == "Omni3D"])
    return {"mean of 2D and 3D": mean([two_d, three_d]), "2D": two_d, "3D": three_d}


def cv_bench_2d(records):
    return {"2D": cv_bench(records)["2D"]}


def mmvp_pairs(records):
    """Two images, and a question whose answer differs; no score unless every cluster is such a pair."""
    pairs = [pair for pair in grouped(records, lambda r: r["cluster"]).values() if len(pair) == 2]
    return {"pairs": all_right(pairs)} if 2 * len(pairs) == len(records) else {}


def spatialbench(records):
    """Pairs of opposite questions about one image; counting by its mean relative error, at most 1 an item."""
    scores = {}
    for task, group in grouped(records, lambda r: r["category"]).items():
        if task in ("existence", "reach", "size"):
            images = grouped(group, lambda r: r["cluster"])
            # An image may have several pairs: they follow one another in the file.
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
    """Where the file has them: all rotations of the options, and the mirrored image as well.

    A qid is QUESTION-TURN or QUESTION-flip-TURN; files without have no official score.
    """
    turns, flips = defaultdict(list), defaultdict(list)
    for r in records:
        if qid := re.fullmatch(r"(.+?)(-flip)?(?:-(\d+))?", str(r["meta"].get("qid") or "")):
            turns[qid[1], qid[2]].append(r)
            flips[qid[1]].append(r)
    scores = {"circular and flip": all_right(flips.values()), "circular": all_right(turns.values())}
    return scores if len(flips) < len(records) and turns else {}


def hallusionbench(records):
    """aAcc: items; qAcc: questions right on all their figures; fAcc: figures with all their questions right.
    Their mean is what leaderboards quote.

    Visual supplements (VS) of figure 0 show no figure: they are questions, but belong to no figure.
    """
    shown = [
        r for r in records if (r["meta"].get("category"), str(r["meta"].get("figure_id"))) != ("VS", "0")
    ]
    figures = by_meta(shown, "category", "subcategory", "set_id", "figure_id")
    questions = by_meta(records, "category", "subcategory", "set_id", "question_id")
    scores = {
        "aAcc": accuracy(records),
        "qAcc": all_right(questions.values()),
        "fAcc": all_right(figures.values()),
    }
    return {"mean of aAcc, qAcc, fAcc": mean(scores.values()), **scores}


def mmstar(records):
    groups = by_meta(records, "l2_category").values()
    return {"mean over l2 categories": mean([accuracy(group) for group in groups])}


def robospatial(records):
    kinds = {"yes_no": "yes/no", "point": "points"}
    groups = {name: [r for r in records if r["kind"] == kind] for kind, name in kinds.items()}
    return {name: accuracy(group) for name, group in groups.items() if group}


# ---- files of results ----
IDENTITY = (  # what makes a run, of the header's config and data: another value is another run
    "dataset", "revision", "model_path", "processor_name", "template", "provider", "base_url", "limit",
    "seed", "max_new_tokens", "temperature", "min_pixels", "max_pixels", "circular", "shuffle_options",
    "blind", "box_frame", "correct_labels", "fingerprint", "prompts", "weights")  # fmt: skip


HEAD = b'{"header": {'  # how a results file begins
TYPES = {  # of what a record has; its category may be anything and is read as a text
    "id": str, "row": int, "turns": int, "kind": str, "gold": str, "choices": list, "size": list,
    "meta": dict, "cluster": str, "question_hash": str, "reply": str, "finish_reason": str, "method": str,
    "correct": bool,
}  # fmt: skip


def read_records(path, slim: bool = False, lost: dict | None = None) -> tuple[dict, list[Record]]:
    """(header, the last record of every item, in the order of the data); slim: without the long texts.

    Lines that hold no record are passed over, named, and put into `lost`: their items count as not asked.
    """
    records, lost = {}, {} if lost is None else lost  # lost: {number of a line: the line}
    with open(path, "rb") as f:
        try:
            header = json.loads(f.readline())["header"]
            named = (
                header["config"].get(key, "") for key in ("dataset", "model_path", "template", "provider")
            )
            "".join(named).encode()  # texts, and such as can be written
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            message = f"{path}: expected results of evaluate.py, got something else: {error}"
            raise ValueError(message) from None
        for number, line in enumerate(f, 2):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("half a line")
                record = json.loads(line)
                wrong = [key for key, kind in TYPES.items() if type(record.get(key, kind())) is not kind]
                if wrong or not {"id", "row", "finish_reason"} <= record.keys():
                    raise ValueError("no record")
                records[record["id"]] = record | {"category": str(record.get("category") or "")}
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                lost[number] = line
                continue
            for text in ("reply", "choices", "ground_truth", "error") if slim else ():
                records[record["id"]].pop(text, None)
    if named := [number for number, line in lost.items() if line.endswith(b"\n")]:  # half of one is a kill's
        print(f"{path}: passed over {len(named)} lines that hold no record, the first is line {named[0]}")
    return header, sorted(records.values(), key=lambda r: (r["row"], r["id"]))


@contextlib.contextmanager
def names_file(*paths, also: tuple[type[Exception], ...] = ()):
    """Say which file, or record of it, has not what ours have. Raises: ValueError.

    Args: also: errors that no other cause can have within.
    """
    names = " and ".join(map(str, paths))
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, *also) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{names}: expected records of evaluate.py, got others: {what}") from None
    except ValueError as error:
        named = any(str(path) in str(error) for path in paths)
        raise (error if named else ValueError(f"{names}: {error}")) from None


@contextlib.contextmanager
def locked(path: Path, mode: str):
    """The open file, which no other process has so. Raises: ValueError if one has."""
    with open(path, mode) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing it") from None
        yield f


@contextlib.contextmanager
def open_results(path: Path, header: dict):
    """-> (file to append records to, ids that need no second asking), of a new or a continued run.

    Raises: ValueError if another configuration wrote the file, or another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, "a+b") as f:
        done, whole = set(), 0
        f.seek(0)
        first = f.readline()
        if first and not first.endswith(b"\n") and first[: len(HEAD)] == HEAD[: len(first)]:
            print(f"{path}: its header was cut off before anything was asked; begun anew")
            f.truncate(0)
        elif first:
            before, records = read_records(path, slim=True)
            f.seek(0)
            for line in f:
                whole += len(line) if line.endswith(b"\n") else 0
            check_same_run(path, before, header["header"])
            done = {r["id"] for r in records if r["finish_reason"] != "failed"}
            f.truncate(whole)  # half a line of a killed run
        if not whole:
            append(path, json.dumps(header) + "\n")
        yield f, done


def check_same_run(path: Path, before: dict, now: dict):
    """Two headers of one run. Raises: ValueError naming what differs, since a mixture means nothing."""
    unsaid = {"box_frame": "pixel", "correct_labels": False}  # by older files
    old, new = (unsaid | header["config"] | header["data"] for header in (before, now))
    if differs := [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in IDENTITY
        if old.get(key) != new.get(key)
    ]:
        raise ValueError(
            f"{path} holds results of another configuration ({'; '.join(differs)}): "
            "choose another --custom_filename or --out, or remove it"
        )
    if before["versions"] != now["versions"]:
        print(f"{path}: written with {before['versions']}, goes on with {now['versions']}")


# ---- the summary of a run ----
def collapse(records: list[Record]) -> list[dict]:
    """One record an item out of those of all its rotations: right, read and whole only if all are."""
    merged = []
    for group in grouped(records, lambda r: r["row"]).values():
        if len(group) < group[0]["turns"]:
            continue  # not asked in full yet
        reasons = [r["finish_reason"] for r in group]
        item = {k: v for k, v in group[0].items() if k != "terms"} | {
            "correct": all(r["correct"] for r in group),
            "parsed": None if any(r["parsed"] is None for r in group) else group[0]["parsed"],
            "finish_reason": next((worst for worst in ("failed", "length") if worst in reasons), "stop"),
        }
        item |= {"released": all(r["released"] for r in group)} if "released" in item else {}
        merged.append(item)
    return merged


def summarise_run(header: dict, records: list[Record], benchmark=None, paper: float | None = None) -> dict:
    """The summary of a results file: that of `summarise`, the official scores, tables, tokens.

    Args: benchmark: testsets.Benchmark, or None for a file of one's own; paper: the accuracy it reports for
        this model, which is shown only beside a run on the whole benchmark as it is.
    """
    config, asked = header["config"], records
    records = collapse(records) if config.get("circular") else records
    with_reader = summarise_reader(asked, bool(config.get("circular")))
    if benchmark and not benchmark.released:
        records = [{k: v for k, v in r.items() if k != "released"} for r in records]
    variant = [flag for flag in ("circular", "shuffle_options", "blind") if config.get(flag)]
    variant += (
        ["correct_labels"] if config.get("correct_labels") and benchmark and benchmark.known_wrong else []
    )
    variant += [f"limit {config['limit']}"] if config.get("limit") else []
    left_out = config.get("limit") or header["data"].get("skipped") or len(asked) < header["data"]["n"]
    complete = not left_out
    whole = complete and benchmark and header["data"].get("rows") == benchmark.rows and not variant
    official = benchmark.official(records) if benchmark and benchmark.official and complete else {}
    summary = (
        {
            "dataset": config["dataset"],
            "model": config["model_path"],
            "template": config["template"],
            "variant": ", ".join(variant),
            "provider": config["provider"],
        }
        | summarise(records)
        | with_reader
    )
    tables = {key: by_meta(records, key) for key in (benchmark.tables if benchmark else ())}
    summary |= {
        "official": {key: value for key, value in official.items() if value is not None},
        "paper": paper if whole else None,
        "missing": header["data"]["n"] - len(asked),
        "tables": {
            key: {str(value): tally(group) for (value,), group in groups.items()}
            for key, groups in tables.items()
        },
        "prompt_tokens": count_tokens(asked, "prompt_tokens"),
        "tokens": count_tokens(asked, "n_tokens"),
    }
    if letters := [r for r in asked if r["kind"] == "choice"]:  # a model that likes one letter shows here
        summary["letters"] = {
            "said": dict(sorted(Counter(str(r["parsed"]) for r in letters).items())),
            "gold": dict(sorted(Counter(r["gold"][1] for r in letters).items())),
        }
    if config.get("circular"):
        summary["each_rotation"] = tally(asked)
    if price := config.get("price"):  # USD per million tokens, in and out
        summary["usd"] = (price[0] * summary["prompt_tokens"] + price[1] * summary["tokens"]) / 1e6
    return summary


def count_tokens(records: list[Record], key: str) -> int:
    """The sum of a count; older files have what a server gave for one, in numbers, in text or in nothing."""
    counts = (re.fullmatch(r"(\d{1,9})(\.0)?", str(r.get(key))) for r in records)
    return sum(int(n[1]) for n in counts if n)


def summarise_reader(records: list[Record], circular: bool) -> dict:
    """{"reader": by, shown, read, and the `tally` with what it read} of a run that a model helped to read."""
    shown = {r["id"]: r for r in records if r["parsed"] is None and "read_by" in r}
    if not shown:  # what the rules can read by now is theirs
        return {}
    said = {key: {"correct": r["read_correct"], "parsed": r["read"]} for key, r in shown.items()}
    merged = [r | said.get(r["id"], {}) for r in records]
    by = ", ".join(sorted({r["read_by"] for r in shown.values()}))
    read = sum(r["read"] is not None for r in shown.values())
    both = tally(collapse(merged) if circular else merged)
    return {"reader": {"by": by, "shown": len(shown), "read": read, **both}}


# ---- comparison ----
def compare(path_a, path_b, seed: int = 0, draws: int = 10_000) -> dict:
    """Paired comparison of two results files on the items that both have answered (failed requests are none).

    Returns: n, clusters (groups of items about one image or pair), accuracy of a and of b, difference =
        b - a, ci95 of it (bootstrap over clusters), only_a and only_b (items that one alone has right), test,
        p: McNemar's exact test, or where items share clusters, their signs flipped at random.
    """
    import numpy as np
    from scipy.stats import binomtest

    a, b = shared_records(path_a, path_b)
    right = np.array([[x["correct"], y["correct"]] for x, y in zip(a, b, strict=True)], dtype=int)
    change = right[:, 1] - right[:, 0]  # (n,): 1 where b alone is right, -1 where a alone is
    _, cluster = np.unique([x["cluster"] for x in a], return_inverse=True)
    k = cluster.max() + 1
    total, size = np.bincount(cluster, change, k), np.bincount(cluster, minlength=k)
    rng = np.random.default_rng(seed)
    means, flipped = [], 0
    for _ in range(draws // 100):  # in portions, so that memory stays small
        drawn = rng.integers(0, k, (100, k))
        means.append(total[drawn].sum(1) / size[drawn].sum(1))
        signs = rng.integers(0, 2, (100, k)) * 2 - 1
        flipped += int((abs(signs @ total) >= abs(total.sum()) - 1e-9).sum())
    only_a, only_b = int((change < 0).sum()), int((change > 0).sum())
    if k == len(a):
        test = "McNemar, exact"
        p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    else:  # the flips that were drawn, and the one that was observed
        test, p = "sign flips of clusters", (flipped + 1) / (draws // 100 * 100 + 1)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    at_a, at_b = right.mean(0).tolist()
    return {
        "n": len(a),
        "clusters": int(k),
        "a": at_a,
        "b": at_b,
        "difference": float(change.mean()),
        "ci95": [float(low), float(high)],
        "only_a": only_a,
        "only_b": only_b,
        "test": test,
        "p": float(p),
    }


def shared_records(path_a, path_b) -> tuple[list[dict], list[dict]]:
    """The records of the items that both files have answered, in the same order.

    Raises: ValueError if there are none, or if the files are of different items.
    """
    sides, circular, empty, needed = [], set(), [], ("row", "correct", "cluster", "question_hash")
    for path in (path_a, path_b):
        header, records = read_records(path, slim=True)
        with names_file(path):
            circular.add(bool(header["config"].get("circular")))
            records = collapse(records) if header["config"].get("circular") else records
            answered = [r for r in records if r["finish_reason"] != "failed"]
            sides.append({r["row"]: {key: r[key] for key in needed} for r in answered})
        empty += [f"{path} ({len(records)} failed items)"] if not sides[-1] else []
    if len(circular) > 1:
        raise ValueError(f"{path_a} and {path_b}: expected --circular in both or in none")
    if empty:
        raise ValueError(f"nothing to compare: no item has an answer in {' and '.join(empty)}")
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        raise ValueError(f"{path_a} and {path_b}: expected results on the same items, got none in common")
    a, b = ([side[row] for row in shared] for side in sides)
    both = zip(a, b, strict=True)
    if changed := [x["row"] for x, y in both if x["question_hash"] != y["question_hash"]]:
        raise ValueError(f"{path_a} and {path_b}: expected the same items, got others in rows {changed[:5]}")
    return a, b


# ---- tables ----
def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def grid(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of cells, the first the titles, as a table: the first column on the left, numbers on the right."""
    if markdown:
        rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
        return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def run_name(summary: dict) -> str:
    """What was run, beside the data set."""
    parts = (Path(summary["model"]).name, summary["template"], summary["variant"])
    return ", ".join(part for part in parts if part)


def overview(summaries: list[dict], released: bool = False, markdown: bool = False) -> str:
    """One line a results file."""
    titles = "dataset,n,accuracy,95 % interval,official,unparsed,truncated,failed,paper".split(",")
    read = any("reader" in s for s in summaries)
    rows = [titles + ["with reader"] * read + ["released scoring"] * released]
    if len({run_name(s) for s in summaries}) > 1:
        rows[0].insert(1, "model, template")
    for s in summaries:
        headline = next(iter(s["official"].items()), None)
        cells = [
            s["dataset"],
            str(s["n"]),
            percent(s["accuracy"]),
            " - ".join(map(percent, s["ci95"])),
            f"{percent(headline[1])} ({headline[0]})" if headline else "",
            *(str(s[key]) for key in ("unparsed", "truncated", "failed")),
            percent(s["paper"]),
        ]
        cells += [percent(s.get("reader", {}).get("accuracy"))] * read
        cells += [percent(s.get("released"))] * released
        if len(rows[0]) > len(cells):
            cells.insert(1, run_name(s))
        rows.append(cells)
    return grid(rows, markdown)


SCENE_FIGURES = (
    "reward format count exact spatial mean_iou mean_ciou recall50 object_jaccard triplet_jaccard".split()
)


def details(summary: dict, markdown: bool = False) -> str:
    """What a results file says beyond its line of the overview."""
    parts = []
    for title, table in [("category", summary["categories"]), *summary["tables"].items()]:
        if len(table) > 1:
            rows = [[title, "n", "accuracy", "95 % interval"]]
            rows += [
                [name, str(t["n"]), percent(t["accuracy"]), " - ".join(map(percent, t["ci95"]))]
                for name, t in table.items()
            ]
            parts.append(grid(rows, markdown))
    lines = []
    if summary["official"]:
        scores = (f"{key} {percent(value)}" for key, value in summary["official"].items())
        lines.append("official: " + ", ".join(scores))
    if "reader" in summary:
        r = summary["reader"]
        lines.append(
            f"accuracy {percent(r['accuracy'])} with the {r['read']} of {r['shown']} unread replies "
            f"that {r['by']} reads"
        )
    if "each_rotation" in summary:
        lines.append(f"each rotation by itself: {percent(summary['each_rotation']['accuracy'])}")
    if "scenes" in summary:
        lines.append(", ".join(f"{key} {summary[key]:.3f}" for key in SCENE_FIGURES))
        right, wrong = (
            f"{percent(summary[key]['accuracy'])} of {summary[key]['n']}"
            for key in ("right_scene", "wrong_scene")
        )
        lines.append(f"accuracy where the triplet Jaccard is at least 0.5: {right}; below: {wrong}")
    if rejected := summary.get("rejected", summary.get("reasons")):  # as older summaries call it
        lines.append("rejected: " + ", ".join(f"{reason} {n}" for reason, n in rejected.items()))
    if "letters" in summary:
        counts = (
            f"{who} " + ", ".join(f"{letter} {n}" for letter, n in letters.items())
            for who, letters in summary["letters"].items()
        )
        lines.append("letters: " + "; ".join(counts))
    usd = f", ${summary['usd']:.2f}" if "usd" in summary else ""
    lines.append(f"{summary['prompt_tokens']:,} prompt tokens, {summary['tokens']:,} generated{usd}")
    text = ("\n\n" if markdown else "\n").join([*parts, *lines])
    return text.encode(errors="backslashreplace").decode()  # a category may have half a surrogate pair


def write_tables(out: Path):
    """OUT/summary.json and OUT/summary.md, of all results in the folder; other files there are named."""
    summaries, parts = [], []
    for path in sorted(out.glob("*.summary.json")):
        try:
            s = json.loads(path.read_text(encoding="utf-8"))
            overview([s], released=True)
            parts.append(f"## {s['dataset']}: {run_name(s)}\n\n{details(s, markdown=True)}")
            summaries.append(s)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            print(
                f"{path}: no summary of evaluate.py, left out of the table: {type(error).__name__}: {error}"
            )
    top = overview(summaries, released=True, markdown=True)
    with write_whole(out / "summary.json") as tmp:
        tmp.write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
    with write_whole(out / "summary.md") as tmp:
        text = "\n\n".join(["# Results", top, *parts]) + "\n"
        tmp.write_text(text, encoding="utf-8", errors="backslashreplace")
