"""Read a model's reply and say what it is worth: letters, yes or no, numbers, words, points, sequences.

    from grading import parse_choice
    parse_choice("<think>A cup? No.</think><answer>(B) arm chair</answer>", ["chair", "arm chair"])   # "B"

Pure functions of text, without a model or a judge: about 30,000 replies a second, and none of them raises.

What differs from the paper's evaluator: a reply that names no option is unparsed, never option A, and one
that names two is a contradiction, never the first. Unparsed, truncated and failed replies stay in the
denominator of the score and are counted beside it. `released_letter` reads as that evaluator does.
"""

import ast
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from data import Sample
from rewards import (
    MAX_CHARS,
    TERMS,
    Weights,
    extract_answer,
    label_similarity,
    parse_ground_truth,
    parse_scene,
    score_completion,
)

LETTERS = "ABCDEFGHIJ"
MAX_STATEMENT = 120  # characters; a longer reply that announces no answer is a thought, not an answer
MAX_PHRASES = 16  # final-answer phrases read, the last ones


# ---- reading a choice out of a reply ----
_WRAPPERS = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathsf)\s?\{([^{}]*)\}")  # \text{B} -> B
_DRESS = re.compile(r"[*`$#\"“”]|\\[()\[\]]")
_FULL_WIDTH = str.maketrans("（）：．，’", "():.,'")
_BOXED = re.compile(r"\\boxed\s?\{((?:[^{}]|\{[^{}]*\})*)\}")
_FINAL = re.compile(r"\bfinal (?:answer|choice)(?: (?:is|would be))?\s?[:=]?\s|最终答案[是为]?:?", re.I)
_PHRASE = re.compile(
    r"\b(?:answer|option|choice)\s?"
    r"(?:(?:is|would be|should be|must be)(?:\s?:|\s(?=\S)|(?=[(\[])|$)|:|=|->|→)"
    r"|(?:^|\n)answer\s*\n|\bI(?:'d| would| will|'ll)? (?:choose|pick|select|go with|say|answer)\b:?"
    r"|答案[是为]?:?",
    re.I,
)
_VERDICT = re.compile(
    r"(?:[(\[]([A-J])[)\]]|\b([A-J]))[.,]? (?:is|must be|seems) (?:the )?(?:correct|right|best|answer)\b"
)
_LEAD = re.compile(  # a letter in its dress; a bare one only where it can be no article
    r"(?:(?:so|thus|hence|therefore),? )?(?:it's |it is |i think )?"
    r"(?:the )?(?:correct )?(?:(?:option|choice|answer):? )?"
    r"(?:[(\[{] ?([a-j]) ?[)\]}]|([a-j]) ?[).:,;](?!\w)"
    r"|([a-j])(?=$| (?:because|since|or|and)\b| ?[/&] ?[a-j]\b| [-–—] ))",
    re.I,
)
_ANOTHER = re.compile(
    r"[(\[]([A-Ja-j])[)\]]|(?:\b(?:or|and)|[/,&]) ?(?:option )?([A-J])(?= ?(?:$|[).,;:/&]|or\b|and\b))"
)
_NEGATION = re.compile(r"\b(?:not|neither|nor|never|no|none|cannot)\b|n't\b")
_YES_NO = re.compile(r"(yes|no)\b(?!/| (?:or|and)\b)")
_NO_IDEA = re.compile(r"\bno (?:idea|clue|answer|information|image)\b")
_SENTENCE_END = re.compile(r"(?<=\w\w)[.!?](?:\s|$)")
_NUMBER_WORDS = {w: str(i) for i, w in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}  # fmt: skip
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBER_WORDS)})\b")


def _plain(text: str) -> str:
    """Without Markdown and LaTeX dress, runs of blanks as one."""
    text = _DRESS.sub("", _WRAPPERS.sub(r"\1", text)).translate(_FULL_WIDTH)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _normal(text: str) -> str:
    """Plain text as it is compared: lower case, digits for number words, no full stop."""
    text = _NUMBER_WORD.sub(lambda m: _NUMBER_WORDS[m[0]], text.lower().replace("\n", " "))
    return text.strip(" .,;:!")


@dataclass(frozen=True)
class _Options:
    letters: dict[str, set[str]]  # normalised option text -> its letters (more than one if options repeat)
    anywhere: re.Pattern  # any option text on word and number boundaries, the longest first
    yes_no: bool
    lettered: bool  # whether the reader was shown letters


@lru_cache(maxsize=4096)
def _options(choices: tuple[str, ...], lettered: bool = True) -> _Options:
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices: expected 2 to {len(LETTERS)} options, got {len(choices)}: {choices!r}")
    letters = defaultdict(set)
    for letter, choice in zip(LETTERS, choices, strict=False):
        letters[_normal(_plain(choice))].add(letter)
    texts = sorted(filter(None, letters), key=len, reverse=True)
    inside = "|".join(rf"(?<!-){re.escape(t)}" if t[0].isdigit() else re.escape(t) for t in texts)
    anywhere = re.compile(rf"(?<!\w)(?<!\d[.,])(?:{inside})(?!\w)(?![.,]\d)")
    return _Options(dict(letters), anywhere, set(texts) == {"yes", "no"}, lettered)


def _named_texts(statement: str, options: _Options) -> set[str]:
    """Letters of the options whose text a statement names; none where it negates outside those texts."""
    statement = _normal(statement)
    if statement in options.letters:
        return options.letters[statement]
    if options.yes_no:
        statement = _NO_IDEA.sub("", statement)
        if leading := _YES_NO.match(statement):
            return options.letters[leading[1]]
    if _NEGATION.search(options.anywhere.sub("", statement)):
        return set()
    return {letter for text in options.anywhere.findall(statement) for letter in options.letters[text]}


def _named_letters(statement: str, options: _Options) -> set[str]:
    """Letters at the head of a statement, in any usual dress: B  b)  (B)  [B]  B.  B: left  Option B."""
    if not options.lettered:
        return set()
    if found := _LEAD.match(statement):
        rest = statement[found.end(found.lastindex) :]
        others = {(a or b).upper() for a, b in _ANOTHER.findall(rest.partition("\n")[0])}
        return {found[found.lastindex].upper()} | others
    if statement[1:2] == " " and options.letters.get(_normal(statement[2:])) == {statement[0]}:
        return {statement[0]}  # "B left"
    return set()


def _stated(statement: str, options: _Options) -> set[str]:
    """All options that a short statement names: none, one, or a contradiction."""
    letters = _named_letters(statement, options)
    if not letters or (len(statement) > 1 and _normal(statement) in options.letters):
        return _named_texts(statement, options)  # an option may itself begin like a letter: "A is closer"
    texts = _named_texts(statement, options)
    return letters | texts if len(texts) == 1 else letters


def _announced(text: str, options: _Options) -> tuple[set[str], str]:
    """Options named in the last box or after final-answer phrases -> (letters, method)."""
    if (boxed := _BOXED.findall(text)) and (found := _stated(_plain(boxed[-1]), options)):
        return found, "boxed"
    text = _plain(text)
    for pattern in (_FINAL, _PHRASE):
        verdicts = options.lettered and pattern is _PHRASE
        found = {a or b for a, b in _VERDICT.findall(text)} if verdicts else set()
        for phrase in list(pattern.finditer(text))[-MAX_PHRASES:]:
            line = text[phrase.end() : phrase.end() + 2 * MAX_STATEMENT].lstrip(" :\n").partition("\n")[0]
            found |= _stated(_SENTENCE_END.split(line, maxsplit=1)[0], options)
        if found:
            return found, "phrase"
    return set(), "none"


def _read(text: str, options: _Options) -> tuple[set[str], str]:
    """Options named by a text outside its thinking -> (letters, method)."""
    found, method = _announced(text, options)
    if found:
        return found, method
    text, method = _plain(text), "text"
    for line in {text.partition("\n")[0], text.rpartition("\n")[2]}:  # before or after the explanation
        line = line[: 2 * MAX_STATEMENT]
        if _named_letters(line, options):
            found, method = found | _stated(line, options), "letter"
        else:
            found = found | options.letters.get(_normal(line), set())
    if not found and len(text) <= MAX_STATEMENT:
        found = _named_texts(text, options)
    return found, method


def _answer_block(reply: str) -> tuple[str, str, str]:
    """(the last answer block or "", what follows it, all that lies outside the thinking)."""
    reply = reply[-MAX_CHARS:]
    thought, closed, visible = reply.rpartition("</think>")
    if not closed and "<think>" in reply:
        visible = ""  # cut off while thinking
    if "<answer>" in visible:
        block, _, tail = visible.rpartition("<answer>")[2].partition("</answer>")
        return block.strip(), tail, visible
    return extract_answer(reply).strip(), "", visible


def read_choice(reply: str, choices: Sequence[str], lettered: bool = True) -> tuple[str | None, str]:
    """The option a reply settles on, and how that was found: (letter, method) or (None, why not).

    Methods: answer_tag, boxed, phrase, letter, text. Reasons: none (names no option), conflict (several, or a
    letter and the text of another option), outside (a letter beyond the options), empty. Text never raises.
    Not `lettered`: the options were shown without letters, so that only their texts count.
    """
    options = _options(tuple(choices), lettered)
    if not isinstance(reply, str) or not reply.strip():
        return None, "empty"
    block, tail, visible = _answer_block(reply)
    if block:
        found, method = _read(block, options)[0] | _announced(tail, options)[0], "answer_tag"
    else:
        found, method = _read(visible, options)
    if len(found) != 1:
        return None, "conflict" if found else "none"
    letter = next(iter(found))
    return (letter, method) if letter in LETTERS[: len(choices)] else (None, "outside")


def parse_choice(reply: str, choices: Sequence[str]) -> str | None:
    r"""The letter of the option a reply settles on, or None: never a default, never a guess.

    Args: the model's whole reply; the option texts in order, without letters.
    The first of these that names an option decides: the last <answer> block; the last \boxed{}; final-answer
    phrases; a reply (or its first or last line) that is a letter in any usual dress; a short reply with the
    text of one option, on word and number boundaries, the longest option winning. Two candidates: None.

    >>> parse_choice("<think>A cup? No.</think><answer>(B) arm chair</answer>", ["chair", "arm chair"])
    'B'
    >>> parse_choice("It is the arm chair.", ["chair", "arm chair"])
    'B'
    >>> parse_choice("(A) arm chair", ["chair", "arm chair"]) is None
    True
    """
    return read_choice(reply, choices)[0]


# ---- reading other answers ----
_NUMBER = re.compile(r"(?<![\w.,])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|[.,]\d)")
_POINT = re.compile(r"[(\[]\s*(-?\d+(?:\.\d*)?|-?\.\d+)\s*,\s*(-?\d+(?:\.\d*)?|-?\.\d+)\s*[)\]]")
_BARE_POINT = re.compile(r"\s*(-?\d*\.?\d+)\s*,\s*(-?\d*\.?\d+)\s*")
_LINK = r"(?: ?(?:,|->|→|>|-|;) ?| |(?=[(\[]))"  # between the letters of a sequence
_ONE = r"[(\[]?[A-J][)\]]?"
_ORDER = re.compile(rf"(?<![A-Za-z]){_ONE}(?:{_LINK}{_ONE})+(?![A-Za-z])|\b[A-J]{{2,10}}\b")
_TENS = {w: 10 * i for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_UNITS = {w: int(n) for w, n in _NUMBER_WORDS.items()} | {w: i for i, w in enumerate(_TEENS, 13)}
_ONES = "|".join(list(_UNITS)[1:10])
_WORDED = re.compile(rf"\b(?:({'|'.join(_TENS)})(?:[- ]({_ONES}))?|({'|'.join(_UNITS)}))\b")
_NOTHING = re.compile(r"(?:there (?:are|is) )?(?:no|none|nothing|not any)\b"
                      r"(?! (?:idea|clue|answer|information|image|way))")
POINT_RANGE = {"unit": (1, 1), "per_mille": (1000, 1000)}  # what x and y are divided by; "pixel": the image's


def _statements(reply: str) -> list[tuple[str, str]]:
    """Texts that may hold the answer, the most decisive first: (plain text, method)."""
    block, _, visible = _answer_block(reply)
    if block:
        return [(_plain(boxed[-1] if (boxed := _BOXED.findall(block)) else block), "answer_tag")]
    found = [(_plain(boxed), "boxed") for boxed in _BOXED.findall(visible)[-1:]]
    text = _plain(visible)
    for pattern in (_FINAL, _PHRASE):
        for phrase in list(pattern.finditer(text))[: -MAX_PHRASES - 1 : -1]:  # the last one first
            line = text[phrase.end() : phrase.end() + 2 * MAX_STATEMENT].lstrip(" :\n").partition("\n")[0]
            found.append((_SENTENCE_END.split(line, maxsplit=1)[0], "phrase"))
    if len(text) <= MAX_STATEMENT:
        return [*found, (text, "text")]
    lines = (text.rpartition("\n")[2], text.partition("\n")[0])  # behind or before the explanation
    return found + [(line, "text") for line in lines if len(line) <= MAX_STATEMENT]


def _first(reply: str, find: Callable[[str], set]) -> tuple[object, str]:
    """What the first statement that holds anything holds, if that is one thing."""
    if not isinstance(reply, str) or not reply.strip():
        return None, "empty"
    for statement, method in _statements(reply):
        if found := find(statement):
            return (next(iter(found)), method) if len(found) == 1 else (None, "conflict")
    return None, "none"


def _numbers(statement: str) -> set[float]:
    statement = statement.rpartition("=")[2].lower()
    found = {float(n.replace(",", "")) for n in _NUMBER.findall(statement)}
    found |= {_TENS[tens] + _UNITS.get(unit, 0) if tens else _UNITS[word]
              for tens, unit, word in _WORDED.findall(statement)}
    return {float(n) for n in found} or ({0.0} if _NOTHING.match(statement) else set())


def read_number(reply: str) -> tuple[float | None, str]:
    """The one number a reply settles on: (number, method) or (None, why not).

    >>> read_number("<answer>three cups</answer>"), read_number("3 or 4")
    ((3.0, 'answer_tag'), (None, 'conflict'))
    """
    return _first(reply, _numbers)


def read_yes_no(reply: str) -> tuple[str | None, str]:
    """("yes" or "no", method) or (None, why not); the leading word counts.

    >>> read_yes_no("No, yes is what I would like to say.")
    ('no', 'text')
    """
    letter, method = read_choice(reply, ("yes", "no"), lettered=False)
    return {"A": "yes", "B": "no", None: None}[letter], method


def read_word(reply: str) -> tuple[str | None, str]:
    """The normalised statement that answers an open question: (text, method) or (None, why not)."""
    return _first(reply, lambda statement: {_normal(statement)} - {""})


def word_matches(said: str, gold: str) -> bool:
    """Whether a statement is the gold word, or names it on word boundaries without an alternative or a not.

    >>> word_matches("it is on the left", "Left"), word_matches("left or right", "left")
    (True, False)
    """
    gold = _normal(_plain(gold))
    rest, n = re.subn(rf"(?<!\w){re.escape(gold)}(?!\w)", " ", said)
    alternatives = re.search(r"\b(?:or|either)\b|/", rest)
    return said == gold or (n > 0 and not alternatives and not _NEGATION.search(rest))


def read_point(reply: str, frame: str, size: tuple[int, int]) -> tuple[tuple[float, float] | None, str]:
    """The first point of a reply as shares of the image: ((x, y), method) or (None, why not).

    Args: frame: unit (0 to 1), per_mille (0 to 1000) or pixel; size (W, H) of the image. The frame is what
        the question asked for; it is never guessed from the values, and a point beyond it is outside.
    """
    def find(statement):
        point = _POINT.search(statement) or _BARE_POINT.fullmatch(statement)
        return {(float(point[1]), float(point[2]))} if point else set()

    point, method = _first(reply, find)
    if point is None:
        return None, method
    x, y = (c / full for c, full in zip(point, POINT_RANGE.get(frame, size), strict=True))
    return ((x, y), method) if 0 <= x <= 1 and 0 <= y <= 1 else (None, "outside")


def in_polygon(point: Sequence[float], polygon: Sequence[Sequence[float]]) -> bool:
    """Whether a point lies inside a polygon (even-odd rule).

    >>> in_polygon((0.8, 0.5), [(0, 0), (1, 0), (1, 1)]), in_polygon((0.2, 0.5), [(0, 0), (1, 0), (1, 1)])
    (True, False)
    """
    (x, y), inside = point, False
    for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (x2 - x1) * (y - y1) / (y2 - y1):
            inside = not inside
    return inside


def parse_polygon(text: str) -> list[tuple[float, float]]:
    """The corners of a gold "[(x, y), ...]". Raises ValueError."""
    try:
        corners = [(float(x), float(y)) for x, y in ast.literal_eval(text)]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        corners = []
    if len(corners) < 3 or not all(map(math.isfinite, sum(corners, ()))):
        raise ValueError(f"expected at least three points [(x, y), ...], got {text[:80]!r}")
    return corners


def read_sequence(reply: str) -> tuple[str | None, str]:
    """Letters in the order that a reply gives them: ("BDAC", method) or (None, why not).

    >>> read_sequence("The answer is B -> D -> A -> C."), read_sequence("(B)(A)"), read_sequence("A cup")
    (('BDAC', 'phrase'), ('BA', 'text'), (None, 'none'))
    """
    def find(statement):
        orders = {re.sub(r"[^A-J]", "", found) for found in _ORDER.findall(statement)}
        return {order for order in orders if len(set(order)) == len(order) > 1}

    return _first(reply, find)


def released_letter(reply: str, choices: Sequence[str]) -> str:
    """The letter that the paper's published evaluator reads: A, unless the reply is "(X) text" or "text".

    It looks behind "Final Answer:" if that stands anywhere, else into the answer block, else at all of it.

    >>> [released_letter(r, ["cup", "plate"]) for r in ("(B) plate", "plate", "B", "I cannot tell.")]
    ['B', 'B', 'A', 'A']
    """
    text = reply[-MAX_CHARS:] if isinstance(reply, str) else ""
    text = text.rpartition("Final Answer:")[2] if "Final Answer:" in text else (extract_answer(text) or text)
    text = text.strip().lower()
    for letter, choice in zip(LETTERS, choices, strict=False):
        choice = choice.strip().lower()
        if text in (choice, f"({letter.lower()}) {choice}"):
            return letter
    return "A"


# ---- grading ----
def read(sample: Sample, reply: str) -> tuple[object, str]:
    """(what a reply answers to a sample, method) or (None, why not)."""
    if sample.kind == "choice":
        return read_choice(reply, sample.options)
    if sample.kind == "point":
        return read_point(reply, sample.meta["frame"], sample.size)
    return {"yes_no": read_yes_no, "number": read_number, "word": read_word,
            "sequence": read_sequence}[sample.kind](reply)


def is_right(sample: Sample, parsed) -> bool:
    """Whether what `read` found is the gold answer."""
    gold = sample.answer.strip()
    if parsed is None:
        return False
    if sample.kind == "choice":
        return parsed == gold[1].upper()
    if sample.kind == "number":
        return math.isclose(parsed, float(gold), rel_tol=1e-6, abs_tol=1e-9)
    if sample.kind == "point":
        return in_polygon(parsed, parse_polygon(gold))
    if sample.kind == "word":
        return word_matches(parsed, gold)
    return parsed == (gold.lower() if sample.kind == "yes_no" else gold.upper())


def grade(
    sample: Sample,
    reply: str,
    weights: Weights = Weights(),  # noqa: B008 frozen
    similarity: Callable[[str, str], float] = label_similarity,
    finish_reason: str = "stop",
) -> dict:
    """What a reply to a sample is worth.

    Args: finish_reason: of a reply cut off ("length") only an answer block, a box or a leading letter counts;
        of a failed request nothing.
    Returns: parsed (what `read` found, or None), method, correct (bool), released (bool: right as the paper's
        evaluator reads it; choices only); and if the sample has a gold scene:
        terms         reward, format, count, accuracy, spatial of `rewards.score_completion`
        reason        why the format was refused, or None
        matches       (predicted index, gold index, IoU, CIoU) of matched objects; none if the format is wrong
        gold_objects  number of gold objects
        mean_iou, mean_ciou  over `matches`, None without any
        recall50      share of the gold objects matched with IoU >= 0.5, None without gold objects
        object_jaccard, triplet_jaccard  overlap of the predicted and the gold sets of labels, and of
                      (subject label, predicate, object label); 1 if both are empty
    """
    parsed, method = read(sample, reply)
    if finish_reason == "failed":
        parsed, method = None, "failed"
    elif finish_reason == "length" and method in ("phrase", "text"):
        parsed, method = None, "unfinished"
    graded = {"parsed": parsed, "method": method, "correct": is_right(sample, parsed)}
    if sample.kind == "choice":
        graded["released"] = released_letter(reply, sample.options) == sample.answer.strip()[1].upper()
    if "<scene>" not in sample.ground_truth:
        return graded
    score = score_completion(reply, sample.ground_truth, sample.size, weights=weights, similarity=similarity)
    gold_objects, gold_triplets, n_gold = _gold_scene(sample.ground_truth)
    objects, triplets = _names(parse_scene(reply))
    ious, cious = [m[2] for m in score.matches], [m[3] for m in score.matches]
    return graded | {
        "terms": {term: getattr(score, term) for term in TERMS},
        "reason": score.reason,
        "matches": [list(m) for m in score.matches],
        "gold_objects": n_gold,
        "mean_iou": _mean(ious),
        "mean_ciou": _mean(cious),
        "recall50": sum(iou >= 0.5 for iou in ious) / n_gold if n_gold else None,
        "object_jaccard": _jaccard(objects, gold_objects),
        "triplet_jaccard": _jaccard(triplets, gold_triplets),
    }


def _names(scene: dict | None) -> tuple[frozenset, frozenset]:
    """(labels, triplets of labels) of a scene, without the numbers of the instances."""
    if scene is None:
        return frozenset(), frozenset()

    def label(name):
        return _normal(name.rpartition(".")[0].replace("_", " ") or name)

    triplets = frozenset((label(r["subject"]), _normal(r["predicate"]), label(r["object"]))
                         for r in scene["relationships"])
    return frozenset(label(o["id"]) for o in scene["objects"]), triplets


def _jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


@lru_cache(maxsize=4096)
def _gold_scene(ground_truth: str) -> tuple[frozenset, frozenset, int]:
    scene = parse_ground_truth(ground_truth)[0]
    return *_names(scene), len(scene["objects"])


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


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
    accuracy = correct / n if n else 0.0
    return {"n": n, "correct": correct, "accuracy": accuracy, "ci95": list(wilson(correct, n))}


def summarise(records: Sequence[dict]) -> dict:
    """Figures over the results of `grade`, each optionally with category and finish_reason.

    Returns: n, correct, accuracy = correct / n, ci95 (Wilson); unparsed, truncated, failed (counts, part
        of n); methods {method: n}; categories {name: n, correct, accuracy, ci95}; released (accuracy as the
        paper's evaluator reads the replies, over the multiple-choice items); and over the items with a gold
        scene:
        scenes        their number
        reward, format, count, spatial  means of these reward terms
        exact         mean of the reward's accuracy term, which compares letter and text
        reasons       {why a format was refused: n}
        mean_iou, mean_ciou  over all matched pairs of all items with the right format, each pair counting
                      once; 0.0 without any pair
        recall50      gold objects matched with IoU >= 0.5 / all gold objects; refused replies count
        object_jaccard, triplet_jaccard  means
        right_scene, wrong_scene  n and accuracy of the items whose triplet Jaccard is >= 0.5, and of the rest
    """
    by_category = defaultdict(list)
    for r in records:
        by_category[r.get("category") or ""].append(r)
    lettered = [r["released"] for r in records if "released" in r]
    summary = tally(records) | {
        "unparsed": sum(r["parsed"] is None for r in records),
        "truncated": sum(r.get("finish_reason") == "length" for r in records),
        "failed": sum(r.get("finish_reason") == "failed" for r in records),
        "methods": dict(Counter(r["method"] for r in records).most_common()),
        "categories": {name: tally(by_category[name]) for name in sorted(by_category)},
    } | ({"released": sum(lettered) / len(lettered)} if lettered else {})
    scenes = [r for r in records if r.get("terms")]
    if not scenes:
        return summary
    pairs = [pair for r in scenes for pair in r["matches"]]
    n_gold = sum(r["gold_objects"] for r in scenes)
    terms = {term: _mean(r["terms"][term] for r in scenes) for term in TERMS}
    return summary | {
        "scenes": len(scenes),
        **{"exact" if term == "accuracy" else term: mean for term, mean in terms.items()},
        "reasons": dict(Counter(r["reason"] for r in scenes if r["reason"]).most_common()),
        "mean_iou": _mean(iou for *_, iou, _ in pairs) or 0.0,
        "mean_ciou": _mean(quality for *_, quality in pairs) or 0.0,
        "recall50": sum(iou >= 0.5 for *_, iou, _ in pairs) / n_gold if n_gold else 1.0,
        "object_jaccard": _mean(r["object_jaccard"] for r in scenes),
        "triplet_jaccard": _mean(r["triplet_jaccard"] for r in scenes),
        "right_scene": tally([r for r in scenes if r["triplet_jaccard"] >= 0.5]),
        "wrong_scene": tally([r for r in scenes if r["triplet_jaccard"] < 0.5]),
    }
