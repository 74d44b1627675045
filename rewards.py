"""The gated dense spatial reward of SpatialThinker (arXiv:2511.07403) in one file. Needs numpy and scipy.

    >>> scene = '<scene>{"objects": [{"id": "dog.1", "bbox": [10, 20, 60, 80]}]}</scene>'
    >>> gold = scene + "<answer>(B) left</answer>"
    >>> text = f"<observe>A dog.</observe>{scene}<think>Near the edge.</think><answer>(B) left</answer>"
    >>> {term: round(value, 3) for term, value in spatial_reward(text, gold, (100, 100)).items()}
    {'reward': 1.0, 'format': 1.0, 'count': 1.0, 'accuracy': 1.0, 'spatial': 1.0}

    reward = 0.1 format + 0.2 count + 0.5 accuracy + 0.2 spatial
    gates: a malformed completion scores 0 in every term, a wrong answer 0 in the spatial term.
Options of `score_completion`, off by default and none of the paper's, add a relation term or change a rule.

A completion is well formed if it is <observe>..</observe> <scene>..</scene> <think>..</think>
<answer>..</answer>, each tag exactly once, in this order, only white space around the blocks, and if the
scene is one JSON object, not empty, with lists (absent = empty) of
    objects        {"id": "traffic_light.1", "bbox": [x1, y1, x2, y2]}, unique ids, finite numbers in pixels
                   of the original image, 0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H, no other keys;
    relationships  {"subject": id, "predicate": text, "object": id} between ids of these objects.
There, and given the same label similarity, every number equals the released code's to 1e-6.

Deviations from the released code:
  1. Tags out of order, stray text around the blocks and repeated closing tags are malformed (released:
     accepted). The policy is to look before it answers and to stop after it.
  2. NaN, Infinity and `true` are no coordinates (released: the first two crash the matcher, hence the run).
  3. x2 <= x1 or y2 <= y1 is malformed (released: an inverted box around the right centre earns half credit).
  4. A box over the image's edge is clipped to it, one wholly outside is malformed (released: not looked at).
  5. Relationships must join two declared objects by a predicate that is not empty, each once (released: any
     ids, any text, any number of times, so that empty claims fill the count term).
  6. Repeated JSON keys are malformed (released: the last one wins). What is shown is what is scored.
  7. The MAX_* below and the length of an id bound the work, far above what 2,048 tokens of scene can hold
     (released: one text of brackets, digits or 10,000 objects stalls or kills the run).
  8. The spatial term ends at 0 (released: CIoU of slim boxes far apart is below -1, and so the term below 0).
  9. A scene without an `objects` list has no objects (released: also, but count is 0 even if gold has none).
 10. The default label similarity is lexical (released: vectors of spaCy's en_core_web_md, which no package
     registry carries; see `spacy_similarity`). It decides what is matched, never what a match earns.
 11. Empty observe and think blocks are malformed (released: accepted, so that nothing need be looked at).
The paper differs from its code, with which the released checkpoints were trained: it has IoU in the matching
cost, averages raw CIoU over matched pairs only, and always splits the count term.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Real

import numpy as np

TERMS = ("reward", "format", "count", "accuracy", "spatial")
BLOCKS = ("observe", "scene", "think", "answer")
MAX_CHARS = 65_536  # of a completion; checked before anything else reads it
MAX_DEPTH = 32  # of JSON brackets; a scene needs 4, and the parser recurses once per level
MAX_OBJECTS = 256
MAX_RELATIONSHIPS = 1024
OBJECT_ID = re.compile(r"[A-Za-z_]{1,80}\.[0-9]{1,9}")
IMAGE_SIZE = re.compile(r"Image size: \(?(\d{1,6}) x (\d{1,6})\)?")
SIZE_TEXT = re.compile(r"\s*[(\[]?\s*(\d{1,6})\s*[x×X,]\s*(\d{1,6})\s*[)\]]?\s*")
MAX_SIDE = 1_000_000  # pixels, of an image and of a gold box: squares of it are far from overflow
EPS = 1e-7  # in CIoU's denominators, with boxes in units of the image
LABEL_COST, BOX_COST = 2.0, 1.0  # matching cost of 1 - label similarity and of 1 - (CIoU + 1) / 2

REJECTION_REASONS = (
    "not_text", "too_long", "missing_tag", "repeated_tag", "tag_order", "stray_text", "empty_block",
    "too_deep", "bad_json", "duplicate_key", "bad_scene",
    "too_many_objects", "bad_object", "bad_id", "duplicate_id", "bad_box", "box_outside",
    "too_many_relationships", "bad_relationship", "dangling_relationship",
    "self_relationship", "empty_predicate", "duplicate_relationship",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Weights of the terms, and of the two parts of the count term where gold has relationships.

    Raises: ValueError if one is negative or not finite, or if the terms or the parts add up to more than 1.
    """

    format: float = 0.1
    count: float = 0.2
    accuracy: float = 0.5
    spatial: float = 0.2
    relation: float = 0.0  # outside the paper's reward
    count_objects: float = 0.7
    count_relationships: float = 0.3

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
                raise ValueError(f"weight {f.name}: expected a finite number >= 0, got {value!r}")
        parts = ("count_objects", "count_relationships")
        for names in (*TERMS[1:], "relation"), parts:
            if (total := sum(getattr(self, name) for name in names)) > 1 + 1e-9:
                raise ValueError(f"weights: expected {' + '.join(names)} <= 1, got {total}")


@dataclass(frozen=True)
class Score:
    """What one completion earned and why; `score_completion` explains the terms."""

    reward: float = 0.0
    format: float = 0.0
    count: float = 0.0
    accuracy: float = 0.0
    spatial: float = 0.0
    reason: str | None = None  # one of REJECTION_REASONS, None if the completion is well formed
    matches: tuple[tuple[int, int, float, float], ...] = ()  # (predicted index, gold index, IoU, CIoU)
    relation: float = 0.0  # share of the gold relationships found


# ---- grammar: text -> blocks -> scene ----------------------------------------------------------------------
class _Rejected(ValueError):
    """A text breaks the grammar: one of REJECTION_REASONS, and what was expected and found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def _split(text: str, names: Sequence[str]) -> list[str]:
    """The texts inside the named blocks, if the text is these blocks in this order and nothing else."""
    if not isinstance(text, str):
        raise _Rejected("not_text", f"expected text, got {type(text).__name__}")
    if len(text) > MAX_CHARS:
        raise _Rejected("too_long", f"expected at most {MAX_CHARS} characters, got {len(text)}")
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    counts = {tag: text.count(tag) for tag in tags}
    if missing := [tag for tag in tags if counts[tag] == 0]:
        raise _Rejected("missing_tag", f"expected {missing[0]}, got {text[:40]!r}")
    if repeated := [tag for tag in tags if counts[tag] > 1]:
        raise _Rejected("repeated_tag", f"expected one {repeated[0]}, got {counts[repeated[0]]}")
    # From here each tag stands once, so that finding it is one pass. One regular expression for it all, with
    # `.*` between tags, would try every pair of tags in a text that is full of them.
    starts = [text.index(tag) for tag in tags]
    if starts != sorted(starts):
        raise _Rejected("tag_order", f"expected the order {' '.join(tags)}")
    ends = [start + len(tag) for start, tag in zip(starts, tags, strict=True)]
    gaps = [text[i:j] for i, j in zip([0, *ends[1::2]], [*starts[::2], None], strict=True)]
    if stray := "".join(gaps).strip():
        raise _Rejected("stray_text", f"expected white space around the blocks, got {stray[:40]!r}")
    blocks = [text[i:j] for i, j in zip(ends[::2], starts[1::2], strict=True)]
    for name, block in zip(names, blocks, strict=True):
        if name in ("observe", "think") and _is_empty(block):
            raise _Rejected("empty_block", f"expected words in <{name}>, got {block[:40]!r}")
    return blocks


def _is_empty(text: str) -> bool:
    return not any(c.isprintable() and not c.isspace() for c in text)  # `strip` leaves zero-width blanks


def _last_block(text: str, name: str) -> str | None:
    """The text inside the last <name>..</name> that encloses neither of its own tags, or None. Linear."""
    # Cut at the closing tags first: each piece is then searched once, for the last opening tag in it alone.
    for part in reversed(text.split(f"</{name}>")[:-1]):
        before, opening, inside = part.rpartition(f"<{name}>")
        if opening:
            return inside
    return None


def extract_answer(text: str) -> str:
    """The stripped text of the last complete <answer> block, or "". Never raises.

    Only the last MAX_CHARS characters are read.

    >>> extract_answer("<think>First <answer>A</answer>? No.</think> <answer> (B) left </answer> Done.")
    '(B) left'
    """
    return (_last_block(text[-MAX_CHARS:], "answer") or "").strip() if isinstance(text, str) else ""


def _unique_keys(pairs: list[tuple]) -> dict:
    d = dict(pairs)
    if len(d) != len(pairs):
        raise _Rejected("duplicate_key", f"expected unique keys, got {[key[:40] for key, _ in pairs][:8]}")
    return d


def _no_constant(name: str):
    raise _Rejected("bad_json", f"expected JSON, got {name}")


# A long integer becomes a float: Python refuses to read more than 4,300 digits, and 10**400 fits no float.
_JSON = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_constant=_no_constant,
    parse_int=lambda digits: int(digits) if len(digits) < 17 else float(digits),
)
_JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # optional closing quote: never backtracks
_BRACKET = re.compile(r"[\[\]{}]")


def _load_json(text: str):
    # Counted before the parser, which recurses, sees the text. Brackets inside strings are no nesting.
    depth = 0
    for bracket in _BRACKET.findall(_JSON_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise _Rejected("too_deep", f"expected at most {MAX_DEPTH} nested brackets")
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise _Rejected("bad_json", f"expected JSON, got {text[:40]!r}: {error}") from None


def _check_object(o) -> None:
    if not isinstance(o, dict) or o.keys() != {"id", "bbox"}:
        raise _Rejected("bad_object", f"expected an object with exactly id and bbox, got {str(o)[:80]}")
    name, box = o["id"], o["bbox"]
    if not isinstance(name, str) or not OBJECT_ID.fullmatch(name):
        raise _Rejected("bad_id", f"expected an id like traffic_light.1, got {str(name)[:80]!r}")
    # type(), because isinstance(True, int).
    if not isinstance(box, list) or len(box) != 4 or not all(type(c) in (int, float) for c in box):
        raise _Rejected("bad_box", f"expected four numbers, got {name} {str(box)[:80]}")
    if not all(map(math.isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
        raise _Rejected("bad_box", f"expected finite x1 < x2 and y1 < y2, got {name} {box}")


def _check_relationship(r) -> tuple[str, str, str]:
    """-> the ids at its ends, and the predicate between them without case and runs of blanks."""
    words = [r.get(key) for key in ("subject", "predicate", "object")] if isinstance(r, dict) else [None]
    if not all(isinstance(word, str) for word in words):
        raise _Rejected("bad_relationship", f"expected subject, predicate and object, got {str(r)[:80]}")
    ends = words[0], words[2]
    if not all(map(OBJECT_ID.fullmatch, ends)):
        raise _Rejected("bad_relationship", f"expected ids like cup.1 at both ends, got {str(r)[:80]}")
    return *ends, " ".join(_clean(words[1]).split())


def _parse(text: str, closed: bool = True) -> dict:
    """Scene JSON -> {"objects": [..], "relationships": [..]}. Closed: relationships are those of a reply."""
    scene = _load_json(text.strip())
    if not isinstance(scene, dict) or not scene:
        raise _Rejected("bad_scene", f"expected a JSON object with objects, got {text[:40]!r}")
    objects, relationships = scene.get("objects", []), scene.get("relationships", [])
    if not isinstance(objects, list) or not isinstance(relationships, list):
        raise _Rejected("bad_scene", "expected `objects` and `relationships` to be lists")
    if (n := len(objects)) > MAX_OBJECTS:
        raise _Rejected("too_many_objects", f"expected at most {MAX_OBJECTS}, got {n}")
    if (n := len(relationships)) > MAX_RELATIONSHIPS:
        raise _Rejected("too_many_relationships", f"expected at most {MAX_RELATIONSHIPS}, got {n}")
    ids = set()
    for o in objects:
        _check_object(o)
        if o["id"] in ids:
            raise _Rejected("duplicate_id", f"expected unique ids, got {o['id']} twice")
        ids.add(o["id"])
    triplets = [_check_relationship(r) for r in relationships]
    for subject, object_, predicate in triplets if closed else ():
        if not ids.issuperset((subject, object_)):
            raise _Rejected("dangling_relationship", f"expected declared objects, got {(subject, object_)}")
        if subject == object_:
            raise _Rejected("self_relationship", f"expected two objects, got {subject} twice")
        if _is_empty(predicate):
            raise _Rejected("empty_predicate", f"expected a predicate, got {predicate[:40]!r}")
    if closed and len(set(triplets)) < len(triplets):
        raise _Rejected("duplicate_relationship", "expected each relationship once")
    return {"objects": objects, "relationships": relationships}


def parse_scene(text: str) -> dict | None:
    """The scene graph in a text, or None if there is none that follows the grammar. Never raises.

    Args: text, whose last complete <scene> block counts, or which is itself the JSON.
    Returns: {"objects": [{"id", "bbox"}], "relationships": [{"subject", "predicate", "object"}]}, boxes as
    written, in pixels. The image's size is not known here: boxes may lie outside.

    >>> parse_scene('<scene>{"objects": [{"id": "cup.1", "bbox": [0, 0, 5, 9]}]}</scene>')
    {'objects': [{'id': 'cup.1', 'bbox': [0, 0, 5, 9]}], 'relationships': []}
    >>> parse_scene('{"objects": [{"id": "cup.1", "bbox": [0, 0, 5, NaN]}]}') is None
    True
    """
    found = scene_or_fault(text)
    return found if isinstance(found, dict) else None


def scene_or_fault(text: str) -> dict | str:
    """What `parse_scene` returns; where that is None, why: one of REJECTION_REASONS and what was expected."""
    try:
        if not isinstance(text, str) or len(text) > MAX_CHARS:
            raise _Rejected("too_long", f"expected text of at most {MAX_CHARS} characters")
        if (block := _last_block(text, "scene")) is None and not text.lstrip().startswith("{"):
            raise _Rejected("missing_tag", "expected <scene>...</scene>, got none that is closed")
        return _parse(text if block is None else block)
    except _Rejected as error:
        return f"{error.reason}: {error}"


def parse_ground_truth(ground_truth: str) -> tuple[dict, str]:
    r"""(scene as from `parse_scene`, answer) of "<scene>{json}</scene>\n<answer>(C) holding</answer>".

    Gold relationships may repeat, or name objects that were filtered out: only their number is scored.
    Raises: ValueError that says what is wrong.
    """
    try:
        scene_text, answer = _split(ground_truth, ("scene", "answer"))
        scene = _parse(scene_text, closed=False)
    except _Rejected as error:
        raise ValueError(f"ground truth: {error}") from None
    if not answer.strip():
        raise ValueError("ground truth: expected an answer, got an empty <answer> block")
    return scene, answer.strip()


# ---- label similarity --------------------------------------------------------------------------------------
_IRREGULAR = {"person": "people", "child": "children", "foot": "feet", "tooth": "teeth", "mouse": "mice",
              "goose": "geese"}  # fmt: skip
_PLURAL_ENDINGS = (("", "s"), ("", "es"), ("y", "ies"), ("f", "ves"), ("fe", "ves"), ("man", "men"))


def _clean(label: str) -> str:
    return label.replace("_", " ").replace("-", " ").strip().lower()


def _is_plural(plural: str, word: str) -> bool:
    regular = (word.removesuffix(end) + new for end, new in _PLURAL_ENDINGS if word.endswith(end))
    return plural == _IRREGULAR.get(word) or plural in regular


def _same_noun(a: str, b: str) -> bool:
    return a == b or _is_plural(a, b) or _is_plural(b, a)


@lru_cache(maxsize=65_536)  # a data set has few labels and pairs them M x K times a completion; ids are short
def label_similarity(a: str, b: str) -> float:
    """How alike two object labels are by their letters, in [0, 1]. Symmetric.

    1.0 for the same label up to case, `_`, `-`, spaces and a plural ending. With a common head (last) word
    the overlap of words, 2 * common / (words in a + words in b). Otherwise unrelated: 0.0.

    >>> label_similarity("Traffic_Light", "traffic lights"), label_similarity("light", "bench")
    (1.0, 0.0)
    >>> round(label_similarity("traffic light", "light"), 3)
    0.667
    """
    words_a, words_b = _clean(a).split(), _clean(b).split()
    if not words_a or not words_b:
        return float(words_a == words_b)
    if _same_noun("".join(words_a), "".join(words_b)):
        return 1.0
    if not _same_noun(words_a[-1], words_b[-1]):
        return 0.0
    rest_a, rest_b = set(words_a[:-1]), set(words_b[:-1])
    return 2 * (1 + len(rest_a & rest_b)) / (2 + len(rest_a) + len(rest_b))


def spacy_similarity(model_name: str = "en_core_web_md") -> Callable[[str, str], float]:
    """The released label similarity: cosine of the labels' vectors in an installed spaCy model."""
    import spacy

    nlp = spacy.load(model_name, disable=["parser", "ner", "tagger"])
    doc = lru_cache(maxsize=4096)(lambda label: nlp(_clean(label)))
    return lru_cache(maxsize=65_536)(lambda a, b: float(doc(a).similarity(doc(b))))


# ---- boxes and matching ------------------------------------------------------------------------------------
def _iou_ciou(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and CIoU of every pair of xyxy boxes: (M, 4), (K, 4) -> (M, K), (M, K)."""
    ax1, ay1, ax2, ay2 = a.T[:, :, None]  # (M, 1) each
    bx1, by1, bx2, by2 = b.T[:, None, :]  # (1, K) each
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    inter_w = np.minimum(ax2, bx2) - np.maximum(ax1, bx1)  # (M, K)
    inter_h = np.minimum(ay2, by2) - np.maximum(ay1, by1)
    inter = np.maximum(inter_w, 0) * np.maximum(inter_h, 0)
    iou = inter / (aw * ah + bw * bh - inter + EPS)
    hull_w = np.maximum(ax2, bx2) - np.minimum(ax1, bx1)
    hull_h = np.maximum(ay2, by2) - np.minimum(ay1, by1)
    centres = ((ax1 + ax2 - bx1 - bx2) ** 2 + (ay1 + ay2 - by1 - by2) ** 2) / 4
    v = 4 / math.pi**2 * (np.arctan(aw / (ah + EPS)) - np.arctan(bw / (bh + EPS))) ** 2
    alpha_v = v * v / np.maximum(1 - iou + v, EPS**2)
    return iou, iou - centres / (hull_w**2 + hull_h**2 + EPS) - alpha_v


def ciou(box_a: Sequence[float], box_b: Sequence[float]) -> float:
    """Complete IoU of two xyxy boxes, in [-1, 1]: IoU less centre distance less aspect mismatch. Symmetric.

    arXiv:1911.08287, eq. 8-11. The aspect term depends on the unit of each axis: the reward divides x by W
    and y by H. Slim boxes far apart reach down to -1.5: cut to -1 here, but not in the reward's mean.
    Raises: ValueError unless both are four finite numbers with x1 <= x2 and y1 <= y2.

    >>> round(ciou((0, 0, 2, 2), (1, 0, 3, 2)), 4)  # IoU 2/6, centres 1 apart, diagonal^2 of the hull 13
    0.2564
    """
    a, b = (np.array([box], dtype=float) for box in (box_a, box_b))  # (1, 4) each
    for box in (a, b):
        if box.shape != (1, 4) or not np.isfinite(box).all() or (box[:, 2:] < box[:, :2]).any():
            raise ValueError(f"box: expected four finite numbers, x1 <= x2 and y1 <= y2, got {box.tolist()}")
    return max(-1.0, float(_iou_ciou(a, b)[1][0, 0]))


@dataclass(frozen=True)
class _Objects:
    labels: tuple[str, ...]  # (K,) without .N
    boxes01: np.ndarray  # (K, 4) xyxy in units of the image


def _place(scene: dict, width: float, height: float, clip: bool) -> _Objects:
    """The objects in units of the image; every box must show in it."""
    boxes01 = []
    for o in scene["objects"]:
        x1, y1, x2, y2 = o["bbox"]
        if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
            frame = f"the image ({width:g} x {height:g})"
            raise _Rejected("box_outside", f"expected boxes that show in {frame}, got {o['id']} {o['bbox']}")
        if clip:
            x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        boxes01.append((x1 / width, y1 / height, x2 / width, y2 / height))
    labels = tuple(_clean(o["id"].partition(".")[0]) for o in scene["objects"])
    return _Objects(labels, np.array(boxes01, dtype=float).reshape(-1, 4))


def _match(predicted: _Objects, gold: _Objects, similarity) -> tuple[tuple, list[float]]:
    """Hungarian matching of M predicted with K gold objects: min(M, K) of (predicted, gold, IoU, CIoU).

    Returns: (these, the label similarity of each).
    """
    from scipy.optimize import linear_sum_assignment  # here, because it takes longer to import than all else

    iou, quality = _iou_ciou(predicted.boxes01, gold.boxes01)  # (M, K)
    # An unlike label costs up to 2, a distant box about 1 (CIoU = -1): objects meet under their names first,
    # and of equal names the nearest. No pair is forbidden: all min(M, K) are matched, however badly.
    alike = [[similarity(p, g) for g in gold.labels] for p in predicted.labels]
    alike = np.nan_to_num(np.array(alike, dtype=float), nan=0, posinf=0, neginf=0)  # of a made-up word, say
    pairs = zip(*linear_sum_assignment(LABEL_COST * (1 - alike) + BOX_COST * (1 - quality) / 2), strict=True)
    found = [(int(i), int(j), float(iou[i, j]), float(quality[i, j])) for i, j in pairs]
    return tuple(found), [alike[i, j] for i, j, *_ in found]


# ---- reward ------------------------------------------------------------------------------------------------
@lru_cache(maxsize=4096)  # the G completions of a prompt share their gold
def _gold(ground_truth: str, width: float, height: float) -> tuple[_Objects, int, set, str]:
    """-> (objects, number of relationships, _triples, answer in lower case)."""
    scene, answer = parse_ground_truth(ground_truth)
    for o in scene["objects"]:
        if max(map(abs, o["bbox"])) > MAX_SIDE:
            raise ValueError(f"ground truth: expected pixels up to {MAX_SIDE}, got {o['id']} {o['bbox']}")
    try:
        objects = _place(scene, width, height, clip=False)
    except _Rejected as error:
        raise ValueError(f"ground truth: {error}") from None
    return objects, len(scene["relationships"]), _triples(scene), answer.lower()


def _check_size(image_size) -> tuple[float, float]:
    sides = image_size if isinstance(image_size, (tuple, list, np.ndarray)) else ()
    known = [
        isinstance(side, Real) and not isinstance(side, bool) and 1 <= side <= MAX_SIDE for side in sides
    ]
    if known != [True, True]:
        expected = f"expected (width, height) in pixels, from 1 to {MAX_SIDE}"
        raise ValueError(f"image_size: {expected}, got {_shown(image_size)}")
    return float(sides[0]), float(sides[1])


def _shown(value) -> str:
    try:
        return " ".join(repr(value).split())[:80]
    except ValueError:  # Python does not print an integer of more than 4,300 digits
        return "a huge number"


BOX_FRAMES = ("pixel", "per_mille")  # of boxes in replies; gold boxes are in pixels of the original image


def in_pixels(scene: dict, box_frame: str, image_size: tuple[float, float]) -> dict:
    """A reply's scene with boxes in pixels of the original image, from the frame that its prompt asked for.

    Args: box_frame: "pixel", or "per_mille": thousandths of the image's width and height.
    >>> in_pixels({"objects": [{"id": "cup.1", "bbox": [0, 500, 999, 1000]}]}, "per_mille", (640, 300))
    {'objects': [{'id': 'cup.1', 'bbox': [0.0, 150.0, 639.36, 300.0]}]}
    """
    if box_frame not in BOX_FRAMES:
        raise ValueError(f"box_frame: expected one of {BOX_FRAMES}, got {box_frame!r}")
    if box_frame == "pixel":
        return scene
    sides = [*image_size, *image_size]
    moved = [[x * side / 1000 for x, side in zip(o["bbox"], sides, strict=True)] for o in scene["objects"]]
    return scene | {"objects": [o | {"bbox": b} for o, b in zip(scene["objects"], moved, strict=True)]}


def in_per_mille(ground_truth: str, image_size: tuple[int, int]) -> str:
    """A gold text with its boxes as a reply writes them with box_frame "per_mille": to imitate, not to score.

    Rounded, and at least 1 wide and high. Raises: ValueError, as `parse_ground_truth`.
    """
    scene, answer = parse_ground_truth(ground_truth)
    for o in scene["objects"]:
        lows, highs = (
            [min(max(round(1000 * x / side), 0), 1000) for x, side in zip(corner, image_size, strict=True)]
            for corner in (o["bbox"][:2], o["bbox"][2:])
        )
        lows = [min(low, 999) for low in lows]
        o["bbox"] = lows + [max(high, low + 1) for low, high in zip(lows, highs, strict=True)]
    return f"<scene>{json.dumps(scene)}</scene>\n<answer>{answer}</answer>"


def _triples(scene: dict) -> set[tuple[int, str, int]]:
    """(subject's index, predicate, object's index) of relationships between two objects of the scene."""
    index = {o["id"]: i for i, o in enumerate(scene["objects"])}
    named = (_check_relationship(r) for r in scene["relationships"])
    return {(index[s], p, index[o]) for s, o, p in named if s != o and s in index and o in index and p}


def _found(triples: set, partner: dict[int, int], wanted: set) -> float:
    """Share of the wanted triples. A pair with more predicates than gold has for it earns less for each, and
    so does a relation that is stated the other way round as well: who states both knows none."""
    claims = {(partner.get(s), predicate, partner.get(o)) for s, predicate, o in triples}
    said, held = (Counter((s, o) for s, _, o in of) for of in (claims, wanted))
    for s, predicate, o in claims - wanted:
        said[o, s] += (o, predicate, s) in claims & wanted
    return sum(min(1.0, held[s, o] / said[s, o]) for s, _, o in claims & wanted) / len(wanted)


BOX_CREDITS = {  # what a matched pair earns, of its IoU and CIoU; "ciou" pays a box put blindly about half
    "ciou": lambda iou, quality: (quality + 1) / 2,
    "positive_ciou": lambda iou, quality: max(quality, 0.0),
    "iou50": lambda iou, quality: iou if iou >= 0.5 else 0.0,
}


def _closeness(n: int, gold: int) -> float:
    return max(0.0, 1 - abs(n - gold) / max(gold, 1))


def score_completion(
    completion: str,
    ground_truth: str,
    image_size: tuple[int, int],
    *,
    weights: Weights = Weights(),
    similarity: Callable[[str, str], float] = label_similarity,
    box_frame: str = "pixel",
    gate: bool = True,
    box_credit: str = "ciou",
    need_label: bool = False,
    judge: Callable[[str], bool] | None = None,
) -> Score:
    r"""The gated reward of one completion, with the reason of a rejection and the matched objects.

    Args:
        completion: what the model wrote. Untrusted: nothing in it raises, and it costs bounded time.
        ground_truth: "<scene>{json}</scene>\n<answer>(C) holding</answer>", boxes in pixels.
        image_size: (W, H) in pixels of the image that the gold boxes refer to.
        weights: of the terms in the reward.
        similarity: (predicted label, gold label) -> [0, 1], of lower-case labels without `.N`, `_` as spaces.
            It steers the matching only. A negative cosine is taken as it is, NaN and inf as 0.
        box_frame: of the completion's boxes, as for `in_pixels`.
        gate, box_credit, need_label, judge: other than the defaults, a reward that the paper does not have.
            gate=False: a wrong answer keeps its spatial and relation terms. box_credit: one of BOX_CREDITS,
            instead of (CIoU + 1) / 2. need_label: a pair of labels of similarity 0 or less earns nothing.
            judge: completion -> whether its answer is right, instead of text equality.
    Returns: Score. Its terms are unweighted, in [0, 1] and gated:
        format    1 if the completion is well formed; else all terms are 0 and `reason` says why.
        count     max(0, 1 - |M - K| / max(K, 1)) for M predicted and K gold objects; if gold has
                  relationships, 0.7 times that plus 0.3 times the same for relationships.
        accuracy  1 if the answer is the gold answer, up to case and surrounding white space.
        spatial   0 if the answer is wrong; else the sum of (CIoU + 1) / 2 over matched pairs, divided by K.
                  If K is 0: 1 if nothing is predicted (and gold has no relationships), else 0.
        relation  0 if the answer is wrong; else the share of gold's distinct relationships (between two of
                  its objects) that the completion has, with the same predicate up to case, `_`, `-` and
                  spaces, between objects matched with theirs under labels of similarity above 0. Where a pair
                  has n predicates and gold m < n, each right one counts for m / n; one that is stated the
                  other way round as well, and is not so in gold, adds to n. If gold has none: 1 if none is
                  predicted, else 0. Weighs nothing by default.
    `matches` is filled whenever the format is right and both scenes have objects, whatever the answer.
    Raises: ValueError on bad ground truth or image size.
    """
    width, height = _check_size(image_size)
    if box_credit not in BOX_CREDITS:
        raise ValueError(f"box_credit: expected one of {tuple(BOX_CREDITS)}, got {box_credit!r}")
    if not isinstance(ground_truth, str):
        raise ValueError(f"ground truth: expected text, got {type(ground_truth).__name__}")
    gold, n_gold, wanted, gold_answer = _gold(ground_truth, width, height)
    try:
        _, scene_text, _, answer = _split(completion, BLOCKS)
        scene = in_pixels(_parse(scene_text), box_frame, (width, height))
        predicted = _place(scene, width, height, clip=True)
    except _Rejected as error:
        return Score(reason=error.reason)

    m, k = len(predicted.labels), len(gold.labels)
    count = _closeness(m, k)
    if n_gold:
        count_relationships = _closeness(len(scene["relationships"]), n_gold)
        count = weights.count_objects * count + weights.count_relationships * count_relationships
    right = judge(completion) if judge else answer.strip().lower() == gold_answer
    accuracy = float(bool(right))
    matches, similar = _match(predicted, gold, similarity) if m and k else ((), [])
    alike = [pair for pair, value in zip(matches, similar, strict=True) if value > 0]
    if k:
        credit, paid = BOX_CREDITS[box_credit], alike if need_label else matches
        spatial = max(0.0, sum(credit(iou, quality) for *_, iou, quality in paid) / k)
    else:
        spatial = float(m == 0 and not n_gold)
    partner = {i: j for i, j, *_ in alike}
    triples = _triples(scene)
    relation = _found(triples, partner, wanted) if wanted else float(not triples)
    if gate:
        spatial, relation = accuracy * spatial, accuracy * relation
    reward = weights.format + weights.count * count + weights.accuracy * accuracy
    reward += weights.spatial * spatial + weights.relation * relation
    return Score(min(1.0, reward), 1.0, min(1.0, count), accuracy, spatial, None, matches, relation)


def spatial_reward(
    completion: str,
    ground_truth: str,
    image_size: tuple[int, int],
    *,
    weights: Weights = Weights(),
    similarity: Callable[[str, str], float] = label_similarity,
) -> dict[str, float]:
    """`score_completion` as {"reward", "format", "count", "accuracy", "spatial"}, each in [0, 1].

    The terms are unweighted and gated: `spatial` is 0 if the answer is wrong, all are 0 if the format is.
    """
    score = score_completion(completion, ground_truth, image_size, weights=weights, similarity=similarity)
    return {term: getattr(score, term) for term in TERMS}


def vanilla_reward(completion: str, ground_truth: str) -> dict[str, float]:
    """The sparse baseline, ungated: 0.5 accuracy + 0.5 format, as {"reward", "format", "accuracy"}.

    Format is <think>..</think> <answer>..</answer>, each tag once, and nothing else. Accuracy reads the last
    complete <answer> block whatever the format. `ground_truth`: as for `spatial_reward`, or the answer alone.
    Raises: ValueError without a gold answer.

    >>> vanilla_reward("It is <answer>(b) Left</answer>", "(B) left")
    {'reward': 0.5, 'format': 0.0, 'accuracy': 1.0}
    """
    gold = (extract_answer(ground_truth) or ground_truth.strip()) if isinstance(ground_truth, str) else ""
    if not gold:
        raise ValueError(f"ground truth: expected an answer, got {_shown(ground_truth)}")
    try:
        well_formed = float(len(_split(completion, ("think", "answer"))) == 2)
    except _Rejected:
        well_formed = 0.0
    accuracy = float(extract_answer(completion).lower() == gold.lower())
    return {"reward": 0.5 * accuracy + 0.5 * well_formed, "format": well_formed, "accuracy": accuracy}


# ---- adapters ----------------------------------------------------------------------------------------------
# Let the trainer decode completions without special tokens: a trailing <|im_end|> is stray text.
def _plain(value, read_json: bool = False):
    """Python's own form of a value out of a numpy, torch or arrow column, or of an object written in JSON."""
    if read_json and isinstance(value, str) and value.lstrip().startswith("{"):
        return _load_json(value)
    methods = (getattr(value, name, None) for name in ("as_py", "to_pylist", "tolist"))
    return next((method() for method in methods if method), value)


def _text(message) -> str:
    """The text of a string, a chat message, a content part, or a list of these."""
    message = _plain(message)
    if isinstance(message, dict):
        message = _plain(message.get("content", message.get("text")))
    if isinstance(message, (list, tuple)):
        return "".join(map(_text, message))
    return message if isinstance(message, str) else ""


def _is_missing(value) -> bool:
    return not isinstance(value, (dict, list, tuple)) and str(value).strip() in ("", "None", "nan", "<NA>")


def _gold_text(gold) -> str:
    """The gold text, which may come as {"scene": .., "answer": ..}."""
    gold = _plain(_plain(gold), read_json=True)
    if isinstance(gold, dict):
        scene = gold.get("scene")
        scene = scene if isinstance(scene, str) else json.dumps(scene, default=_plain)
        return f"<scene>{scene}</scene><answer>{_text(gold.get('answer'))}</answer>"
    if not isinstance(gold, str):
        raise ValueError(f"ground truth: expected text, got {_shown(gold)}")
    return gold


def _find_size(row: dict, *texts):
    """(W, H): the row's `image_size`, else "Image size: (W x H)" in a text, else its image's size."""
    size = _plain(row.get("image_size"))
    if not _is_missing(size):
        found = SIZE_TEXT.fullmatch(size) if isinstance(size, str) else None
        size = (size.get("width"), size.get("height")) if isinstance(size, dict) else size
        return (int(found[1]), int(found[2])) if found else size
    for text in texts:
        if found := IMAGE_SIZE.search(_text(text)):
            return int(found[1]), int(found[2])
    image = row.get("images") if row.get("image") is None else row["image"]
    if isinstance(image, (list, tuple)) or len(getattr(image, "shape", ())) in (1, 4):
        image = next(iter(image), None)  # the first of the row's images
    if shape := getattr(image, "shape", None):  # an array's: channels last, or first
        size = tuple(shape if shape[-1] > 4 else shape[:-1])[:-3:-1]
    else:
        size = getattr(image, "size", None)
    if not isinstance(size, tuple):
        raise ValueError(f"expected image_size, 'Image size: (W x H)' or an image, got {sorted(row)}")
    return size


def _score_row(where: str, completion, gold, row: dict, *texts) -> dict[str, float]:
    """`spatial_reward` of one row of a trainer's batch; its errors name the row."""
    try:
        gold = _gold_text(gold)
        size = _find_size(row, *texts, gold)
        return spatial_reward(_text(completion), IMAGE_SIZE.sub("", gold, count=1), size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def trl_spatial_reward(completions, answer_option_text, prompts=None, log_metric=None, **columns):
    """Reward function for TRL: `GRPOTrainer(reward_funcs=trl_spatial_reward, ...)`, with STVQA-7K's columns.

    Args: N completions (texts or chat messages) and their gold texts. The image's size comes from a column
    `image_size`, or is stated in `problem` or the prompt, or is that of the image in `image` or `images`.
    Returns: N rewards; None where the gold is None, NaN or blank, which TRL takes for "not by this function".
    """
    n, scores = len(completions), []
    columns = {name: c for name, c in columns.items() if not isinstance(c, (str, dict))}
    columns = {name: list(c) for name, c in columns.items() if hasattr(c, "__len__") and len(c) == n}
    for i, (completion, gold) in enumerate(zip(completions, answer_option_text, strict=True)):
        row = {name: column[i] for name, column in columns.items()}
        texts = row.get("problem"), None if prompts is None else prompts[i]
        skipped = _is_missing(_plain(gold))
        scores.append(None if skipped else _score_row(f"row {i}", completion, gold, row, *texts))
    scored = [score for score in scores if score]
    for term in TERMS[1:] if log_metric and scored else ():
        log_metric(f"spatial_reward/{term}", sum(score[term] for score in scored) / len(scored))
    return [score and score["reward"] for score in scores]


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_) -> dict[str, float]:
    """Reward function for verl: `custom_reward_function.path=rewards.py` (its default name is compute_score).

    The image's size is `image_size` in extra_info, or is stated in its `problem` or `question`, or stands as
    "Image size: (W x H)" before the gold text. Returns `score` and the terms, which verl logs.
    """
    row = _plain(extra_info, read_json=True)
    row = row if isinstance(row, dict) else {}
    where = f"{data_source}, row {row.get('index', 'without an index')}"
    terms = _score_row(where, solution_str, ground_truth, row, row.get("problem"), row.get("question"))
    return {"score": terms.pop("reward"), **terms}  # verl keeps a metric `reward` of its own


def compute_score_batch(reward_inputs, **_) -> list[dict[str, float]]:
    """Reward function for EasyR1: `worker.reward.reward_function=rewards.py:compute_score_batch`, type batch.

    EasyR1 passes `response`, `response_length` and `ground_truth` only: let the answer column begin with
    "Image size: (W x H)", before the gold text. Returns `overall` and the terms, which EasyR1 logs.
    """
    results = []
    for i, row in enumerate(reward_inputs):
        if lacking := {"response", "ground_truth"} - row.keys():
            raise ValueError(f"row {i}: expected response and ground_truth, missing {sorted(lacking)}")
        terms = _score_row(f"row {i}", row["response"], row["ground_truth"], row)
        results.append({"overall": terms.pop("reward"), **terms})
    return results
