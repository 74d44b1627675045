"""Questions by rule: what a scene graph proves, asked with answers that are true and options that are not.

`candidates` gives every question that the rules can ask of one graph; which of them enter a data set is
decided where the whole set is known (selection.py).

What a rule takes for granted: every thing that a question or an option names is the only one in its image
that could be meant by the name, and every wrong option is proved false: by a triple that excludes it, by
boxes with a margin, or by absence where all instances have boxes. Where truth depends on the view, the
question says "in the image" or "looks". Options never stand in the question, and the set of options does not
tell which is right: all four directions, all four corners, a block of numbers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import permutations
from math import acos, degrees, hypot
from typing import NamedTuple

from names import CLOTHING, PERSON, PREDICATES, STUFF, article, confusable, head, plural
from names import predicate as canonical
from scenes import (
    SceneGraph,
    SceneObject,
    area,
    centre,
    could_be_called,
    diagonal,
    gap,
    iou,
    is_nameable,
    overlap_share,
    unique,
)

CATEGORIES = (
    "relation", "reach", "size", "orientation", "instance_location", "depth", "distance", "count",
    "existence",
)  # fmt: skip
LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True, slots=True)
class Question:
    """A question with one right answer, before its options are put in order."""

    key: str  # of image, form, objects, answer: the same in every run
    image_id: str
    category: str  # one of CATEGORIES
    form: str  # how it is asked: one of FORMS
    topic: str  # what it asks about, for balance: a predicate, a label
    text: str
    answer: str
    wrong: tuple[str, ...]  # the other options, each proved false
    objects: tuple[str, ...]  # ids of what question, options and answer name, in their order: the gold scene
    relationships: tuple[tuple[str, str, str], ...]  # (id, predicate, id): the facts behind the answer
    level: str  # one of LEVELS
    rating: int  # 1..10
    fact: str  # why the answer is true, for a reader: "gap 34 px of at least 12.8 px"
    writer: str = "rules"


# {form: (category, phrasings)}. {a}, {b}: names of objects; {many}: a plural; {verb}: a predicate as a verb.
FORMS = {
    "relation/triple": ("relation", (
        "Where is the {a} with respect to the {b}?",
        "Where is the {a} in relation to the {b}?",
        "How is the {a} placed relative to the {b}?",
    )),
    "relation/image": ("relation", (
        "In the image, where is the {a} relative to the {b}?",
        "Where does the {a} appear in the image relative to the {b}?",
        "As the viewer sees it, where in the image is the {a} relative to the {b}?",
    )),  # options: left of, right of, above, below
    "reach/what": ("reach", ("What is the {a} {verb}?",)),
    "reach/how": ("reach", ("What is the {a} doing with the {b}?",)),
    "size/largest": ("size", ("Which of these looks largest in the image?",
                              "Which of these appears largest in the image?")),
    "size/smallest": ("size", ("Which of these looks smallest in the image?",
                               "Which of these appears smallest in the image?")),
    "size/tallest": ("size", ("Which of these looks tallest in the image?",)),
    "orientation/gaze": ("orientation", ("What is the {a} {verb}?",)),
    "location/quadrant": ("instance_location", ("In which part of the image is the {a}?",
                                                "Where in the image is the {a}?")),
    "location/cell": ("instance_location", ("In which of three by three parts of the image is the {a}?",
                                            "Where in the image, in three by three parts, is the {a}?")),
    "depth/nearer": ("depth", ("Which of these is closer to the camera?",
                               "Which of these is nearer to the viewer?")),
    "depth/farther": ("depth", ("Which of these is farther from the camera?",
                                "Which of these is farther from the viewer?")),
    "distance/image": ("distance", ("In the image, which of these is closest to the {a}?",
                                    "Which of these appears closest to the {a} in the image?")),
    "count/label": ("count", ("How many {many} are there in the image?",
                              "How many {many} does the image show?")),
    "count/voted": ("count", ("How many {many} can you see in the image?",)),
    "existence/label": ("existence", ("Is there {a} in the image?", "Does the image show {a}?")),
    "existence/triple": ("existence", ("Is the {a} {verb} the {b} in the image?",
                                       "In the image, is the {a} {verb} the {b}?")),
}  # fmt: skip


# ---- what is true of a pair --------------------------------------------------------------------------------
POSTURES = ("sitting on", "standing on", "lying on", "parked on", "walking on", "running on")
UPON = ("on", "on top of", *POSTURES)
BELOW = ("under", "below")
# {asserted: what is then false}. Never near, next to, at, against, in front of or behind: they may all hold.
EXCLUDES = (
    dict.fromkeys(UPON, ("under", "below", "inside", "hanging from"))
    | dict.fromkeys(BELOW, ("on top of", "above", "inside"))
    | dict.fromkeys(("in", "inside"), ("under", "above", "outside"))
    | dict.fromkeys(("above", "over"), ("under", "below", "inside"))
    | {"behind": ("in front of", "inside", "on top of"), "in front of": ("behind", "inside", "on top of"),
       "next to": ("inside", "on top of", "under"), "riding": ("under", "below", "inside")}
)  # fmt: skip
DIRECTIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HANDS = ("holding", "carrying", "lifting", "touching", "using", "eating", "drinking")
REACH = (*HANDS, "riding", "kicking", "throwing", "pushing", "pulling", "hugging")
# Deeds that are not done to the same thing at the same time, each of which is often done to such things.
OTHER_DEEDS = (
    (("throwing", "kicking", "carrying"), frozenset("ball football frisbee".split())),
    (("riding", "carrying", "throwing"), frozenset("surfboard skateboard snowboard".split())),
)
# {deed: what it may be done to}: an option that nobody could ride gives away what is ridden.
DONE_TO = {
    "riding": "horse pony donkey elephant camel bike bicycle motorcycle scooter skateboard surfboard "
    "snowboard boat bus train carriage wagon",
    "eating": "pizza sandwich hot dog cake donut apple banana orange carrot grass leaf fruit food hay bread",
    "drinking": "coffee tea water beer wine juice milk soda",
    "throwing": "ball football frisbee rock stick",
    "kicking": "ball football can bottle box",
    "pushing": "cart stroller wheelchair bike bicycle motorcycle suitcase wagon chair",
    "pulling": "cart carriage wagon suitcase sled boat trailer",
    "hugging": "person man woman boy girl child baby dog cat bear pillow",
}
DONE_TO = {deed: frozenset(things.split()) for deed, things in DONE_TO.items()}
# What nobody has in hand: as an option it would give the answer away.
HEAVY = frozenset(
    "car truck bus van train plane airplane boat ship motorcycle bike bicycle tree bush house tower "
    "bridge table desk couch sofa bed bench chair refrigerator stove oven sink toilet bathtub counter "
    "cabinet dresser shelf stairs door tent pole post vehicle statue fountain monument hydrant meter".split()
)
# Looked at from above or lying: nobody calls them tall.
FLAT = frozenset(
    "keyboard pad paper book notebook note envelope rug mat carpet plate tray cd mouse phone telephone "
    "pizza pillow blanket towel napkin card magazine newspaper desk table remote cover cushion".split()
)
MASS = frozenset(
    "cereal food paperwork bread rice meat fruit cheese butter sauce soup salad pasta hay smoke steam "
    "fire milk coffee tea juice wine beer wood metal paper toast bacon lettuce broccoli hair equipment "
    "artwork art".split()
)
ANIMALS = frozenset(
    "animal dog puppy cat kitten cow bull calf horse pony donkey zebra sheep lamb goat bird duck pigeon "
    "seagull goose parrot bear elephant giraffe lion tiger monkey deer rabbit pig chicken rooster".split()
)
GAZE = ("looking at", "watching", "facing", "pointing at")
OWN_FRONT = frozenset(
    "tv television monitor computer laptop house building church store shop hotel chair couch sofa bench bed "
    "desk car taxi truck bus van train plane airplane boat motorcycle bike bicycle refrigerator stove oven "
    "cabinet toilet clock statue".split()
)
# Of what stands under them one may say "next to", too.
TALL = frozenset("tree palm plant bush lamp light sign flag lamppost statue tower".split())
# Several may share one box.
BUNCHES = frozenset("banana grape carrot orange apple book flower leaf donut magazine paper cd".split())
THIN = frozenset("pole wire rope string cord cable line fence branch stick".split())


def excluded(graph: SceneGraph, a: SceneObject, asserted: str, b: SceneObject) -> tuple[str, ...]:
    """Predicates that are false of a and b where `asserted` holds and the boxes agree."""
    out = []
    for p in EXCLUDES.get(asserted, ()):
        if p == "inside" and asserted in UPON and overlap_share(a.box, b.box) >= 0.6:
            continue
        if p == "hanging from" and asserted not in POSTURES:
            continue
        if asserted in ("behind", "in front of") and p in ("inside", "on top of") and iou(a.box, b.box) > 0:
            continue
        out.append(p)
    return tuple(out)


def direction(graph: SceneGraph, a: SceneObject, b: SceneObject) -> tuple[str, float] | None:
    """(where a is relative to b in the image, margin as a multiple of the least), where one of four is true.

    Boxes are apart on that axis by 2 % of the side. Centres differ twice as much as on the other axis, and
    four times where the boxes are apart on it too: what is aside and wholly higher is also "above".
    """
    (ax, ay), (bx, by) = centre(a.box), centre(b.box)
    dx, dy = abs(bx - ax), abs(by - ay)
    apart_x = max(a.box[0] - b.box[2], b.box[0] - a.box[2])
    apart_y = max(a.box[1] - b.box[3], b.box[1] - a.box[3])
    if dx >= (4 if apart_y > 0 else 2) * dy:
        name, margin = "left of" if ax < bx else "right of", apart_x / (0.02 * graph.width)
    elif dy >= (4 if apart_x > 0 else 2) * dx:
        name, margin = "above" if ay < by else "below", apart_y / (0.02 * graph.height)
    else:
        return None
    return (name, margin) if margin >= 1 else None


# What is said when one of them is: a model may choose another word of the same meaning.
MEANS = (
    dict.fromkeys(UPON, {"on", "on top of"})
    | dict.fromkeys(BELOW, {"under", "below"})
    | dict.fromkeys(("in", "inside"), {"in", "inside"})
    | dict.fromkeys(("above", "over"), {"above", "over"})
    | dict.fromkeys(("next to", "beside", "by", "near"), {"next to", "beside", "by", "near", "close to"})
    | {"carrying": {"holding"}}
)
OPPOSED = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # axis, sign of b - a
# {said of b and a: what is then said of a and b}
INVERSE = {"in front of": "behind", "behind": "in front of", "above": "below", "over": "under",
           "below": "above", "under": "above", "next to": "next to", "beside": "beside"}  # fmt: skip


def holds(graph: SceneGraph, a_id: str, predicate: str, b_id: str) -> bool | None:
    """Whether the graph says that a stands in this relation to b; None where it does not say."""
    known = {o.id: o for o in graph.objects}
    if a_id not in known or b_id not in known or a_id == b_id:
        return None
    a, b = known[a_id], known[b_id]
    said = {r.predicate for r in graph.relationships if (r.subject, r.object) == (a_id, b_id)}
    back = {r.predicate for r in graph.relationships if (r.subject, r.object) == (b_id, a_id)}
    said |= {INVERSE[p] for p in back if p in INVERSE}
    if any(predicate == p or predicate in MEANS.get(p, ()) for p in said):
        return True
    if predicate in back and predicate in EXCLUDES and predicate != "next to":
        return False
    if any(predicate in excluded(graph, a, p, b) for p in said):
        return False
    if predicate in OPPOSED:
        if found := direction(graph, a, b):
            return found[0] == predicate
        axis, sign = OPPOSED[predicate]
        return False if (centre(b.box)[axis] - centre(a.box)[axis]) * sign <= 0 else None
    far = gap(a.box, b.box) > 0.1 * diagonal(graph)
    return False if far and predicate in ("holding", "riding", *POSTURES) else None


# ---- the scene as the rules see it -------------------------------------------------------------------------
class Fact(NamedTuple):
    """What can be asked, before it is put into words."""

    form: str
    slots: dict  # of the phrasing
    topic: str
    answer: str
    wrong: tuple[str, ...]
    objects: tuple[str, ...]
    relationships: tuple[tuple[str, str, str], ...]
    margin: float  # a multiple of the least that the rule asks for; 1.5 where a triple says so
    because: str


class View:
    """A graph with what the rules ask again and again."""

    def __init__(self, graph: SceneGraph, voted: bool = False):
        self.graph, self.objects, self.voted = graph, graph.objects, voted
        self.known = {o.id: o for o in graph.objects}
        alone = {o.id: o for o in graph.objects if is_nameable(graph, o, 0.002) and article(o.label)
                 and unique(graph, o)}  # fmt: skip
        self.small = alone  # may be named where a triple is about it
        share = 0.005 * graph.width * graph.height
        self.named = [o for o in alone.values() if area(o.box) >= share]
        self.between = {}  # (subject, object) -> predicates
        for r in graph.relationships:
            self.between.setdefault((r.subject, r.object), []).append(r.predicate)
        self.d = diagonal(graph)
        self.flat = graph.source == "drawn"  # without a ground that rises with distance
        self.certain = {o.id for o in graph.objects if not (o.group or o.crowd or o.uncertain)}

    def pick(self, items, n: int, *key) -> list:
        """n of the items, the same in every run."""
        return sorted(items, key=lambda o: digest(self.graph.image_id, *key, getattr(o, "id", o)))[:n]

    def linked(self, a: str, b: str) -> bool:
        return (a, b) in self.between or (b, a) in self.between

    def handy(self, o: SceneObject) -> bool:
        """Whether a triple about hands may name it: what is worn may be carried, too."""
        if o.id in self.small:
            return True
        worn = any(p == "wearing" for (_, i), said in self.between.items() if i == o.id for p in said)
        fit = head(o.label) in CLOTHING and not worn and self.seen(o) and o.id in self.certain
        return fit and bool(article(o.label)) and unique(self.graph, o)

    def ground(self, o: SceneObject) -> bool:
        """Whether it may be named as what others stand on."""
        return head(o.label) in STUFF and o.id in self.certain and unique(self.graph, o)

    def seen(self, o: SceneObject) -> bool:
        """Large enough to be found by who looks for it."""
        size = min(o.box[2] - o.box[0], o.box[3] - o.box[1])
        return size >= 12 and area(o.box) >= 0.002 * self.graph.width * self.graph.height

    def whole(self, o: SceneObject) -> bool:
        """Not cut by the edge of the image."""
        w, h = self.graph.width, self.graph.height
        x1, y1, x2, y2 = o.box
        return x1 > 0.01 * w and y1 > 0.01 * h and x2 < 0.99 * w and y2 < 0.99 * h


def digest(*parts) -> str:
    return sha256("|".join(map(str, parts)).encode()).hexdigest()


def ids(*objects: SceneObject) -> tuple[str, ...]:
    return tuple(o.id for o in objects)


# ---- the rules ---------------------------------------------------------------------------------------------
# The word that an option uses for a predicate. Each is right of some pairs and wrong of others, so that none
# gives itself away: "sitting on" stands beside other postures only, and never beside a plain "on".
WORD = (
    dict.fromkeys(UPON, "on")
    | dict.fromkeys(("under", "below"), "under")
    | dict.fromkeys(("in", "inside"), "inside")
    | {p: p for p in ("above", "next to", "behind", "in front of")}
)
BACK = {"behind": ("in front of",), "in front of": ("behind",)}
REST = ("sitting on", "standing on", "lying on")  # a living thing does one of them
CONTAINERS = frozenset(
    "box bag basket bowl cup mug drawer suitcase cabinet oven refrigerator fridge sink vase bottle "
    "jar".split()
)
# Nobody takes anything to be inside another thing.
HOLLOW = CONTAINERS | frozenset(
    "boat car bus truck train tree bush tent pool crib nest cage pot glass pan holder".split()
)
PICTURES = frozenset("picture photo painting poster image mirror screen window television tv".split())


def place(view: "View", a: SceneObject, p: str, b: SceneObject) -> tuple[str, tuple[str, ...]] | None:
    """(the word for where a is, words that are false of the pair), given that the graph says "a p b"."""
    if head(b.label) in PICTURES or p not in WORD:
        return None  # "in the picture" may be painted there
    if p in REST and alive(a):
        return p, tuple(w for w in REST if w != p)
    word = WORD[p]
    within = b.box[0] <= a.box[0] and a.box[2] <= b.box[2]  # one to a side of the other sticks out
    aside = max(a.box[0] - b.box[2], b.box[0] - a.box[2])
    level = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    hollow = head(b.label) in HOLLOW  # else "inside" is no option: nobody would take it
    out = hollow and overlap_share(a.box, b.box) < 0.6
    if word in ("behind", "in front of"):
        near, far = (b, a) if word == "behind" else (a, b)
        return (word, BACK[word]) if in_front(view, near, far) >= 1 else None
    if word == "inside" and not hollow:
        return None
    if word == "next to":
        least = 0.3 * min(a.box[3] - a.box[1], b.box[3] - b.box[1])
        false = ("on", "under", "above", *(["inside"] if hollow else []))
        return (word, false) if aside > 0 and level >= least else None
    false = {
        "on": {"under": True, "inside": out, "next to": within},
        "under": {
            "on": True,
            "inside": hollow,
            "above": True,
            "next to": within and head(b.label) not in TALL,
        },
        "inside": {
            "on": head(b.label) in CONTAINERS | {"car", "truck"},
            "under": True,
            "above": True,
            "next to": True,
        },
        "above": {"on": gap(a.box, b.box) >= 0.02 * view.d, "under": True, "inside": out},
    }[word]
    return word, tuple(w for w, is_false in false.items() if is_false)


def alive(o: SceneObject) -> bool:
    return head(o.label) in PERSON | ANIMALS


def relation_by_triple(view: View) -> Iterator[Fact]:
    for (s, o), predicates in view.between.items():
        a, b = view.small.get(s), view.known[o]
        spatial = {p for p in predicates + view.between.get((o, s), []) if PREDICATES.get(p) in SPATIAL}
        if len(spatial) != 1 or a is None or not (o in view.small or view.ground(b)):
            continue
        (p,) = spatial
        if p not in predicates or confusable(a.label, b.label) or not (found := place(view, a, p, b)):
            continue
        word, false = found
        if o in view.small or word == "on":
            if wrong := other_places(view, a, word, false, b):
                yield Fact("relation/triple", {"a": a.label, "b": b.label}, word, word, wrong, ids(a, b),
                           ((s, p, o),), 1.5, f"the graph says: {s} {p} {o}")  # fmt: skip


PLACES = ("on", "under", "next to")


def other_places(view: View, a: SceneObject, word: str, false: tuple, b: SceneObject) -> tuple[str, ...]:
    """The wrong options beside the word for a place; none where the question would give itself away.

    Each set of options is shown with each of its words as the answer: on, under and next to, often with
    inside; the postures; behind and in front of.
    """
    if word in REST or word in BACK:
        return false
    if word not in (*PLACES, "inside") or not {*PLACES} - {word} <= {*false}:
        return ()
    fits = word in ("under", "next to", "inside") or overlap_share(a.box, b.box) < 0.6
    shown = word == "inside" or int(digest(view.graph.image_id, "inside", a.id, b.id)[:4], 16) % 10 < 7
    return tuple(w for w in (*PLACES, *(["inside"] if fits and shown else [])) if w != word)


SPATIAL = ("support", "contain", "vertical", "near", "depth", "lateral")


def relation_in_image(view: View) -> Iterator[Fact]:
    height = view.graph.height
    for a, b in permutations(view.named, 2):
        if confusable(a.label, b.label) or not (found := direction(view.graph, a, b)):
            continue
        name, margin = found
        said = view.between.get((a.id, b.id), []) + view.between.get((b.id, a.id), [])
        if name in ("above", "below"):
            # Of two things on the ground the higher one in the image is the farther one.
            if not view.flat and min(a.box[3], b.box[3]) > 0.4 * height:
                continue
        if {"in front of", "behind", "above", "below", "over", "under", "left of", "right of"} & set(said):
            continue
        back = DIRECTIONS[name]
        if said and not (holds(view.graph, a.id, name, b.id) and holds(view.graph, b.id, back, a.id)):
            continue  # what is said speaks against it: the lower one is on the higher one
        yield Fact("relation/image", {"a": a.label, "b": b.label}, name, name,
                   tuple(d for d in DIRECTIONS if d != name), ids(a, b), ((a.id, name, b.id),), margin,
                   f"boxes apart by {margin:.1f} times the least")  # fmt: skip


def reach(view: View) -> Iterator[Fact]:
    touched = {}
    for (s, o), predicates in view.between.items():
        for p in predicates:
            if p in REACH:
                touched.setdefault((s, p), []).append(o)
    for (s, p), objects in touched.items():
        a, b = view.small.get(s), view.known[objects[0]]
        if len(objects) != 1 or a is None or not view.handy(b) or confusable(a.label, b.label):
            continue
        o = b.id
        others = [x for x in view.named if x not in (a, b) and not view.linked(x.id, s)
                  and gap(x.box, a.box) >= 0.03 * view.d and not confusable(x.label, b.label)
                  and could_be_done(p, x)]  # fmt: skip
        others = apart(view.pick(others, 9, "reach", s))[:3]
        fact = f"the graph says: {s} {p} {o}, and {p} nothing else"
        if len(others) >= 2:
            yield Fact("reach/what", {"a": a.label, "verb": p}, p, b.label,
                       tuple(x.label for x in others), ids(a, b, *others), ((s, p, o),), 1.5,
                       fact)  # fmt: skip
        deeds = {q for q in view.between[s, o] if PREDICATES.get(q) not in ("near", None)}
        if alive(a) and deeds == {p} and (o, s) not in view.between and (wrong := other_deeds(p, b)):
            yield Fact("reach/how", {"a": a.label, "b": b.label}, p, p, wrong, ids(a, b), ((s, p, o),), 1.5,
                       fact)  # fmt: skip


def could_be_done(deed: str, x: SceneObject) -> bool:
    """Whether a reader who sees no image would believe that this is done to such a thing."""
    if deed in DONE_TO:
        return head(x.label) in DONE_TO[deed]
    return not (alive(x) or head(x.label) in HEAVY)


def other_deeds(deed: str, b: SceneObject) -> tuple[str, ...]:
    """What is not done to a thing while the deed is, though it often is to such things."""
    return next((tuple(d for d in deeds if d != deed) for deeds, things in OTHER_DEEDS
                 if deed in deeds and head(b.label) in things), ())  # fmt: skip


def size(view: View) -> Iterator[Fact]:
    fit = [o for o in view.named if view.whole(o) and head(o.label) not in THIN]
    wide, high = (lambda o: o.box[2] - o.box[0]), (lambda o: o.box[3] - o.box[1])
    for o in fit:
        rivals = [x for x in fit if x is not o and not confusable(x.label, o.label)
                  and max(overlap_share(o.box, x.box), overlap_share(x.box, o.box)) < 0.5]  # fmt: skip

        def ratio(form, x, o=o):
            if form == "size/tallest":
                return high(o) / high(x) / 1.3
            big, small = (o, x) if form == "size/largest" else (x, o)
            sides = min(wide(big) / wide(small), high(big) / high(small)) / 1.2
            return min(area(big.box) / area(small.box) / 2.2, sides)  # a triangle fills half of its box

        for form in ("size/largest", "size/smallest", "size/tallest"):
            if form == "size/tallest" and head(o.label) in FLAT:
                continue
            beaten = apart(view.pick([x for x in rivals if ratio(form, x) >= 1], 9, form, o.id))[:3]
            if len(beaten) >= 2:
                margin = min(ratio(form, x) for x in beaten)
                yield Fact(form, {}, form, o.label, tuple(x.label for x in beaten), ids(o, *beaten), (),
                           margin, f"{o.id} by {margin:.2f} times the least ratio")  # fmt: skip


def apart(objects: list[SceneObject]) -> list[SceneObject]:
    """The objects without those whose names could be mixed up with an earlier one's."""
    kept = []
    for o in objects:
        if not any(confusable(o.label, k.label) for k in kept):
            kept.append(o)
    return kept


def orientation(view: View) -> Iterator[Fact]:
    gazes = {}
    for (s, o), predicates in view.between.items():
        for p in predicates:
            if PREDICATES.get(p) == "gaze":
                gazes.setdefault(s, []).append((p, o))
    for s, seen in gazes.items():
        a, (p, o) = view.small.get(s), seen[0]
        b = view.small.get(o)
        if (
            len({o for _, o in seen}) != 1
            or a is None
            or b is None
            or p not in GAZE
            or confusable(a.label, b.label)
        ):
            continue
        others = [x for x in view.named if x not in (a, b) and not view.linked(s, x.id)
                  and not confusable(x.label, b.label) and angle(a, b, x) >= 45]  # fmt: skip
        others = apart(view.pick(others, 9, "gaze", s))[:3]
        if len(others) >= 2:
            margin = min(angle(a, b, x) for x in others) / 45
            yield Fact("orientation/gaze", {"a": a.label, "verb": p}, p, b.label,
                       tuple(x.label for x in others), ids(a, b, *others), ((s, p, o),), margin,
                       f"the graph says: {s} {p} {o}")  # fmt: skip


def angle(a: SceneObject, b: SceneObject, x: SceneObject) -> float:
    """Between the directions from a to b and from a to x, degrees."""
    (ax, ay), (bx, by), (cx, cy) = centre(a.box), centre(b.box), centre(x.box)
    lengths = hypot(bx - ax, by - ay) * hypot(cx - ax, cy - ay)
    if not lengths:
        return 0.0
    return degrees(acos(max(-1.0, min(1.0, ((bx - ax) * (cx - ax) + (by - ay) * (cy - ay)) / lengths))))


CORNERS = ("top left", "top right", "bottom left", "bottom right")
CELLS = tuple(
    " ".join(filter(None, (r, c))) or "center" for r in ("top", "", "bottom") for c in ("left", "", "right")
)


def location(view: View) -> Iterator[Fact]:
    w, h = view.graph.width, view.graph.height
    for o in view.named:
        x1, y1, x2, y2 = o.box
        cx, cy = centre(o.box)
        aside = min(abs(cx - w / 2) / (0.1 * w), abs(cy - h / 2) / (0.1 * h))
        left = (min(x2, w / 2) - min(x1, w / 2)) / (x2 - x1)
        top = (min(y2, h / 2) - min(y1, h / 2)) / (y2 - y1)
        if (
            aside >= 1
            and max(left, 1 - left) >= 0.85
            and max(top, 1 - top) >= 0.85
            and x2 - x1 <= w / 2
            and y2 - y1 <= h / 2
        ):
            name = f"{'top' if top > 0.5 else 'bottom'} {'left' if left > 0.5 else 'right'}"
            yield Fact("location/quadrant", {"a": o.label}, name, name,
                       tuple(c for c in CORNERS if c != name), ids(o), (), aside,
                       f"centre off the middle by {aside:.1f} times the least")  # fmt: skip
        column, row = int(3 * cx / w), int(3 * cy / h)
        inside = min(x1 - column * w / 3, (column + 1) * w / 3 - x2, y1 - row * h / 3, (row + 1) * h / 3 - y2)
        if inside >= 0:
            name = CELLS[3 * row + column]
            wrong = view.pick([c for c in CELLS if c != name], 3, "cell", o.id)
            yield Fact("location/cell", {"a": o.label}, name, name, tuple(wrong), ids(o), (),
                       1 + inside / (0.02 * min(w, h)), f"inside its cell by {inside:.0f} px")  # fmt: skip


def in_front(view: View, front: SceneObject, back: SceneObject) -> float:
    """How well boxes agree that one thing is nearer: its bottom edge is lower. A multiple of the least."""
    own = any(alive(o) or head(o.label) in OWN_FRONT for o in (front, back))
    return (front.box[3] - back.box[3]) / ((0.05 if own else 0.02) * view.graph.height)


def depth(view: View) -> Iterator[Fact]:
    pairs = {}
    for (s, o), predicates in view.between.items():
        for p in ("in front of", "behind"):
            if p in predicates:
                pairs[(s, o) if p == "in front of" else (o, s)] = (s, p, o)
    for (near, far), triple in pairs.items():
        a, b = view.small.get(near), view.small.get(far)
        if a and b and None not in (a.depth, b.depth) and a.depth >= b.depth:
            continue  # what is measured speaks against the triple
        if a and b and not confusable(a.label, b.label) and (margin := in_front(view, a, b)) >= 1:
            yield from nearer(a, b, margin, (triple,), f"the graph says: {' '.join(triple)}")
    for a, b in permutations([o for o in view.named if o.depth is not None], 2):
        if a.depth < b.depth and not confusable(a.label, b.label):
            margin = (b.depth - a.depth) / max(abs(b.depth), 1e-9) / 0.15
            if margin >= 1 and (a.id, b.id) not in pairs and (b.id, a.id) not in pairs:
                yield from nearer(a, b, margin, (), f"depth {a.depth:g} and {b.depth:g}")


def nearer(a: SceneObject, b: SceneObject, margin: float, triples: tuple, because: str) -> Iterator[Fact]:
    yield Fact("depth/nearer", {}, "nearer", a.label, (b.label,), ids(a, b), triples, margin, because)
    yield Fact("depth/farther", {}, "farther", b.label, (a.label,), ids(b, a), triples, margin, because)


def distance(view: View) -> Iterator[Fact]:
    graph, fit = view.graph, [o for o in view.named if head(o.label) not in THIN]
    for r in fit:
        level = [o for o in fit if o is not r and not confusable(o.label, r.label)
                 and (view.flat or abs(o.box[3] - r.box[3]) <= 0.2 * graph.height)]  # fmt: skip
        gaps = {o.id: gap(o.box, r.box) for o in level}
        for o in level:
            least = max(2 * gaps[o.id], gaps[o.id] + 0.08 * view.d)
            losers = apart(
                [o, *view.pick([x for x in level if gaps[x.id] >= least], 9, "distance", r.id, o.id)]
            )[1:4]
            if len(losers) >= 2:
                next_gap = min(gaps[x.id] for x in losers)
                yield Fact("distance/image", {"a": r.label}, r.label, o.label, tuple(x.label for x in losers),
                           ids(r, o, *losers), ((o.id, "closest to", r.id),), next_gap / least,
                           f"{gaps[o.id]:.0f} px, the next {next_gap:.0f} px")  # fmt: skip


def count(view: View) -> Iterator[Fact]:
    graph = view.graph
    for name in sorted({o.label for o in view.objects} | {k for o in view.objects for k in o.kinds}):
        whole = name in graph.exhaustive  # every one has a box; else votes have to say so
        if not (whole or view.voted) or not countable(name) or head(name) in BUNCHES:
            continue
        of = [o for o in view.objects if name == o.label or name in o.kinds]
        if any(could_be_called(o, name) for o in view.objects if o not in of) or not 1 <= len(of) <= 8:
            continue
        least = min(area(o.box) for o in of) / (0.003 * graph.width * graph.height)
        if least < 1 or any(o.group or o.crowd or o.uncertain for o in of):
            continue
        if any(iou(a.box, b.box) > 0.5 for i, a in enumerate(of) for b in of[:i]):
            continue
        block = range(1, 5) if len(of) <= 4 else range(5, 9)
        yield Fact("count/label" if whole else "count/voted", {"many": plural(name)}, name, str(len(of)),
                   tuple(str(n) for n in block if n != len(of)), ids(*of), (), least,
                   f"{len(of)} boxes, and " + (f"every {name} of the image has one" if whole else
                                               "votes that there are no more"))  # fmt: skip


def existence(view: View) -> Iterator[Fact]:
    graph = view.graph
    for name in view.pick(filter(countable, graph.exhaustive), 24, "existence"):
        of = [o for o in view.objects if name == o.label or name in o.kinds]
        slots = {"a": f"{article(name)} {name}".strip()}
        if of and not any(o.uncertain for o in of) and any(view.seen(o) for o in of):
            yield Fact(
                "existence/label", slots, name, "yes", ("no",), ids(*of), (), 1.5, f"{of[0].id} is there"
            )
        elif not any(could_be_called(o, name) for o in view.objects) and (about := instead(view, name)):
            yield Fact("existence/label", slots, name, "no", ("yes",), ids(*about), (), 1.5,
                       f"every {name} would have a box")  # fmt: skip


def existence_of_triple(view: View) -> Iterator[Fact]:
    """Yes where a triple says so; no where the two stand otherwise.

    Both are the only ones of their names and the question says "the": elsewhere in the image, and without
    boxes, others of their names may stand as they like.
    """
    for (s, o), predicates in view.between.items():
        a, b = view.small.get(s), view.small.get(o)
        back = view.between.get((o, s), [])
        if a is None or b is None or confusable(a.label, b.label):
            continue
        if any(PREDICATES.get(p) in SPATIAL for p in back):
            continue
        alone, done = len(predicates) == 1 and not back, set()
        for p in predicates:
            word, false = place(view, a, p, b) or (p, other_deeds(p, b) if alive(a) else ())
            if not false or word == "next to" or word in done:
                continue
            done.add(word)
            false = view.pick([w for w in false if w != "next to"], 1, "swap", s, o) if alone else []
            for verb, answer in [(word, "yes"), *((w, "no") for w in false)]:
                yield Fact("existence/triple", {"a": a.label, "verb": verb, "b": b.label}, verb, answer,
                           ("no" if answer == "yes" else "yes",), ids(a, b), ((s, p, o),), 1.5,
                           f"the graph says: {s} {p} {o}")  # fmt: skip


def countable(name: str) -> bool:
    """Whether "is there a ..." can be said of it."""
    return bool(article(name)) and head(name) not in MASS


def instead(view: View, name: str) -> list[SceneObject]:
    """What an answer of "no" is about: what is there in its place."""
    if view.flat:
        return list(view.objects)
    return view.pick([o for o in view.named if o.id in view.certain], 4, "instead", name)


RULES = (
    relation_by_triple,
    relation_in_image,
    reach,
    size,
    orientation,
    location,
    depth,
    distance,
    count,
    existence,
    existence_of_triple,
)


# ---- questions ---------------------------------------------------------------------------------------------
def candidates(graph: SceneGraph, per_form: int = 8, voted: bool = False) -> list[Question]:
    """All that the rules can ask of a graph, up to per_form questions of each form, in a fixed order.

    Args: voted: also counts of what may have no box (count/voted), which only unanimous votes can make true.
    """
    view, of_form = View(graph, voted), {}
    for rule in RULES:
        for fact in rule(view):
            of_form.setdefault(fact.form, []).append(fact)
    out = []
    for form, facts in of_form.items():
        keyed = sorted((digest(graph.image_id, form, f.objects, f.topic, f.answer), f) for f in facts)
        out += [in_words(view, "q" + key[:15], fact) for key, fact in keyed[:per_form]]
    return out


def in_words(view: View, key: str, fact: Fact) -> Question:
    category, phrasings = FORMS[fact.form]
    text = phrasings[int(key[1:5], 16) % len(phrasings)].format(**fact.slots)
    return Question(key, view.graph.image_id, category, fact.form, fact.topic, text, fact.answer, fact.wrong,
                    fact.objects, fact.relationships, level(view, fact), rating(view, fact),
                    fact.because)  # fmt: skip


def level(view: View, fact: Fact) -> str:
    """How hard a question is likely to be, by its margin and its surroundings: salience, no judgement."""
    ends = [view.known[i] for i in fact.objects]
    share = min(area(o.box) for o in ends) / (view.graph.width * view.graph.height)
    overlap = max((iou(ends[0].box, o.box) for o in ends[1:]), default=0)
    if fact.margin < 1.25 or overlap > 0.1 or share < 0.015:
        return "hard"
    return "easy" if fact.margin >= 2 and len(view.small) <= 6 and overlap == 0 else "medium"


def rating(view: View, fact: Fact) -> int:
    """1 to 10: how salient what it asks about is. The mean of size, margin and number of rivals."""
    ends = [view.known[i] for i in fact.objects]
    share = sum(area(o.box) for o in ends) / len(ends) / (view.graph.width * view.graph.height)
    parts = (min(share / 0.1, 1), min(fact.margin / 4, 1), min(len(fact.wrong) / 3, 1))
    return round(1 + 9 * sum(parts) / 3)


# ---- a question held against its graph ---------------------------------------------------------------------
def referents(graph: SceneGraph, name: str) -> list[str]:
    """Ids of the objects that a reader could mean by a name."""
    return [o.id for o in graph.objects if could_be_called(o, name)]


def contradiction(graph: SceneGraph, q: Question) -> str | None:
    """What speaks against a question, in a line; None where nothing in the graph does.

    Written for questions by a model, whose words are free: what it compares is read off a few words, and
    where they are others the graph says nothing.
    """
    known = {o.id: o for o in graph.objects}
    options = [q.answer, *q.wrong]
    if unknown := [i for i in q.objects if i not in known]:
        return f"objects: expected ids of the graph, got {unknown[0]}"
    if not q.objects:
        return "objects: expected at least one id, got none"
    if len({plain(o) for o in options}) < len(options) or not 2 <= len(options) <= 4:
        return f"options: expected 2 to 4 distinct texts, got {options}"
    used = [known[i] for i in q.objects]
    labels = {o.label for o in used}
    if q.category not in ("count", "existence"):
        for o in used:
            if len(could := referents(graph, o.label)) > 1:
                return f"objects: {o.label} could be any of {', '.join(could[:4])}"
    things = [plain(o) in labels for o in options]
    if q.category in ("size", "distance", "depth") and any(things) and not all(things):
        unknown = [o for o, thing in zip(options, things, strict=True) if not thing and "same" not in o]
        if unknown:
            return f"options: {unknown[0]} is none of the objects"
    truth = {option: option_holds(graph, q, used, plain(option)) for option in options}
    if truth[q.answer] is False:
        return f"answer: {q.answer} is against the graph"
    if right := [o for o in q.wrong if truth[o]]:
        return f"options: {right[0]} is right too"
    return None


def plain(option: str) -> str:
    """An option without article and full stop, in lower case."""
    return option.strip().lower().rstrip(".").removeprefix("the ").strip()


LARGEST, SMALLEST = (
    ("largest", "biggest", "larger", "bigger", "most area"),
    ("smallest", "smaller", "least area"),
)
SIDES = {
    "left": (0, -1),
    "right": (0, 1),
    "top": (1, -1),
    "upper": (1, -1),
    "bottom": (1, 1),
    "lower": (1, 1),
}


IN_THE_IMAGE = re.compile(r"\bin (the|this) (image|picture|photo|photograph|scene)\b,?")


def option_holds(graph: SceneGraph, q: Question, used: list[SceneObject], option: str) -> bool | None:
    """Whether an option would be right; None: the graph does not say."""
    text, named = q.text.lower(), {o.label: o for o in used}
    rivals = [named[plain(o)] for o in (q.answer, *q.wrong) if plain(o) in named]
    asked = [o for o in used if o not in rivals]
    if q.category == "relation" and len(used) == 2:
        return holds(graph, used[0].id, canonical(option) or option, used[1].id)
    if q.category == "existence" and option in ("yes", "no"):
        text = IN_THE_IMAGE.sub(" ", text)  # no verb of the question's
        there = sorted((o for o in used if f" {o.label}" in text), key=lambda o: text.index(f" {o.label}"))
        verbs = sorted((p for p in PREDICATES if f" {p} " in text), key=len)
        truth = None
        if len(there) == 2 and verbs:
            truth = holds(graph, there[0].id, verbs[-1], there[1].id)
        elif len(there) == 1 and not [v for v in verbs if v not in ("in", "of")]:
            truth = True
        return truth if truth is None or option == "yes" else not truth
    if q.category == "count":
        names = [n for n in (used[0].label, *used[0].kinds) if plural(n) in text or n in text]
        names = [
            n for n in names
            if (n in graph.exhaustive or q.form == "count/voted")
            and all(n == o.label or n in o.kinds for o in used)
        ]  # fmt: skip
        if not names or any(o.group or o.crowd for o in used):
            return False  # others may be there, without a box
        return option == str(len(referents(graph, max(names, key=len))))
    if q.category == "instance_location" and len(used) == 1:
        middle = centre(used[0].box)
        off = [middle[0] / graph.width - 0.5, middle[1] / graph.height - 0.5]
        words = [SIDES[w] for w in option.replace("-", " ").split() if w in SIDES]
        if any(off[axis] * sign < -0.05 for axis, sign in words):
            return False
        return True if len(words) == 2 and all(off[axis] * sign > 0.17 for axis, sign in words) else None
    if option not in named or len(rivals) < 2:
        return None
    me, others = named[option], [r for r in rivals if r is not named[option]]
    if q.category == "size":
        for words, measure in (
            (LARGEST, area), (SMALLEST, lambda b: -area(b)), (("tallest", "taller"), lambda b: b[3] - b[1]),
        ):  # fmt: skip
            if any(w in text for w in words):
                return all(measure(me.box) > measure(r.box) for r in others)
    if q.category == "distance" and len(asked) == 1:
        gaps = [gap(r.box, asked[0].box) for r in others]
        mine = gap(me.box, asked[0].box)
        if "far" in text:
            return mine > max(gaps)
        return mine < min(gaps) if "clos" in text or "near" in text else None
    if q.category == "depth":
        said = [holds(graph, me.id, "in front of", r.id) for r in others]
        said = [True if holds(graph, r.id, "behind", me.id) else s for s, r in zip(said, others, strict=True)]
        nearest = all(s is True for s in said) or (False if any(s is False for s in said) else None)
        return nearest if nearest is None or "far" not in text else not nearest
    if q.category in ("reach", "orientation") and len(asked) == 1:
        kind = "contact" if q.category == "reach" else "gaze"
        said = {(r.subject, r.object) for r in graph.relationships if PREDICATES.get(r.predicate) == kind}
        if (asked[0].id, me.id) in said:
            return True
        return False if any((asked[0].id, r.id) in said for r in others) else None
    return None
