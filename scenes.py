"""Scene graphs: what is in an image, where, and how things stand to one another.

A source (sources.py) gives a `RawGraph`, as its annotators wrote it; `clean` makes the `SceneGraph` that
questions are asked of, and counts what it dropped by reason.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import hypot

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


# ---- words -------------------------------------------------------------------------------------------------
SINGULAR = dict(
    pair.split(":")
    for pair in """\
men:man women:woman people:person persons:person children:child feet:foot teeth:tooth geese:goose mice:mouse
oxen:ox leaves:leaf knives:knife shelves:shelf bookshelves:bookshelf loaves:loaf halves:half wolves:wolf
calves:calf scarves:scarf hooves:hoof wives:wife cacti:cactus antennae:antenna buses:bus gases:gas lenses:lens
canvases:canvas irises:iris axes:axe movies:movie cookies:cookie brownies:brownie hoodies:hoodie
selfies:selfie smoothies:smoothie veggies:veggie zombies:zombie neckties:necktie bowties:bowtie
shoes:shoe snowshoes:snowshoe canoes:canoe toes:toe horseshoes:horseshoe headaches:headache mustaches:mustache
niches:niche quiches:quiche taxis:taxi kiwis:kiwi bikinis:bikini
martinis:martini zucchinis:zucchini menus:menu emus:emu tutus:tutu quizzes:quiz""".split()
)
# What some vocabularies cut an s off.
RESPELLED = {
    "pant": "pants",
    "short": "shorts",
    "jean": "jeans",
    "trouser": "trousers",
    "scissor": "scissors",
}
# One thing under a plural word.
PAIRS = frozenset(
    "glasses sunglasses eyeglasses goggles scissors pants trousers jeans shorts leggings tights pajamas "
    "skis headphones earphones binoculars pliers tongs stairs clothes".split()
)
NOT_PLURAL = re.compile(
    r"(ss|us|\b(news|gas|lens|canvas|christmas|always|species|series|tennis|iris|trellis|chassis|oasis|"
    r"clematis|pelvis|debris|axis|basis))$"
)
COLLECTIVE = frozenset(
    "crowd group herd flock pile bunch stack row pack team audience traffic luggage furniture cattle "
    "set line collection clothing silverware cluster couple family fleet foliage vegetation shrubbery "
    "dishware".split()
)
# A head noun that tells nothing about the whole: a hot dog is no dog.
NOT_ITS_HEAD = frozenset(
    "hot dog,teddy bear,sea lion,parking meter,hair drier,fire hydrant,license plate,licence plate".split(",")
)
COLOURS = frozenset(
    "red green blue orange black white yellow brown gray grey purple pink silver gold golden tan "
    "beige".split()
)
ARTICLES = re.compile(r"^(?:(?:a|an|the|this|that|these|those|his|her|its|their|one|all|both) )+")
NUMBERS = re.compile(
    r"^(?:\d+|two|three|four|five|six|seven|eight|several|many|multiple|few|some|lots of|various) "
)
WHERE = re.compile(r" (?:in|on|with|at|by|for|from|near|under|behind) .*")  # "man in shirt" is a man
SENTENCE = re.compile(r"\b(is|are|was|were|be|been|being|has|have)\b")
SUFFIX = re.compile(r"-(?:other-merged|merged|other|stuff|brick|stone|tile|wood)\b")  # panoptic COCO


@cache
def singular(name: str) -> str:
    """A name in singular: its last word; one for a pair ("scissors") stays as it is."""
    first, space, word = name.rpartition(" ")
    if word == "glasses" and first not in ("", "eye", "reading", "safety", "dark"):  # one drinks from these
        one = "glass"
    elif word in SINGULAR or word in RESPELLED:
        one = SINGULAR.get(word) or RESPELLED[word]
    elif word.endswith("men") and len(word) > 4 and word not in ("specimen", "abdomen"):
        one = word[:-2] + "an"
    elif word in PAIRS or not word.endswith("s") or len(word) < 3 or NOT_PLURAL.search(word):
        one = word
    elif word.endswith("ies"):
        one = word[:-3] + "y" if len(word) > 4 else word[:-1]  # berries; ties
    else:
        one = word[:-2] if re.search(r"(ch|sh|x|ss|zz|[^oa]us)es$|[^aeiou]oes$", word) else word[:-1]
    return first + space + one


@cache
def plural(name: str) -> str:
    """The plural of a name: of its last word."""
    first, space, word = name.rpartition(" ")
    irregular = [many for many, one in SINGULAR.items() if one == word]
    if irregular:
        many = "people" if word == "person" else irregular[0]
    elif word in PAIRS or word in ("sheep", "deer", "fish", "aircraft"):
        many = word
    elif re.search(r"[^u]man$", word) and word not in ("german", "roman", "ottoman"):
        many = word[:-2] + "en"
    elif re.search(r"[^aeiou]y$", word):
        many = word[:-1] + "ies"
    else:
        many = word + ("es" if re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", word) else "s")
    return first + space + many


def article(name: str) -> str:
    """a or an, or nothing before a word for a pair."""
    if name.rpartition(" ")[2] in PAIRS:
        return ""
    return "an" if re.match(r"[aeio]|u(?!ni|s)|hour", name) else "a"


@lru_cache(maxsize=100_000)
def label_of(text: str) -> tuple[str, bool] | None:
    """(name in singular, whether it means several things) of a name as written; None: not usable."""
    name = SUFFIX.sub("", " ".join(text.lower().split())).replace("-", " ").replace("_", " ")
    name = re.sub(r"^.*'s? (?=.)", "", name)  # "man's hat" is a hat
    name = ARTICLES.sub("", name.strip(" .,;:!?'\"")).strip()
    name, several = NUMBERS.subn("", name)
    first, of, rest = name.partition(" of ")
    word = singular(first.rpartition(" ")[2])
    group = bool(of) and word in COLLECTIVE
    name = NUMBERS.sub("", ARTICLES.sub("", rest)) if group or of and word == "pair" else first
    name = WHERE.sub("", name)
    group |= several > 0 or bool(of) and word == "pair" and name.rpartition(" ")[2] not in PAIRS
    if not re.fullmatch(r"[a-z]+( [a-z]+){0,2}", name) or SENTENCE.search(name):
        return None
    word, one = name.rpartition(" ")[2], singular(name)
    group |= one != name and word not in RESPELLED or one.rpartition(" ")[2] in COLLECTIVE
    return one, group


# Names between which annotators, and readers, do not choose reliably.
ALIKE = [
    frozenset(line.split(","))
    for line in """\
car,taxi,cab,suv,jeep,van,minivan,sedan,vehicle,traffic
truck,pickup,pickup truck,lorry,van,vehicle,traffic
bus,van,vehicle,traffic
vehicle,motorcycle,train,trailer
plane,airplane,jet,aircraft,aeroplane
bike,bicycle,cycle
motorcycle,motorbike,scooter,moped,bike
train,engine,locomotive,train car
boat,ship,sailboat,canoe,kayak,yacht,ferry,raft
table,desk,counter,countertop,stand
couch,sofa,loveseat,seat,bench
chair,seat,stool,armchair,bench,recliner
tree,plant,bush,shrub,palm,trunk,hedge
leaf,plant,branch,flower,blossom
building,house,tower,hotel,church,home,skyscraper
shoe,sneaker,boot,sandal,footwear,slipper
glass,glasses,sunglasses,eyeglasses,goggles,cup,mug
cup,mug,glass,tumbler
bag,purse,handbag,backpack,suitcase,luggage,sack
sign,board,billboard,logo,poster,letter,label,corkboard,whiteboard,blackboard,chalkboard
street,road,sidewalk,track,pavement,path,lane,highway,walkway
phone,cell phone,cellphone,telephone
tv,television,monitor,screen,computer,desktop
laptop,computer,notebook
computer,desktop,tower,case,cpu,pc
jacket,coat,sweater,hoodie,blazer,vest
shirt,blouse,top,jersey,t shirt,sweater
pants,jeans,trousers,shorts,leggings
hat,cap,helmet,beanie
dog,puppy,animal
cat,kitten,animal
cow,bull,calf,cattle,ox,animal,herd
horse,pony,donkey,zebra,animal,herd
sheep,lamb,goat,animal,herd,flock
bird,duck,pigeon,seagull,goose,parrot,animal,flock
bear,elephant,giraffe,lion,monkey,deer,animal,herd
picture,painting,photo,poster,frame,portrait
lamp,light,lantern,bulb
rock,stone,boulder
trash can,garbage can,bin,trash bin,can
rug,carpet,mat
curtain,drape,blind
pillow,cushion
plate,dish,bowl,platter,saucer,tray
racket,racquet
bathtub,tub
sofa,couch
cabinet,cupboard,drawer,dresser
snowboard,board,ski,skis
surfboard,board
skateboard,board
pole,post,lamppost
hill,mountain
box,carton,crate,container
bottle,jar,container
refrigerator,fridge
stove,oven
donut,doughnut
player,batter,catcher,pitcher,umpire
umbrella,parasol
knife,fork,spoon,utensil
fence,railing,gate
shelf,bookshelf,bookcase
paper,paperwork,document,note,sticky note,post it,post it note,envelope,letter""".splitlines()
]
FOOD = "apple,banana,orange,pizza,sandwich,cake,donut,bread,meat,broccoli,carrot,hot dog,fruit,vegetable"
ALIKE += [frozenset({"food", "meal", "snack", name}) for name in FOOD.split(",")]
PERSON = frozenset(
    "person man woman boy girl guy lady kid child baby player skier rider surfer batter catcher pitcher "
    "umpire snowboarder skateboarder spectator pedestrian driver passenger worker chef police officer "
    "policeman soldier human adult toddler student teacher bride groom male female gentleman father "
    "mother customer cyclist biker farmer performer athlete tourist fan crowd audience team family "
    "couple".split()
)
WIDE = frozenset("person human adult animal vehicle plant building food container player".split())
MALE = frozenset("man boy guy male gentleman father groom policeman".split())
FEMALE = frozenset("woman girl lady female mother bride".split())


def head(name: str) -> str:
    return name if name in NOT_ITS_HEAD else name.rpartition(" ")[2]


@cache
def senses(name: str) -> frozenset:
    """What a name shares with names that may mean the same thing."""
    found = {head(name)} | {i for i, names in enumerate(ALIKE) if name in names or head(name) in names}
    return frozenset(found | ({"person"} if head(name) in PERSON else set()))


@cache
def confusable(a: str, b: str) -> bool:
    """Whether a thing that one annotator calls a could be called b by a reader."""
    if a == b:
        return True
    if head(a) == head(b):
        colours = {a.partition(" ")[0], b.partition(" ")[0]} & COLOURS
        return len(colours) < 2  # a red circle is no blue circle; a street sign may be a stop sign
    sexes = [(head(n) in MALE, head(n) in FEMALE) for n in (a, b)]
    if sexes[0] != sexes[1] and all(map(any, sexes)):
        return False
    return bool(senses(a) & senses(b))


def could_be_called(obj: SceneObject, name: str) -> bool:
    """Whether a reader could mean an object by a name: by its own, a synonym, a wider or a narrower one."""
    if name == obj.label or name in obj.kinds:
        return True
    if head(name) == head(
        obj.label
    ):  # its own colour speaks against "red circle", whatever a circle could be
        return confusable(obj.label, name)
    return confusable(obj.label, name) or any(confusable(k, name) for k in obj.kinds)


# ---- predicates --------------------------------------------------------------------------------------------
PREDICATES = {name: kind for kind, names in {
    "support": "on,on top of,sitting on,standing on,lying on,parked on,walking on,running on,"
        "mounted on,growing on,driving on,painted on,leaning on,on back of,jumping on,"
        "crossing",
    "contain": "in,inside,sitting in,standing in,lying in,walking in,swimming in,flying in,"
        "covered in",
    "vertical": "above,over,under,below,flying over,jumping over,hanging from",
    "lateral": "left of,right of",
    "depth": "in front of,behind",
    "near": "near,next to,beside,by,close to,at,against,around,along,across from",
    "contact": "holding,carrying,riding,touching,using,eating,drinking,kicking,throwing,"
        "catching,pushing,pulling,lifting,hugging,kissing,hitting,swinging,biting,"
        "feeding,petting,driving,playing,playing with,cleaning",
    "gaze": "looking at,watching,facing,facing away from,pointing at",
    "possess": "has,of,with,wearing,part of,belonging to,made of,and,for,attached to,covering,"
        "from,to",
}.items() for name in names.split(",")}  # fmt: skip
# {form: -ing form}: "holds", "hold" -> "holding".
VERBS = {
    form: doing or verb + "ing"
    for verb, _, doing in (
        word.partition(":")
        for word in """\
hold carry touch use:using eat drink ride:riding play push pull kick hug:hugging kiss pet:petting lift throw
catch hit:hitting swing bite:biting feed clean drive:driving look watch face:facing point wear sit:sitting
stand lie:lying lay:lying walk run:running jump fly swim:swimming hang lean grow cross cover mount belong
rest float sleep park work""".split()
    )
    for form in (verb, verb + "s", verb + "es", verb[:-1] + "ies")
} | {
    "sat": "sitting", "seated": "sitting", "laying": "lying", "laid": "lying", "held": "holding",
    "hung": "hanging", "parking": "parked", "parks": "parked", "leaned": "leaning", "have": "has",
    "having": "has", "had": "has", "mounting": "mounted",
}  # fmt: skip
# How a thing rests or moves: "resting on" is on, "standing next to" is next to.
STANCES = frozenset(
    "sitting standing lying walking running jumping flying swimming hanging growing resting floating "
    "sleeping parked driving riding placed set piled stacked perched situated located docked mounted "
    "grazing crouching kneeling waiting posing leaning".split()
)
SAME = {alias: name for name, aliases in {
    "on top of": "atop,ontop of,on top",
    "on": "upon,onto",
    "under": "underneath,beneath,under of",
    "inside": "inside of,within,in side",
    "in": "into,parked in",
    "beside": "beside of,alongside",
    "next to": "adjacent to,next",
    "near": "near to",
    "in front of": "front of,in front",
    "behind": "behind of,in back of",
    "left of": "to left of,on left of,on left side of,to left side of",
    "right of": "to right of,on right of,on right side of,to right side of",
    "looking at": "staring at,looking towards,looking toward",
    "hanging from": "hanging on",
    "leaning on": "leaning against,propped against",
    "attached to": "attached,taped to,fixed to",
    "close to": "close",
    "facing away from": "facing away",
    "facing": "facing towards,facing toward",
    "riding": "riding on",
    "belonging to": "belongs to",
    "mounted on": "mounted to",
    "swinging": "swinging at",
}.items() for alias in aliases.split(",")}  # fmt: skip


@lru_cache(maxsize=100_000)
def predicate(text: str) -> str | None:
    """The name in PREDICATES of a predicate as written, or None."""
    words = re.sub("[^a-z ]", " ", text.lower()).split()
    words = [
        w for w in words if w not in ("a", "an", "the", "some", "is", "are", "was", "were", "be", "being")
    ]
    while len(words) > 1 and words[-1] in ("his", "her", "its", "their"):
        words.pop()
    if not words:
        return None
    verb, rest = VERBS.get(words[0], words[0]), " ".join(words[1:])
    rest = SAME.get(rest, rest)
    for name in (" ".join(words), f"{verb} {rest}".strip(), f"{verb} {' '.join(words[1:])}".strip()):
        name = SAME.get(name, name)
        if name in PREDICATES:
            return name
    short = {"on top of": "on", "inside": "in"}.get(rest)  # "sitting on top of"
    if short and f"{verb} {short}" in PREDICATES:
        return f"{verb} {short}"
    return rest if verb in STANCES and PREDICATES.get(rest) in PLACES else None


PLACES = frozenset(("support", "contain", "vertical", "lateral", "depth", "near"))


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
PARTS = frozenset(
    "head face hair eye nose mouth ear neck arm hand finger leg foot knee shoulder elbow back chest "
    "tail paw wing beak horn trunk mane fur body wheel tire window door handle windshield roof "
    "headlight bumper engine seat leaf branch screen button pocket sleeve collar logo "
    "label letter number word sticker top bottom side edge corner end part front knob lid leg strap "
    "lace stem petal skin tooth tongue lip chin beard mustache shade shadow reflection armrest rest "
    "frame pane hoof antler claw feather spot stripe design print pattern".split()
)
CLOTHING = frozenset(
    "shirt t-shirt pants jeans shorts jacket coat sweater dress skirt suit tie hat cap helmet glove "
    "shoe sneaker boot sock sandal glasses sunglasses goggles belt scarf vest uniform jersey hoodie "
    "blouse watch bracelet necklace ring earring headband wetsuit apron outfit clothes backpack".split()
)
STUFF = frozenset(
    "sky ground grass floor wall water road snow sand ceiling background street sidewalk pavement dirt "
    "field beach ocean sea river lake cloud air room area scene land hill mountain track playingfield "
    "gravel railroad floor counter forest wave court lawn yard platform fence wall building city light "
    "picnic day night outside inside outdoors indoors colour color paint space thing object item stuff "
    "view sunlight sun shadow cover padding material fabric surface stripe pattern line spot hole mess "
    "display".split()
)


UNNAMED = PARTS | STUFF | COLOURS | {"license plate", "licence plate"}
# Things of their own, though their last word is of those above.
WHOLE = frozenset("traffic light,stop light,street light,projector screen".split(","))


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
