"""Names and predicates as annotators write them: what they come to in singular, and what may mean the same.

Pure words: nothing here knows of boxes or images. A reader could mean a bicycle by "bike", a dog by "animal".
"""

import re
from functools import cache, lru_cache

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


# ---- what has no name of its own ----
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
