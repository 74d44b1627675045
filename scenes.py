"""Scene graphs: what is in an image, where, and how things stand to one another.

A source (sources.py) gives a `RawGraph`, as its annotators wrote it; `clean` makes the `SceneGraph` that
questions are asked of, and counts what it dropped by reason.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from math import hypot

from names import (
    CLOTHING,
    PERSON,
    PREDICATES,
    STUFF,
    UNNAMED,
    WHOLE,
    WIDE,
    confusable,
    head,
    label_of,
    predicate,
    singular,
)

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright original image


# ---- as written ----
@dataclass(frozen=True, slots=True)
class RawObject:
    """One box as its source has it."""

    key: str  # names it within its image, for `RawGraph.relations`
    names: tuple[str, ...]  # as written; several where annotators disagree
    box: Box  # may stick out of the image
    attributes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()  # wider names that surely fit: a "red circle" is a "circle"
    group: bool = False  # one box around several (Open Images: IsGroupOf; of PSG all stuff)
    crowd: bool = False  # the same where the things are too many to tell apart (COCO: iscrowd)
    depth: float | None = None  # of the object's middle, in any unit that grows away from the camera


@dataclass(frozen=True, slots=True)
class RawGraph:
    """One image as its source has it."""

    image_id: str
    image: str  # where its pixels are, see `sources.image_bytes`
    width: int
    height: int
    objects: tuple[RawObject, ...]
    relations: tuple[tuple[str, str, str], ...]  # (key, predicate as written, key)
    exhaustive: tuple[
        str, ...
    ] = ()  # names of which every instance in the image has its box; or none is there
    image_group: str = ""  # images with the same one show the same scene and stay in one split
    licence: str = ""
    source: str = ""  # "vg", "psg", ...


# ---- cleaned ----
@dataclass(frozen=True, slots=True)
class SceneObject:
    """A thing with a box inside the image."""

    id: str  # "traffic_light.1": the label as an identifier, numbered within the label from 1
    label: str  # "traffic light": lower case, singular
    box: Box  # x1 < x2 <= width, y1 < y2 <= height
    attributes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    group: bool = False
    crowd: bool = False
    uncertain: bool = False  # its names disagree: it may be meant by several words and is never asked about
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Relationship:
    subject: str  # an object's id
    predicate: str  # one of PREDICATES' names, or as written in lower case where it is none of them
    object: str


@dataclass(frozen=True, slots=True)
class SceneGraph:
    """One image, cleaned."""

    image_id: str
    image: str
    width: int
    height: int
    objects: tuple[SceneObject, ...]
    relationships: tuple[Relationship, ...]
    exhaustive: frozenset[str] = frozenset()  # labels and kinds
    image_group: str = ""
    licence: str = ""
    source: str = ""

    def as_dict(self) -> dict:
        def fields(part):  # dataclasses.asdict copies deeply and takes ten times as long
            return {name: getattr(part, name) for name in part.__slots__}

        parts = {"objects": self.objects, "relationships": self.relationships}
        parts = {name: [fields(p) for p in found] for name, found in parts.items()}
        return fields(self) | parts | {"exhaustive": sorted(self.exhaustive)}

    @staticmethod
    def from_dict(d: dict) -> "SceneGraph":
        objects = tuple(SceneObject(**{k: tuple(v) if isinstance(v, list) else v for k, v in o.items()})
                        for o in d["objects"])  # fmt: skip
        relationships = tuple(Relationship(**r) for r in d["relationships"])
        exhaustive = frozenset(d["exhaustive"])
        return SceneGraph(
            **d | {"objects": objects, "relationships": relationships, "exhaustive": exhaustive}
        )


def clean(raw: RawGraph) -> tuple[SceneGraph, Counter]:
    """The graph that questions can be asked of, and {reason: objects or relations dropped}.

    Boxes that stick out by at most 2 px or 1 % of the side are clipped; others are dropped, as are slivers,
    names that are no names, and doubles of one thing. Relations need both ends, are stated once, and must
    agree with each other and with the boxes. A name is exhaustive no longer if it could mean something that
    was dropped, is a double, a group, or of uncertain name: a count of it would be wrong.
    """
    dropped, known, lost = Counter(), [], []  # known: (keys, object without id)
    for o in raw.objects:
        names = [n for n in map(label_of, o.names) if n]
        box = clip(o.box, raw.width, raw.height)
        if not names:
            dropped["name"] += 1
            words = {singular(w) for name in o.names for w in re.findall("[a-z]+", name.lower())}
            lost += [SceneObject("", w, o.box) for w in words]
            continue
        label = Counter(n for n, _ in names).most_common(1)[0][0]
        others = tuple(sorted({n for n, _ in names} - {label}))
        uncertain = any(not confusable(n, label) for n in others)
        kinds = tuple(dict.fromkeys((*o.kinds, *others)))
        # A road has no number: it is one in a box around all of it.
        group = o.group and head(label) not in STUFF or any(several for _, several in names)
        if isinstance(box, str):
            dropped[box] += 1
            lost.append(SceneObject("", label, o.box, (), kinds))
        else:
            known.append(([o.key], SceneObject("", label, box, tuple(o.attributes), kinds, group, o.crowd,
                                               uncertain, o.depth)))  # fmt: skip
    known, doubles = merge(known)
    known = doubt(known)
    dropped["duplicate"] += len(doubles)
    counts, objects, id_of = Counter(), [], {}
    for keys, o in known:
        stem = o.label.replace(" ", "_")
        counts[stem] += 1
        objects.append(replace(o, id=f"{stem}.{counts[stem]}"))
        id_of |= dict.fromkeys(keys, objects[-1].id)
    # Somebody without a usable box or name is there all the same: "the man" may mean him.
    objects = [
        replace(o, uncertain=True) if any(could_be_called(x, o.label) for x in lost) else o for o in objects
    ]
    lost += doubles + [o for o in objects if o.group or o.crowd or o.uncertain]
    names = {n[0] for n in map(label_of, raw.exhaustive) if n}
    names = frozenset(n for n in names if not any(could_be_called(o, n) for o in lost))
    graph = SceneGraph(raw.image_id, raw.image, raw.width, raw.height, tuple(objects), (), names,
                       raw.image_group or raw.image_id, raw.licence, raw.source)  # fmt: skip
    return replace(graph, relationships=relate(graph, raw.relations, id_of, dropped)), +dropped


def clip(box: Box, width: int, height: int) -> Box | str:
    """The box inside the image, or why it is dropped."""
    x1, y1, x2, y2 = box
    if min(x1, y1) < -2 or x2 > width + 2 or y2 > height + 2:
        over_x, over_y = max(-x1, x2 - width), max(-y1, y2 - height)
        if over_x > max(2, 0.01 * width) or over_y > max(2, 0.01 * height):
            return "box_outside"
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return (x1, y1, x2, y2) if x2 - x1 >= 2 and y2 - y1 >= 2 else "box_tiny"


def same_thing(a: SceneObject, b: SceneObject) -> bool:
    """Whether two boxes are one thing, boxed twice."""
    shared = shared_area(a.box, b.box)
    if not shared or a.uncertain or b.uncertain:  # uncertain: stays, in the way of all it may be
        return False
    small, large = sorted((area(a.box), area(b.box)))
    if a.label == b.label and (a.group, a.crowd) == (b.group, b.crowd):
        return shared >= 0.6 * (small + large - shared) or (shared >= 0.9 * small and small >= 0.6 * large)
    return shared >= 0.9 * (small + large - shared) and confusable(a.label, b.label)


def rank(o: SceneObject) -> tuple:
    """The first of several boxes around one thing stays: a group, the narrower name, the larger box."""
    specific = -len(o.label.split()), o.label in WIDE
    return not (o.group or o.crowd), *specific, -area(o.box), o.label, o.box, o.kinds, o.attributes


def merge(known: list) -> tuple[list, list[SceneObject]]:
    """(keys, object) pairs without doubles, in their order, and the doubles.

    What stays does not depend on the order, and no two that stay are one thing.
    """
    kept, doubles = {}, []  # {place in the source: (keys, object)}
    sizes = [area(o.box) for _, o in known]  # boxes of one thing differ by less than 1 : 0.6
    for place in sorted(range(len(known)), key=lambda i: rank(known[i][1])):
        keys, o = known[place]
        least, most = 0.6 * sizes[place], sizes[place] / 0.6
        alike = (i for i, (_, p) in kept.items() if least <= sizes[i] <= most and same_thing(o, p))
        best = next(alike, None)
        if best is None:
            kept[place] = keys, o
            continue
        doubles.append(o)
        others, p = kept[best]
        kinds = tuple(dict.fromkeys(n for n in (*p.kinds, *o.kinds, o.label) if n != p.label))
        attributes = tuple(dict.fromkeys(p.attributes + o.attributes))
        depth = o.depth if p.depth is None else p.depth
        kept[best] = others + keys, replace(p, attributes=attributes, kinds=kinds, depth=depth)
    return [kept[place] for place in sorted(kept)], doubles


def doubt(known: list) -> list:
    """The pairs; what has one box under two names that exclude each other is uncertain ("bed", "couch")."""
    doubted = {}  # {place: the other's label}
    for i, (_, a) in enumerate(known):
        for j, (_, b) in enumerate(known[:i]):
            x, y = abs(a.box[0] - b.box[0]), abs(a.box[1] - b.box[1])  # most pairs are far apart
            if (
                x < 0.1 * (a.box[2] - a.box[0])
                and y < 0.1 * (a.box[3] - a.box[1])
                and iou(a.box, b.box) >= 0.9
            ):
                doubted |= {i: b.label, j: a.label}
    return [
        (keys, replace(o, uncertain=True, kinds=(*o.kinds, doubted[i])) if i in doubted else o)
        for i, (keys, o) in enumerate(known)
    ]


# Where a predicate puts its subject as seen from its object: {name: (axis, side)}; it is not on both sides.
ON = "on,on top of,on back of,sitting on,standing on,lying on,parked on,walking on,running on,driving on"
SIDE = {
    name: (axis, side)
    for axis, there, back in (
        ("vertical", f"above,over,{ON}", "under,below"),
        ("depth", "in front of", "behind"),
        ("lateral", "left of", "right of"),
        ("within", "in,inside,sitting in,standing in,lying in,walking in,swimming in,flying in", ""),
        ("hands", "holding,carrying", ""),
    )
    for side, names in ((1, there), (-1, back))
    for name in filter(None, names.split(","))
}
# Of one and the same direction only: two people may face one another.
OPPOSITE = (("facing", "facing away from"), ("inside", "on top of"))


def relate(graph: SceneGraph, relations, id_of: dict, dropped: Counter) -> tuple[Relationship, ...]:
    """The relations that have both ends, once each, without those that contradict each other or the boxes."""
    boxes, found = {o.id: o.box for o in graph.objects}, {}
    for subject, text, object_ in relations:
        a, b = id_of.get(subject), id_of.get(object_)
        name = predicate(text) or " ".join(text.lower().split())
        if a is None or b is None:
            dropped["unknown_end"] += 1
        elif not name:
            dropped["predicate"] += 1
        elif a == b:
            dropped["self_relation"] += 1
        elif (a, name, b) in found:
            dropped["duplicate_relation"] += 1
        elif not agrees(name, boxes[a], boxes[b], diagonal(graph)):
            dropped["box_check"] += 1
        else:
            found[a, name, b] = True
    sides = {}  # {(subject, object, axis): sides}
    for a, name, b in found:
        if name in SIDE:
            axis, side = SIDE[name]
            sides.setdefault((a, b, axis), set()).add(side)
            sides.setdefault((b, a, axis), set()).add(-side)
    wrong = {t for t in found if t[1] in SIDE and len(sides[t[0], t[2], SIDE[t[1]][0]]) == 2}
    for pair in OPPOSITE:
        for a, name, b in found:
            if name in pair and {(a, p, b) for p in pair} <= found.keys():
                wrong.add((a, name, b))
    dropped["contradiction"] += len(wrong)
    return tuple(Relationship(*t) for t in found if t not in wrong)


def agrees(name: str, a: Box, b: Box, d: float) -> bool:
    """Whether boxes can stand in a relation, d the image's diagonal."""
    kind = PREDICATES.get(name)
    if kind in ("support", "contact") or name in ("wearing", "hanging from"):
        below = kind == "support" and a[1] >= b[3]  # it hangs there, at best
        return gap(a, b) <= 0.02 * d and not below
    if kind == "contain" and name in ("in", "inside"):
        return overlap_share(a, b) >= 0.8
    if kind == "near":
        return gap(a, b) <= max(
            0.02 * d, 0.5 * max(min(a[2] - a[0], b[2] - b[0]), min(a[3] - a[1], b[3] - b[1]))
        )
    if name in ("above", "over", "under", "below"):
        upper, lower = (a, b) if name in ("above", "over") else (b, a)
        return upper[1] + upper[3] < lower[1] + lower[3] and upper[1] < lower[1]
    if kind == "lateral":
        left, right = (a, b) if name == "left of" else (b, a)
        return left[0] + left[2] < right[0] + right[2]
    return True


# ---- geometry ----------------------------------------------------------------------------------------------
def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def shared_area(a: Box, b: Box) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0


def iou(a: Box, b: Box) -> float:
    shared = shared_area(a, b)
    return shared / (area(a) + area(b) - shared)


def overlap_share(a: Box, b: Box) -> float:
    """How much of a lies in b, 0 to 1."""
    return shared_area(a, b) / area(a)


def gap(a: Box, b: Box) -> float:
    """Distance of two boxes in pixels; 0 where they touch or overlap."""
    return hypot(max(a[0] - b[2], b[0] - a[2], 0.0), max(a[1] - b[3], b[1] - a[3], 0.0))


def diagonal(graph: SceneGraph) -> float:
    return hypot(graph.width, graph.height)


# ---- what can be asked about -------------------------------------------------------------------------------
def could_be_called(obj: SceneObject, name: str) -> bool:
    """Whether a reader could mean an object by a name: by its own, a synonym, a wider or a narrower one."""
    if name == obj.label or name in obj.kinds:
        return True
    if head(name) == head(
        obj.label
    ):  # its own colour speaks against "red circle", whatever a circle could be
        return confusable(obj.label, name)
    return confusable(obj.label, name) or any(confusable(k, name) for k in obj.kinds)


def is_nameable(graph: SceneGraph, obj: SceneObject, min_share: float = 0.005) -> bool:
    """Whether a question may name an object, apart from whether it is the only one of its name.

    It is one certain thing of some size, no part of another, not worn, and no stuff without a shape.
    """
    x1, y1, x2, y2 = obj.box
    vague = head(obj.label) in UNNAMED and obj.label not in WHOLE
    if obj.group or obj.crowd or obj.uncertain or vague:
        return False
    if min(x2 - x1, y2 - y1) < 12 or area(obj.box) < min_share * graph.width * graph.height:
        return False
    if head(obj.label) in CLOTHING:
        people = (o for o in graph.objects if head(o.label) in PERSON)
        return all(shared_area(obj.box, o.box) == 0 for o in people)
    return True


def unique(graph: SceneGraph, obj: SceneObject) -> bool:
    """Whether nothing else in the graph could be meant by an object's label."""
    return not any(o is not obj and could_be_called(o, obj.label) for o in graph.objects)
