"""A second opinion on questions: whether a reader who has only the text and the graph finds them true.

    faults(graph, question)        [] or what is wrong, a line each
    set_faults(items)              the same of a whole set, as in selected.jsonl

Shares no function with questions.py, names.py or scenes.py: it has its own words, its own intervals, and
margins half as strict, so that it speaks up only where a question may mislead.
"""

import json
import re
from collections import Counter, defaultdict
from math import atan2, degrees, hypot

from questions import CATEGORIES, FORMS, LEVELS

# ---- words -------------------------------------------------------------------------------------------------
WIDER = {
    "person": "man woman boy girl guy lady kid child baby player batter catcher pitcher umpire skier rider "
    "surfer driver worker snowboarder skateboarder spectator "
    "pedestrian chef officer policeman soldier adult human "
    "gentleman male female toddler cyclist fan tourist passenger student bride groom athlete",
    "child": "boy girl kid baby toddler",
    "man": "guy gentleman groom policeman player batter catcher pitcher umpire skier rider surfer driver "
    "worker snowboarder skateboarder spectator pedestrian chef officer soldier adult human male",
    "woman": "lady bride player skier rider surfer driver worker pedestrian chef officer adult human female",
    "player": "batter catcher pitcher athlete",
    "vehicle": "car truck bus van taxi cab suv jeep minivan motorcycle train trailer pickup",
    "car": "taxi cab suv jeep van minivan sedan",
    "truck": "pickup van lorry",
    "animal": "dog cat cow horse sheep bird bear elephant giraffe zebra lion goat duck puppy kitten pony",
    "plant": "tree bush flower shrub palm",
    "bird": "duck pigeon seagull goose parrot",
    "seat": "chair bench couch sofa stool",
    "building": "house tower church hotel skyscraper home",
    "sign": "board billboard poster logo",
    "bag": "purse handbag backpack luggage suitcase sack",
    "picture": "painting photo poster portrait frame",
    "dish": "plate bowl saucer platter",
    "boat": "ship sailboat canoe kayak yacht",
    "cup": "mug",
    "utensil": "knife fork spoon",
    "container": "box bottle jar carton",
    "hat": "cap helmet",
    "shoe": "sneaker boot sandal",
    "board": "surfboard skateboard snowboard",
}
SYNONYMS = [
    set(names.split(","))
    for names in (
        "plane,airplane,jet,aircraft",
        "bike,bicycle",
        "motorcycle,motorbike,scooter",
        "couch,sofa",
        "tv,television,monitor,screen",
        "phone,cellphone,telephone",
        "table,desk,counter",
        "street,road",
        "pants,jeans,trousers",
        "jacket,coat",
        "glass,cup",
        "glass,glasses",
        "glasses,sunglasses,goggles",
        "rock,stone,boulder",
        "rug,carpet,mat",
        "pillow,cushion",
        "trash can,bin",
        "fridge,refrigerator",
        "stove,oven",
        "cabinet,cupboard",
        "lamp,light",
        "donut,doughnut",
        "laptop,computer",
        "curtain,drape",
        "pole,post",
        "tree,bush,plant",
        "chair,seat,stool",
        "bench,seat",
        "fence,railing",
        "kid,child",
        "sidewalk,pavement",
        "racket,racquet",
    )
]
COLOURS = set("red green blue orange black white yellow brown gray grey purple pink silver tan".split())
WHOLE = {"hot dog", "teddy bear", "parking meter", "fire hydrant", "sea lion", "hair drier"}
PLURALS = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "knives": "knife",
    "shelves": "shelf",
    "mice": "mouse",
    "feet": "foot",
    "leaves": "leaf",
    "geese": "goose",
}
WORN = set("shirt pants jeans shorts jacket coat sweater dress skirt hat cap shoe sneaker glove sock".split())


def head_of(name: str) -> str:
    return name if name in WHOLE else name.split(" ")[-1]


def may_mean(name: str, written: str) -> bool:
    """Whether what is written as one name may be what a reader understands by another."""
    if name == written:
        return True
    one, two = head_of(name), head_of(written)
    if one == two:
        colours = {name.split(" ")[0], written.split(" ")[0]} & COLOURS
        return len(colours) < 2
    if any({one, two} <= group or {name, written} <= group for group in SYNONYMS):
        return True
    return two in WIDER.get(one, "").split() or one in WIDER.get(two, "").split()


def meant(graph, name: str) -> list:
    """The objects that a reader may take a name for."""
    out = []
    for o in graph.objects:
        kinds = [k for k in o.kinds if not (head_of(k) == head_of(name) and k != name)]
        if name in o.kinds or any(may_mean(name, n) for n in (o.label, *kinds)):
            out.append(o)
    return out


def one_of_many(word: str) -> set[str]:
    """What a plural may be the plural of."""
    first, _, last = word.rpartition(" ")
    singles = {PLURALS.get(last, last), last}
    singles |= {last[:-1]} if last.endswith("s") else set()
    singles |= {last[:-2]} if last.endswith("es") else set()
    singles |= {last[:-3] + "y"} if last.endswith("ies") else set()
    return {f"{first} {s}".strip() for s in singles}


# ---- texts -------------------------------------------------------------------------------------------------
VERBS = (
    "on top of|sitting on|standing on|lying on|parked on|walking "
    "on|running on|mounted on|growing on|painted on|"
    "leaning on|on back of|jumping on|driving on|hanging from|"
    "flying over|jumping over|swimming in|sitting in|"
    "standing in|lying in|walking in|flying in|covered in|in "
    "front of|looking at|pointing at|facing away from|playing with|"
    "watching|facing|holding|carrying|riding|touching|using|"
    "eating|drinking|kicking|throwing|catching|pushing|"
    "pulling|lifting|hugging|kissing|hitting|swinging|biting|"
    "feeding|petting|driving|playing|cleaning|crossing|"
    "inside|behind|above|below|under|over|on|in"
)


def readings(form: str, text: str) -> list[dict]:
    """{slot: words} for every way to read a text as one of its form's phrasings."""
    found = []
    name = "[a-z]+(?: [a-z]+){0,3}"
    for phrasing in FORMS[form][1]:
        for verb in VERBS.split("|") if "{verb}" in phrasing else [""]:
            pattern = re.escape(phrasing)
            for slot in re.findall(r"\{(\w+)\}", phrasing):
                words = f"(?P<{slot}>{verb if slot == 'verb' else name})"
                pattern = pattern.replace(re.escape("{" + slot + "}"), words, 1)
            if match := re.fullmatch(pattern, text):
                found.append(match.groupdict())
    return found


def bare(name: str) -> str:
    return re.sub(r"^(an?|the) ", "", name)


# ---- intervals ---------------------------------------------------------------------------------------------
def size(o) -> tuple[float, float]:
    return o.box[2] - o.box[0], o.box[3] - o.box[1]


def space(o) -> float:
    return size(o)[0] * size(o)[1]


def middle(o) -> tuple[float, float]:
    return (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2


def common(a, b) -> float:
    w = max(0, min(a.box[2], b.box[2]) - max(a.box[0], b.box[0]))
    return w * max(0, min(a.box[3], b.box[3]) - max(a.box[1], b.box[1]))


def room(a, b) -> float:
    x = max(0, b.box[0] - a.box[2], a.box[0] - b.box[2])
    return hypot(x, max(0, b.box[1] - a.box[3], a.box[1] - b.box[3]))


def is_where(graph, a, b, where: str) -> bool:
    """Whether a is clearly there and nowhere else of the four sides, seen in the image."""
    (ax, ay), (bx, by) = middle(a), middle(b)
    apart = {
        "left of": (b.box[0] - a.box[2]) / graph.width,
        "right of": (a.box[0] - b.box[2]) / graph.width,
        "above": (b.box[1] - a.box[3]) / graph.height,
        "below": (a.box[1] - b.box[3]) / graph.height,
    }[where]
    along, across = abs(bx - ax), abs(by - ay)
    if where in ("above", "below"):
        along, across = across, along
    return apart >= 0.01 and along >= 1.5 * across


# ---- truth of each form ------------------------------------------------------------------------------------
UPON = {"on", "on top of", "sitting on", "standing on", "lying on", "parked on", "walking on", "running on"}
POSTURES = {"sitting on", "standing on", "lying on"}
CONTAINERS = set(
    "box bag basket bowl cup mug drawer car truck suitcase cabinet oven refrigerator fridge sink "
    "vase bottle jar toilet bathtub backpack".split()
)
SPATIAL = UPON | {
    "in",
    "inside",
    "under",
    "below",
    "above",
    "over",
    "behind",
    "in front of",
    "next to",
    "left of",
    "right of",
    "mounted on",
    "growing on",
    "hanging from",
    "beside",
    "near",
}
# What says the same of a pair. An answer needs one of them; a wrong option none.
SAYS = {
    "on": UPON, "inside": {"in", "inside"}, "in": {"in", "inside"}, "under": {"under", "below"},
    "below": {"under", "below"}, "above": {"above", "over"}, "on top of": {"on top of", "on"},
    "next to": {"next to", "beside", "near", "by", "close to"},
}  # fmt: skip
DEEDS = {
    "holding",
    "carrying",
    "kicking",
    "riding",
    "lying on",
    "throwing",
    "eating",
    "drinking",
    "sitting on",
    "standing on",
    "pushing",
    "pulling",
    "hugging",
    "using",
    "touching",
    "lifting",
}
# Two deeds that may be one and the same to a reader, or be done at once.
TOGETHER = [
    {
        "holding",
        "carrying",
        "lifting",
        "touching",
        "using",
        "eating",
        "drinking",
        "hugging",
        "pushing",
        "pulling",
    },
    {"holding", "throwing", "touching", "lifting"},
    {"riding", "sitting on", "standing on", "using", "touching", "holding"},
    {"lying on", "sitting on", "touching", "using"},
    {"lying on", "riding", "standing on"},
    {"kicking", "touching"},
]
GAZES = {"looking at", "watching", "facing", "pointing at"}
FOUR = {"left of", "right of", "above", "below"}
CORNERS = {"top left", "top right", "bottom left", "bottom right"}
CELLS = CORNERS | {"top", "bottom", "left", "right", "center"}
LINES = set("pole wire rope string cord cable line fence branch stick".split())
FRONTS = set("person man woman boy girl child dog cat horse cow sheep bird bear elephant giraffe zebra tv "
             "computer laptop house chair couch car truck bus van motorcycle bike".split())  # fmt: skip


class Reader:
    """What one question means in one graph; `faults` collects what is wrong."""

    def __init__(self, graph, q):
        self.graph, self.q, self.faults = graph, q, []
        self.drawn = graph.source == "drawn"
        self.said = defaultdict(set)
        for r in graph.relationships:
            self.said[r.subject, r.object].add(r.predicate)
        self.by_id = {o.id: o for o in graph.objects}
        self.d = hypot(graph.width, graph.height)

    def fault(self, wrong: bool, text: str):
        if wrong:
            self.faults.append(text)

    def one(self, name: str, may_be_small: bool = False):
        """The object a name stands for; a fault if it stands for none or for several."""
        objects = meant(self.graph, name)
        if len(objects) != 1:
            self.faults.append(f"{name}: may mean {[o.id for o in objects] or 'nothing'}")
            return None
        self.fault(objects[0].group or objects[0].crowd or objects[0].uncertain, f"{name}: is not one thing")
        return objects[0]

    def both(self, a, b) -> set[str]:
        return self.said[a.id, b.id] | self.said[b.id, a.id]

    def edge(self, o) -> bool:
        w, h = self.graph.width, self.graph.height
        return o.box[0] < 0.005 * w or o.box[1] < 0.005 * h or o.box[2] > 0.995 * w or o.box[3] > 0.995 * h

    def uses(self, *objects):
        """The gold scene is exactly these."""
        got, want = list(self.q.objects), [o.id for o in objects if o]
        self.fault(len(set(got)) < len(got) or set(got) != set(want), f"objects: {got}, used are {want}")

    def options(self, first, reference=()):
        """The things that the options name: the answer, then the others."""
        things = [self.one(name) for name in (self.q.answer, *self.q.wrong)]
        found = [t for t in things if t]
        self.fault(len({t.id for t in found}) < len(found), "options: two name one thing")
        for t in found:
            self.fault(any(t is r for r in reference), f"{t.label}: is asked about and an option")
        self.uses(*first, *things)
        return things[0], [t for t in things[1:] if t]

    def facts(self, *allowed):
        """The gold relationships are these; none may be allowed."""
        self.fault(tuple(self.q.relationships) not in allowed, f"relationships: {self.q.relationships}")

    # ---- relation ----
    def relation_triple(self, a: str, b: str):
        a, b = self.one(a), self.one(b)
        self.uses(a, b)
        if not a or not b:
            return
        fit = SAYS.get(self.q.answer, {self.q.answer})
        asserted = sorted(self.said[a.id, b.id] & fit)
        self.fault(not asserted, f"answer: no triple says {self.q.answer}")
        self.facts(*[((a.id, p, b.id),) for p in asserted])
        self.fault(
            bool((self.both(a, b) & SPATIAL) - fit), "answer: another relation of the pair is asserted"
        )
        for option in self.q.wrong:
            self.fault(
                not any(self.false(a, option, b, p) for p in asserted), f"option: {option} may be true"
            )
        if self.q.answer in ("behind", "in front of"):
            self.fault(
                not self.lower(*((a, b) if self.q.answer == "in front of" else (b, a))), "depth: box check"
            )

    def false(self, a, option: str, b, p: str) -> bool:
        """Whether a is surely not `option` b, given that it is p."""
        out = common(a, b) < 0.8 * space(a)
        within = a.box[0] >= b.box[0] - 0.05 * size(b)[0] and a.box[2] <= b.box[2] + 0.05 * size(b)[0]
        beside = max(b.box[0] - a.box[2], a.box[0] - b.box[2]) > 0
        if option in SAYS and p in SAYS[option]:
            return False
        if p in DEEDS - UPON:
            return option in DEEDS and not any({option, p} <= group for group in TOGETHER)
        if p in UPON:
            if option in POSTURES:
                return p in POSTURES
            return (
                option in ("under", "below") or option == "inside" and out or option == "next to" and within
            )
        if p in ("under", "below"):
            return option in (*UPON, "above", "inside") or option == "next to" and within
        if p in ("above", "over"):
            if option in UPON:
                return p == "above" and room(a, b) >= 0.01 * self.d
            return option in ("under", "below") or option == "inside" and out
        if p in ("in", "inside"):
            if option in UPON:
                return head_of(b.label) in CONTAINERS
            return option in ("under", "below", "above") or option == "next to" and not out
        if p in ("behind", "in front of"):
            return (
                option in {"behind", "in front of"} - {p} or option in ("inside", "on") and not common(a, b)
            )
        level = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1]) >= 0.15 * min(size(a)[1], size(b)[1])
        return (
            p == "next to" and beside and (option in ("inside", "on", "under") or option == "above" and level)
        )

    def lower(self, near, far) -> bool:
        least = 0.025 if {head_of(near.label), head_of(far.label)} & FRONTS else 0.01
        return near.box[3] - far.box[3] >= least * self.graph.height

    def relation_image(self, a: str, b: str):
        a, b = self.one(a), self.one(b)
        self.uses(a, b)
        self.fault({self.q.answer, *self.q.wrong} != FOUR, "options: not the four directions")
        if not a or not b or self.q.answer not in FOUR:
            return
        self.fault(not is_where(self.graph, a, b, self.q.answer), f"answer: not clearly {self.q.answer}")
        self.facts(((a.id, self.q.answer, b.id),))
        opposite = {"above": {"under", "below"}, "below": {"above", "over", "on", "on top of"},
                    "left of": {"right of"}, "right of": {"left of"}}[self.q.answer]  # fmt: skip
        self.fault(bool(self.said[a.id, b.id] & opposite), "answer: a triple says the opposite")
        if self.q.answer in ("above", "below") and not self.drawn:
            self.fault(
                min(a.box[3], b.box[3]) > 0.5 * self.graph.height, "answer: both may stand on the ground"
            )

    # ---- reach and orientation ----
    def triple_of(self, a, verbs, b) -> list:
        return [((a.id, p, b.id),) for p in sorted(self.said[a.id, b.id]) if p in verbs] if a and b else []

    def reach_what(self, a: str, verb: str):
        a = self.one(a)
        answer, wrong = self.options([a], [a])
        self.fault(verb not in DEEDS, f"verb: {verb} is no contact")
        if not a or not answer:
            return
        self.fault(not self.triple_of(a, {verb}, answer), f"answer: no triple says {a.id} {verb} {answer.id}")
        self.facts(*self.triple_of(a, {verb}, answer))
        for x in wrong:
            self.fault(bool(self.both(a, x)), f"option: {x.id} has to do with {a.id}")
            self.fault(room(a, x) < 0.015 * self.d, f"option: {x.id} is in reach")
        others = [o for (s, o), said in self.said.items() if s == a.id and o != answer.id and verb in said]
        self.fault(bool(others), f"answer: {a.id} {verb} {others} as well")

    def reach_how(self, a: str, b: str):
        a, b = self.one(a), self.one(b)
        self.uses(a, b)
        self.fault(not {self.q.answer, *self.q.wrong} <= DEEDS, "options: not all are deeds")
        if not a or not b:
            return
        said = self.said[a.id, b.id]
        self.fault(self.q.answer not in said, f"answer: no triple says {self.q.answer}")
        self.facts(((a.id, self.q.answer, b.id),))
        for option in self.q.wrong:
            for p in said:
                self.fault(
                    any({option, p} <= group for group in TOGETHER), f"option: {option} may be true too"
                )

    def orientation_gaze(self, a: str, verb: str):
        a = self.one(a)
        answer, wrong = self.options([a], [a])
        self.fault(verb not in GAZES, f"verb: {verb} is no gaze")
        if not a or not answer:
            return
        self.fault(not self.triple_of(a, {verb}, answer), f"answer: no triple says {a.id} {verb} {answer.id}")
        self.facts(*self.triple_of(a, {verb}, answer))
        seen = [o for (s, o), said in self.said.items() if s == a.id and o != answer.id and said & GAZES]
        self.fault(bool(seen), f"answer: {a.id} looks at {seen} as well")
        for x in wrong:
            (ax, ay), (bx, by), (cx, cy) = middle(a), middle(answer), middle(x)
            turn = abs(degrees(atan2(by - ay, bx - ax) - atan2(cy - ay, cx - ax))) % 360
            self.fault(min(turn, 360 - turn) < 22.5, f"option: {x.id} lies the same way")

    # ---- size, depth, distance ----
    def size_(self, fit):
        answer, wrong = self.options([])
        self.facts(())
        for o in filter(None, (answer, *wrong)):
            self.fault(self.edge(o), f"{o.id}: cut by the edge")
            self.fault(head_of(o.label) in LINES, f"{o.id}: a line fills no box")
        for x in wrong if answer else ():
            self.fault(not fit(answer, x), f"option: {x.id} is as good as {answer.id}")
            self.fault(max(common(answer, x) / space(answer), common(answer, x) / space(x)) > 0.75,
                       f"option: {x.id} and {answer.id} lie in one another")  # fmt: skip

    def larger(self, big, small) -> bool:
        (bw, bh), (sw, sh) = size(big), size(small)
        return space(big) >= 1.25 * space(small) and bw >= 1.05 * sw and bh >= 1.05 * sh

    def size_largest(self):
        self.size_(self.larger)

    def size_smallest(self):
        self.size_(lambda small, big: self.larger(big, small))

    def size_tallest(self):
        self.size_(lambda tall, short: size(tall)[1] >= 1.15 * size(short)[1])

    def depth_nearer(self):
        answer, wrong = self.options([])
        for x in wrong if answer else ():
            self.before(answer, x)

    def depth_farther(self):
        answer, wrong = self.options([])
        for x in wrong if answer else ():
            self.before(x, answer)

    def before(self, near, far):
        """One thing is nearer: by a triple that the boxes agree with, or by measured depth."""
        steps, seen = [near.id], {near.id}
        for at in steps:
            for s, o in list(self.said):
                for start, end, p in ((s, o, "in front of"), (o, s, "behind")):
                    if start == at and end not in seen and p in self.said[s, o]:
                        if self.lower(self.by_id[start], self.by_id[end]):
                            steps.append(end)
                            seen.add(end)
        depths = near.depth, far.depth
        measured = None not in depths and depths[1] - depths[0] >= 0.075 * abs(depths[1])
        against = None not in depths and depths[0] > depths[1]
        against |= "behind" in self.said[near.id, far.id] or "in front of" in self.said[far.id, near.id]
        self.fault(
            not measured and far.id not in seen, f"depth: nothing says that {near.id} is before {far.id}"
        )
        self.fault(against, f"depth: {far.id} is before {near.id}, too")
        for s, p, o in self.q.relationships:
            self.fault(
                p not in self.said[s, o] or p not in ("in front of", "behind"), f"relationships: {s} {p} {o}"
            )

    def distance_image(self, a: str):
        a = self.one(a)
        answer, wrong = self.options([a], [a])
        if not a or not answer:
            return
        self.facts(((answer.id, "closest to", a.id),))
        least = room(answer, a)
        for o in (a, answer, *wrong):
            self.fault(head_of(o.label) in LINES, f"{o.id}: a line fills no box")
            self.fault(not self.drawn and abs(o.box[3] - a.box[3]) > 0.3 * self.graph.height,
                       f"{o.id}: stands elsewhere in depth")  # fmt: skip
        for x in wrong:
            gap = room(x, a)
            self.fault(gap < 1.5 * least or gap < least + 0.04 * self.d, f"option: {x.id} is as close")

    # ---- location ----
    def location_quadrant(self, a: str):
        a, g = self.one(a), self.graph
        self.uses(a)
        self.facts(())
        self.fault({self.q.answer, *self.q.wrong} != CORNERS, "options: not the four corners")
        if not a or self.q.answer not in CORNERS:
            return
        row, column = self.q.answer.split()
        for at, low, high, side, first in (
            (middle(a)[0], a.box[0], a.box[2], g.width, column == "left"),
            (middle(a)[1], a.box[1], a.box[3], g.height, row == "top"),
        ):
            inside = (min(high, side / 2) - min(low, side / 2)) / (high - low)
            inside = inside if first else 1 - inside
            off = (side / 2 - at) / side if first else (at - side / 2) / side
            self.fault(off < 0.05 or inside < 0.675, f"answer: {a.id} is not clearly {self.q.answer}")

    def location_cell(self, a: str):
        a, g = self.one(a), self.graph
        self.uses(a)
        self.facts(())
        self.fault(not {self.q.answer, *self.q.wrong} <= CELLS, "options: not all are cells")
        self.fault(len(self.q.wrong) != 3, "options: not four")
        if not a:
            return
        words = self.q.answer.split()
        column = 0 if "left" in words else 2 if "right" in words else 1
        row = 0 if "top" in words else 2 if "bottom" in words else 1
        for low, high, side, i in (
            (a.box[0], a.box[2], g.width, column),
            (a.box[1], a.box[3], g.height, row),
        ):
            fits = low >= (i / 3 - 1 / 36) * side and high <= ((i + 1) / 3 + 1 / 36) * side
            self.fault(not fits, f"answer: {a.id} is not in the cell {self.q.answer}")

    # ---- count and existence ----
    def count_voted(self, many: str):
        self.count_label(many, {name for o in self.graph.objects for name in (o.label, *o.kinds)})

    def count_label(self, many: str, known=None):
        names = one_of_many(many) & set(self.graph.exhaustive if known is None else known)
        if len(names) != 1:
            return self.fault(True, f"{many}: not counted in this image")
        (name,) = names
        of = [o for o in self.graph.objects if name == o.label or name in o.kinds]
        self.uses(*of)
        self.facts(())
        self.fault(self.q.answer != str(len(of)), f"answer: there are {len(of)}")
        extra = [o.id for o in meant(self.graph, name) if o not in of]
        self.fault(bool(extra), f"{name}: may mean {extra} as well")
        self.fault(any(o.group or o.crowd or o.uncertain for o in of), f"{name}: not single things")
        options = {self.q.answer, *self.q.wrong}
        self.fault(options not in ({"1", "2", "3", "4"}, {"5", "6", "7", "8"}), f"options: {sorted(options)}")

    def yes_or_no(self) -> bool:
        self.fault({self.q.answer, *self.q.wrong} != {"yes", "no"}, "options: not yes and no")
        return self.q.answer == "yes"

    def existence_label(self, a: str):
        name = bare(a)
        of = [o for o in self.graph.objects if name == o.label or name in o.kinds]
        self.facts(())
        if self.yes_or_no():
            self.fault(all(o.uncertain for o in of), f"answer: no {name} is known")
            self.uses(*of)
        else:
            self.fault(name not in self.graph.exhaustive, f"answer: a {name} may have no box")
            self.fault(
                bool(meant(self.graph, name)), f"answer: {[o.id for o in meant(self.graph, name)]} may be one"
            )
            self.fault(not self.q.objects, "objects: none")
            if self.drawn:
                self.uses(*self.graph.objects)

    def existence_triple(self, a: str, verb: str, b: str):
        a, b, yes = bare(a), bare(b), self.yes_or_no()
        used = [self.by_id[i] for i in self.q.objects if i in self.by_id]
        if (
            len(used) != 2
            or a not in (used[0].label, *used[0].kinds)
            or b not in (used[1].label, *used[1].kinds)
        ):
            return self.fault(True, f"objects: {self.q.objects} are not {a} and {b}")
        fit, (x, y) = SAYS.get(verb, {verb}), used
        for name in (a, b):
            self.one(name)  # "the cat" is one cat
        if yes:
            self.fault(not self.said[x.id, y.id] & fit, f"answer: no triple says {x.id} {verb} {y.id}")
            self.fault(x.uncertain or y.uncertain, "objects: uncertain")
            self.facts(*[((x.id, p, y.id),) for p in self.said[x.id, y.id] & fit])
        else:
            if len(meant(self.graph, a)) == len(meant(self.graph, b)) == 1:
                self.fault(not any(self.false(x, verb, y, p) for p in self.said[x.id, y.id]),
                           f"answer: {verb} may be true")  # fmt: skip
                self.fault(bool(self.said[x.id, y.id] & fit), f"answer: a triple says {verb}")
                self.facts(*[((x.id, p, y.id),) for p in self.said[x.id, y.id]])


def faults(graph, q, options=None) -> list[str]:
    """What is wrong with a question about a graph, a line each.

    Args: options: in the order shown, where they have one.
    """
    reader = Reader(graph, q)
    shown = [q.answer, *q.wrong]
    if q.form not in FORMS or q.category != FORMS[q.form][0] or q.category not in CATEGORIES:
        return [f"form: {q.form} of category {q.category}"]
    reader.fault(q.level not in LEVELS, f"level: {q.level}")
    reader.fault(not (type(q.rating) is int and 1 <= q.rating <= 10), f"rating: {q.rating}")
    reader.fault(q.image_id != graph.image_id, f"image_id: {q.image_id}")
    reader.fault(len({o.strip().lower() for o in shown}) < len(shown), f"options repeated: {shown}")
    reader.fault(not 2 <= len(shown) <= 4, f"options: {len(shown)} of them")
    reader.fault(options is not None and sorted(options) != sorted(shown), f"options shown: {options}")
    reader.fault(not q.objects or not set(q.objects) <= set(reader.by_id), f"objects: {q.objects}")
    ends = {i for s, _, o in q.relationships for i in (s, o)}
    reader.fault(
        not ends <= set(q.objects), f"relationships: {sorted(ends - set(q.objects))} not in the scene"
    )
    meanings = readings(q.form, q.text)
    if not meanings:
        return [*reader.faults, f"text: {q.text!r} is none of {q.form}"]
    check = getattr(reader, q.form.replace("/", "_"))
    attempts = []
    for meaning in meanings:
        reader.faults, before = [], reader.faults
        check(**meaning)
        attempts.append(reader.faults)
        reader.faults = before
    return reader.faults + min(attempts, key=len)


# ---- a set -------------------------------------------------------------------------------------------------
CLOSED = (
    "relation/image",
    "location/quadrant",
    "location/cell",
    "count/label",
    "count/voted",
    "existence/label",
    "existence/triple",
)


def set_faults(items: list[dict]) -> list[str]:
    """What is wrong with a whole set, records as in selected.jsonl."""
    out = []
    for split, n in sorted(
        {(i["split"], len(i["options"])) for i in items}
    ):  # each split is a set of its own
        letters = Counter(i["letter"] for i in items if (i["split"], len(i["options"])) == (split, n))
        counts = [letters["ABCD"[k]] for k in range(n)]
        if max(counts) - min(counts) > 1:
            out.append(f"{split}: letters of {n} options: {counts}")
    for split in ("train", "val"):
        of = [i for i in items if i["split"] == split]
        yes = Counter((i["form"], i["topic"]) for i in of if i["answer"] == "yes")
        no = Counter((i["form"], i["topic"]) for i in of if i["answer"] == "no")
        if yes != no:
            out.append(f"{split}: yes and no are uneven: {sorted((yes - no) + (no - yes))[:5]}")
        for form in CLOSED:
            asked = [i for i in of if i["form"] == form]
            chance = sum(1 / len(i["options"]) for i in asked) / max(1, len(asked))
            most = Counter(i["answer"] for i in asked).most_common(1)
            if most and most[0][1] / len(asked) > chance + 0.02 and most[0][1] > chance * len(asked) + 2:
                out.append(f"{split}: {form}: {most[0][0]!r} is right in {most[0][1]} of {len(asked)}")
    facts = Counter((i["image_id"], json.dumps(sorted(map(str, i["objects"]))), i["category"]) for i in items)
    out += [f"asked {n} times: {fact}" for fact, n in facts.items() if n > 1]
    groups = defaultdict(set)
    for i in items:
        groups[i["image_group"]].add(i["split"])
        if i["options"][ord(i["letter"]) - 65] != i["answer"]:
            out.append(f"{i['key']}: the letter {i['letter']} is not of {i['answer']}")
    out += [f"group {g} is in two splits" for g, splits in groups.items() if len(splits) > 1]
    return out
