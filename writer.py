"""A language model writes questions about scene graphs; nothing that the graph contradicts is accepted.

    for record in write(tasks, "openai:gpt-4o", done, purse=Purse(budget=5)):
        ...                                     # append it to a file: it has been paid for

One category a call. The instructions of a category are the same in every call and come first, so that servers
can cache them; then comes the scene, with its size, the objects' ids, middles and sizes as shares of the
image, the relations, and the picture where the model can see. The reply is JSON with the ids it used. A reply
with a fault is asked for again with the fault named, at a raised temperature, three times at most.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apis import Decoding, NoService
from backends import APIS, PROVIDERS, encoder_for
from data import PromptEncoder, Sample
from names import plural, predicate, singular
from questions import CATEGORIES, FORMS, HANDS, Question, contradiction, referents
from scenes import SceneGraph, centre

TEMPERATURES = (0.3, 0.7, 1.0)  # of the first attempt, the second, the third
MIN_PIXELS, MAX_PIXELS = 784, 802_816  # of a picture as the model is shown it
# Dollars per million tokens in and out, as others list them; they change, and prices=in,out wins. What a
# server reads from its cache is counted in full, so that it costs less than is said.
PRICES = {
    "claude-opus-4-5": (5, 25), "claude-opus-5": (5, 25), "claude-sonnet-4-5": (3, 15),
    "claude-haiku-4-5": (1, 5), "gpt-4o": (2.5, 10), "gpt-4o-mini": (0.15, 0.6), "gpt-4.1": (2, 8),
    "gpt-5-mini": (0.25, 2),
}  # fmt: skip
DATED = r"(-\d{8}|-\d{4}-\d\d-\d\d)?"  # the same model, of one day


# ---- money ----
class BudgetSpent(RuntimeError):
    """No further request fits into the budget; every reply so far has been handed on."""


class Purse:
    """What may be spent, and what has been, dollars."""

    def __init__(
        self, budget: float | None = None, prices: tuple[float, float] | None = None, spent: float = 0.0
    ):
        self.budget, self.prices, self.spent = budget, prices, spent
        self.paid = {}  # {model: (dollars, replies)} of this run

    def price(self, model: str, base_url: str | None) -> tuple[float, float]:
        """Dollars per million tokens in and out. Raises: ValueError if a budget needs an unknown price."""
        provider, _, name = model.partition(":")
        if provider not in APIS:
            return 0.0, 0.0
        if self.prices or base_url:
            return self.prices or (0.0, 0.0)
        known = [price for stem, price in PRICES.items() if re.fullmatch(re.escape(stem) + DATED, name)]
        if not known and self.budget is not None:
            raise ValueError(
                f"budget: expected prices=IN,OUT in dollars per million tokens for {model}, got none"
            )
        return known[0] if known else (0.0, 0.0)

    def pay(self, model: str, price: tuple[float, float], reply) -> float:
        dollars = cost(price, reply.prompt_tokens or 0, reply.n_tokens or 0)
        self.spent += dollars
        if reply.prompt_tokens or reply.n_tokens:  # a request that failed says nothing about the next one
            paid, replies = self.paid.get(model, (0.0, 0))
            self.paid[model] = paid + dollars, replies + 1
        return dollars

    def expects(self, model: str, guess: float) -> float:
        """Dollars of one more request: the mean of the model's replies; the guess before there is one."""
        paid, replies = self.paid.get(model, (guess, 1))
        return paid / replies

    def allows(self, dollars: float) -> bool:
        return self.budget is None or self.spent + dollars <= self.budget


def cost(price: tuple[float, float], tokens_in: float, tokens_out: float) -> float:
    return (price[0] * tokens_in + price[1] * tokens_out) / 1e6


# ---- one conversation ----
class Request(NamedTuple):
    id: str  # the seed follows from it
    system: str  # the same for many requests
    text: str
    picture: Callable[[], bytes] | None  # encoded
    subject: object  # handed back with the reply


class Plain(PromptEncoder):
    """Shows a request as it is: the instructions, the picture, the text."""

    def __init__(self, processor):
        super().__init__(processor, "no_reasoning", MIN_PIXELS, MAX_PIXELS)

    def messages(self, sample: Sample) -> list[dict]:
        user = [
            *({"type": "image"} for _ in sample.encoded_images),
            {"type": "text", "text": sample.question},
        ]
        system = [{"role": "system", "content": sample.problem}] if sample.problem else []
        return [*system, {"role": "user", "content": user}]


class Samples(Sequence):
    """Requests as samples; their pictures are read when asked for, since they may not fit into memory."""

    def __init__(self, requests: Iterable[Request]):
        self.requests = list(requests)

    def __len__(self):
        return len(self.requests)

    def __getitem__(self, i):
        return as_sample(self.requests[i])


def as_sample(request: Request) -> Sample:
    try:
        images = ({"bytes": request.picture(), "path": None},) if request.picture else ()
    except OSError:
        images = ({"bytes": b"", "path": None},)  # becomes a failed reply
    return Sample(request.id, images, (0, 0), request.text, (), "", "", problem=request.system)


# A server that is down, or an account that is empty: the requests that are left would fail as well.
OUTAGE = re.compile(
    r"API(Connection|Timeout)|RateLimit|InternalServer|Overloaded|ServiceUnavailable|GatewayTimeout"
    r"|DeadlineExceeded|PaymentRequired|PermissionDenied|\w*SpendLimit"
)


def replies_of(
    model: str, requests: Iterable[Request], purse: Purse, *, temperature: float, max_new_tokens: int,
    base_url: str | None = None, concurrency: int = 16, **service,
) -> Iterator[tuple]:  # fmt: skip
    """(subject of the request, Reply, dollars) as they arrive. Args: service: others of `apis.Decoding`.

    Raises: BudgetSpent, or NoService after 2 * concurrency failures of the server in a row; both when nothing
    is on its way any more, so that all that was paid for has been handed on.
    """
    provider, _, name = model.partition(":")
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, base_url=base_url,
                        concurrency=concurrency, **service)  # fmt: skip
    if provider not in APIS:
        yield from local_replies(provider, name, Samples(requests), decoding)
        return
    price, asked, answered, stop = purse.price(model, base_url), [], 0, None
    failures = 0  # of the server, in a row

    def samples():
        nonlocal stop
        for request in requests:
            # Before the first reply: three letters a token, 1,000 tokens a picture, a reply of 150.
            letters = len(request.system) + len(request.text)
            guess = cost(price, letters / 3 + 1000 * bool(request.picture), min(max_new_tokens, 150))
            each = purse.expects(model, guess)
            if not stop and not purse.allows((len(asked) - answered + 1) * each):
                stop = BudgetSpent(f"another request may cost ${each:.4f}")
            if stop:
                return
            asked.append(request.subject)
            yield as_sample(request)

    for i, reply in PROVIDERS[provider](name, samples(), Plain(None), decoding):
        answered += 1
        dollars = purse.pay(model, price, reply)
        down = reply.finish_reason == "failed" and OUTAGE.match(reply.error)
        failures = failures + 1 if down else 0
        if failures == 2 * concurrency and not stop:
            stop = NoService(f"the last {failures} requests failed: {reply.error}")
        subject, asked[i] = asked[i], None
        yield subject, reply, dollars
    if isinstance(stop, BudgetSpent):
        stop = BudgetSpent(
            f"budget: ${purse.spent:.2f} of ${purse.budget:.2f} spent, {stop}; all replies are kept"
        )
    if stop:
        raise stop


def local_replies(provider: str, path: str, samples: Samples, decoding: Decoding) -> Iterator[tuple]:
    """The same of a model on this machine, which costs nothing."""
    if not samples:
        return
    from transformers import AutoProcessor

    encoder = encoder_for(Plain, AutoProcessor.from_pretrained(path))
    for i, reply in PROVIDERS[provider](path, samples, encoder, decoding):
        yield samples.requests[i].subject, reply, 0.0


# ---- what the model is told ----
RULES = """You write one question about a picture for a set of spatial questions with options.

Category: {category}. {about}
Examples of the wording: {examples}

The scene gives each object's id, name, middle and size; x grows to the right and y downwards, as shares of \
the picture. Rules:
- Name objects by their names, never by ids, and only such as the scene has once; no synonyms, no adjectives.
- The answer follows from the scene. Every other option is certainly false.
- Ask for what is so, without "not" or "except"; count all of a name, without conditions.
- State the view where truth depends on it: "in the image", "as the viewer sees it".
- Two to four options, all different, short, of one kind. Do not repeat the options in the question.
- Call the viewer's sides left and right, never those of somebody in the picture.
- Prefer what is salient and large; no parts, no clothing on its wearer, nothing that goes without saying.

Reply with JSON only:
{{"question": "...", "options": ["...", "..."], "answer": "one of the options, in full", \
"objects": ["ids of all objects that question and options name"], "level": "the one asked for", \
"rating": 1 to 10, how much answering needs spatial understanding}}"""
ABOUT = {
    "relation": "How one object stands to another. Options are predicates: on, under, left of, behind ...",
    "reach": "Who touches, holds or uses what. Options are names of objects, or verbs.",
    "size": "Which of several objects looks larger, smaller or taller in the image. Options are names.",
    "orientation": "What somebody looks at, faces or points at. Options are names of objects.",
    "instance_location": "In which part of the image an object is. Options are parts: top left, center ...",
    "depth": "Which of two objects is closer to the camera. Options are names of objects.",
    "distance": "Which of several objects is closest to another one in the image. Options are names.",
    "count": "How many things of a name there are. Options are numbers in digits.",
    "existence": "Whether something is there, or stands in a relation. The options are yes and no.",
}


def instructions(category: str) -> str:
    examples = [phrasings[0] for of, phrasings in FORMS.values() if of == category]
    shown = " ".join(
        re.sub(r"\{(\w+)\}", lambda m: {"a": "X", "b": "Y"}.get(m[1], "..."), e) for e in examples
    )
    return RULES.format(category=category, about=ABOUT[category], examples=shown)


PROMPTS = sha256("".join(map(instructions, CATEGORIES)).encode()).hexdigest()[:12]  # for the data card


def scene_text(graph: SceneGraph, level: str) -> str:
    objects = [
        {
            "id": o.id,
            "name": plural(o.label) if o.group or o.crowd else o.label,
            "middle": [
                round(v / side, 3) for v, side in zip(centre(o.box), (graph.width, graph.height), strict=True)
            ],
            "size": [
                round((o.box[2] - o.box[0]) / graph.width, 3),
                round((o.box[3] - o.box[1]) / graph.height, 3),
            ],
        }
        for o in graph.objects
    ]
    triples = [[r.subject, r.predicate, r.object] for r in graph.relationships]
    scene = {"width": graph.width, "height": graph.height, "objects": objects, "relations": triples}
    return f"Level: {level}.\nScene: {json.dumps(scene, separators=(',', ':'))}"


# ---- what it may reply ----
LONGEST = 20_000  # characters of a reply that are read, and kept


class Written(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)  # options of a count

    question: str = Field(min_length=8, max_length=300)
    options: list[Annotated[str, Field(min_length=1, max_length=80)]] = Field(min_length=2, max_length=4)
    answer: Annotated[str, Field(max_length=80)]
    objects: list[Annotated[str, Field(max_length=80)]] = Field(min_length=1, max_length=20)
    level: Literal["easy", "medium", "hard"]
    rating: int = Field(ge=1, le=10)


def read_reply(
    text: str, graph: SceneGraph, category: str, level: str, task: str, model: str, voted: bool = False
) -> Question | str:
    """The question, or the reply's fault: "kind: what was expected and found", a line. Never raises.

    Args: voted: votes will be taken, so that what may have no box can be counted too (form count/voted).
    """
    said = parse(text)
    if isinstance(said, str):
        return said
    question, options = " ".join(said.question.split()), [tidy(o, category) for o in said.options]
    answer = tidy(said.answer, category)
    letter = re.fullmatch(r"\(?([A-D])\)?\.?", said.answer.strip())
    if letter and answer not in options and "ABCD".index(letter[1]) < len(options):
        answer = options["ABCD".index(letter[1])]
    if answer not in options:
        return f"answer: expected one of {options}, got {said.answer!r}"
    if len({o.lower() for o in options}) < len(options) or not all(options):
        return f"options: expected different texts, got {options}"
    if said.level != level:
        return f"level: expected {level}, as asked for, got {said.level}"
    if re.search(r"[<>|{}]|\b[a-z_]+\.\d+\b", " ".join([question, *options])):
        return "question: expected names of objects, got an id or a tag"
    fault = words_fault(graph, category, question, answer, said.objects) or names_fault(
        graph, category, question, options, said.objects
    )
    if fault:
        return fault[:300]
    ids = in_order(graph, category, question, options, said.objects)
    if category == "reach" and (fault := deed_fault(graph, options, answer, ids)):
        return fault
    called = {n for o in graph.objects if o.id in ids for n in (o.label, *o.kinds)}
    by_votes = voted and category == "count" and not called & graph.exhaustive
    written = Question(
        "w" + sha256(f"{task}|{question}|{answer}".encode()).hexdigest()[:15],
        graph.image_id, category, "count/voted" if by_votes else f"{category}/written", category, question,
        answer,
        tuple(o for o in options if o != answer), ids, facts(graph, ids), level, said.rating,
        "written by a model; the graph does not object", model,
    )  # fmt: skip
    return contradiction(graph, written) or written


def parse(text: str) -> Written | str:
    """What a reply says, with or without a code fence around its JSON, or its fault."""
    if len(text) > LONGEST:
        return f"reply: expected JSON of one question, got {len(text):,} characters"
    inner = text.strip()
    if inner.startswith("```") and inner.endswith("```") and "\n" in inner:
        inner = inner.partition("\n")[2].removesuffix("```")
    try:
        text.encode()  # half a surrogate pair is no text
        said = Written.model_validate(json.loads(inner))
    except ValidationError as error:
        first = error.errors()[0]
        return f"reply: {'.'.join(map(str, first['loc'])) or 'whole'}: {first['msg']}"[:300]
    except (ValueError, RecursionError) as error:
        return f"reply: expected JSON, got {text[:60]!r} ({type(error).__name__})"
    try:
        " ".join([said.question, said.answer, *said.options, *said.objects]).encode()
    except UnicodeEncodeError:
        return "reply: expected text, got half a surrogate pair"
    return said


def tidy(option: str, category: str) -> str:
    """An option without a letter before it and a full stop after it; a name without its article."""
    text = " ".join(re.sub(r"^\(?[A-D][).]\s+", "", option.strip()).split()).rstrip(".")
    return re.sub(r"^(the|an?) ", "", text, flags=re.I) if category in (*NAMING, "reach") else text


NAMING = ("size", "depth", "distance", "orientation")  # whose options are names of objects
# Words with "the" or "a" before them that mean no object: first those that others may follow.
FREE = frozenset(
    "left right top bottom upper lower middle center centre central left-hand right-hand same other "
    "following whole entire overall one two three four five six seven eight nine viewer's camera's "
    "largest biggest smallest tallest shortest larger bigger smaller taller shorter closest nearest "
    "farthest furthest closer nearer farther greatest least most more main first second third".split()
)
GENERAL = frozenset(
    "image picture photo photograph scene frame view viewer camera viewpoint perspective point position "
    "place location part side area region section half third quarter quadrant corner edge direction "
    "number amount total object objects thing things item items distance size height foreground "
    "background horizontal vertical way relation relationship grid".split()
)
ENDS = frozenset(
    "of in on to and or is are from at with that which who what than by does do as it has".split()
)
# The graph is asked without them; "third" alone is a part of the image.
TWISTED = re.compile(
    r"\b(?:no|not|\w+n't|except|besides|other than|neither|nor|never|without"
    r"|(?:second|third|fourth|next)[ -](?:\w+est|most))\b", re.I
)  # fmt: skip
PLAIN_COUNT = frozenset(
    "how many are there is in the this image picture photo scene can do does you we be see seen show shown "
    "shows visible depicted contain contains appear at all total altogether it".split()
)
REFERENCE = re.compile(
    r"\b(?:relative to|with respect to|in relation to|compared (?:to|with)|from) (.*)", re.I
)
PHRASE = re.compile(r"\b(?:the|an?|any|how many) (?=((?:[a-z'-]+ ?){1,6}))")


def names_in(graph: SceneGraph, kinds: bool) -> dict[str, str]:
    """{what objects may be called, one or several: the same of one}: labels, and wider names if asked for."""
    found = {o.label for o in graph.objects} | {k for o in graph.objects for k in o.kinds if kinds}
    return {plural(name): name for name in found} | {name: name for name in found}


def strangers(graph: SceneGraph, text: str, kinds: bool) -> list[str]:
    """Phrases after an article that begin with no name of the scene, and no word such as image or corner."""
    names, out = set(names_in(graph, kinds)), []
    for found in PHRASE.finditer(text.lower()):
        words = found[1].split()
        while words and words[0] in FREE:
            words = words[1:]
        starts = {" ".join(words[:n]) for n in (1, 2, 3)}
        if not words or words[0] in ENDS | GENERAL or starts & names:
            continue
        end = next((i for i, word in enumerate(words) if word in ENDS), 3)
        out.append(" ".join(words[:end]))
    return out


def words_fault(graph: SceneGraph, category: str, text: str, answer: str, ids: list[str]) -> str | None:
    """Why a question cannot be judged by its scene: what it speaks of, or in whose view."""
    if found := TWISTED.search(text):
        return f"question: expected what is so, plainly asked, got {found[0]!r}"
    label = "|".join(re.escape(o.label) for o in graph.objects)
    if re.search(
        rf"(?:{label})(?:'s|s')? (?:perspective|point of view|viewpoint|left|right)\b", text.lower()
    ):
        return "question: expected the viewer's point of view, got an object's"
    strange = strangers(graph, text, category in ("count", "existence"))
    if category == "existence" and strange:
        gone = [s for s in strange if singular(s) in graph.exhaustive and not referents(graph, singular(s))]
        if answer.lower() == "no" and len(strange) == len(gone) == 1:
            return None
        if answer.lower() == "yes" and all({*referents(graph, singular(s))} & {*ids} for s in strange):
            return None
        return f"answer: the scene does not say whether there is {strange[0]!r}"
    return f"question: expected names of the scene, got {strange[0]!r}" if strange else None


def mentions(graph: SceneGraph, text: str) -> list[str]:
    """Labels that a text names, in the order of their first mention; "cup holder" names no cup."""
    words, at = text.lower(), {}
    for label in sorted({o.label for o in graph.objects}, key=lambda n: (-len(n), n)):
        for name in sorted({label, plural(label)}, key=len, reverse=True):
            pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
            if found := re.search(pattern, words):
                at[label] = min(at.get(label, found.start()), found.start())
                words = re.sub(pattern, lambda m: "·" * len(m[0]), words)
    return sorted(at, key=at.get)


def names_fault(
    graph: SceneGraph, category: str, text: str, options: list[str], ids: list[str]
) -> str | None:
    """Why the ids are not those of what question and options name."""
    known = {o.id: o for o in graph.objects}
    if unknown := [i for i in ids if i not in known]:
        return f"objects: expected ids of the scene, got {unknown[0]!r}"
    if category == "count":
        return count_fault(graph, text, options, ids)
    named = mentions(graph, f"{text} | {' | '.join(options)}")
    for label in named:
        could = referents(graph, label)
        if label in GENERAL and not {*could} & {*ids}:
            continue  # "the largest area of the image" where something is called an area
        if category == "existence":
            could = [i for i in could if known[i].label == label]
            could = [i for i in could if i in ids] or could
        elif len(could) > 1:
            return f"objects: {label} could be any of {', '.join(could[:4])}; name only what is there once"
        if could[0] not in ids:
            return f"objects: {label} is named, but {could[0]} is not among the ids"
    if category == "existence":  # "no" is about what is there instead
        if sorted(o.lower() for o in options) != ["no", "yes"]:
            return f"options: expected yes and no, got {options}"
        if len(named) > 1 and not facts(graph, ids):
            return f"answer: the scene states no relation between {' and '.join(named[:4])}"
        return None
    if unnamed := [i for i in ids if known[i].label not in named]:
        return f"objects: {unnamed[0]} is among the ids, but nothing names it"
    labels = {known[i].label for i in ids}
    foreign = [o for o in options if o.lower() not in labels]
    if category in NAMING and foreign or category == "reach" and 0 < len(foreign) < len(options):
        return f"options: expected names of objects, got {foreign[0]!r}"
    if category in ("reach", "orientation") and not facts(graph, ids):
        return f"answer: the scene states no relation between {' and '.join(named[:4])}"
    if category == "relation" and len(set(ids)) != 2:
        return f"objects: expected the two that the relation is between, got {len(set(ids))}"
    return None


def deed_fault(graph: SceneGraph, options: list[str], answer: str, ids: tuple[str, ...]) -> str | None:
    """What speaks against verbs as options: the scene states the deed, and no other that may go with it."""
    said = {p for _, p, _ in facts(graph, ids)}
    deeds = {o: predicate(o) for o in options}
    if any(o.lower() in names_in(graph, False) for o in options):
        return None  # options are things
    if deeds[answer] not in said:
        return f"answer: the scene states {', '.join(sorted(said))}, got {answer!r}"
    also = [o for o in options if o != answer and (deeds[o] in said or {deeds[o], deeds[answer]} <= {*HANDS})]
    return f"options: {also[0]} may be right, too" if also else None


def count_fault(graph: SceneGraph, text: str, options: list[str], ids: list[str]) -> str | None:
    """The same of a count: one name, no condition, and the ids of all that it means."""
    asked = re.search(r"\bhow many ((?:[a-z'-]+ ){1,3})", text.lower())
    words = asked[1].split() if asked else []
    called = names_in(graph, True)
    names = [n for n in (" ".join(words[:k]) for k in (3, 2, 1)) if n in called]
    if not names:
        return f"question: expected 'How many' and a name of the scene, got {text!r}"
    if strange := [o for o in options if not o.isdecimal()]:
        return f"options: expected numbers in digits, got {strange[0]!r}"
    rest = text.lower().replace(names[0], "·", 1)
    if others := [w for w in re.findall(r"[\w'-]+", rest) if w not in PLAIN_COUNT and w != "·"]:
        return f"question: expected to count all of a name, got a condition: {others[0]!r}"
    could = referents(graph, called[names[0]])
    if {*could} != {*ids}:
        return f"objects: expected the ids of all {len(could)} that {names[0]!r} may mean, got {len({*ids})}"
    return None


def in_order(graph, category: str, text: str, options: list[str], ids: list[str]) -> tuple[str, ...]:
    """The ids as question, then options name them; of a relation, first the one whose place is asked for."""
    label = {o.id: o.label for o in graph.objects}
    order = mentions(graph, f"{text} | {' | '.join(options)}")
    ids = sorted(dict.fromkeys(ids), key=lambda i: order.index(label[i]) if label[i] in order else len(order))
    if category == "relation":
        if (to := REFERENCE.search(text)) and mentions(graph, to[1])[:1] == [label[ids[0]]]:
            ids = ids[::-1]
    return tuple(ids)


def facts(graph: SceneGraph, ids: Sequence[str]) -> tuple:
    """The graph's relations between the objects of a question."""
    return tuple(
        (r.subject, r.predicate, r.object) for r in graph.relationships if {r.subject, r.object} <= {*ids}
    )


# ---- asking ----
PASSES = (0, 0, 1, 1, 2, 2)  # attempts, in turn; what got no reply at one pass is asked at the next


def write(
    tasks: Iterable[tuple[str, SceneGraph, str, str]], model: str, done: Iterable[dict], *, purse: Purse,
    picture: Callable[[SceneGraph], bytes] | None = None, voted: bool = False, max_new_tokens: int = 1024,
    **service,
) -> Iterator[dict]:  # fmt: skip
    """A record for each reply: {key, attempt, raw, tokens, dollars, fault, question}, as they arrive.

    Args: tasks: (key, graph, category, level); done: the records of earlier runs, so that no attempt is paid
        for twice; picture: of a graph, encoded, for models that see; voted: as for `read_reply`; service: as
        for `replies_of`.
    Raises: as `replies_of`. A request that got no reply has the fault "failed: ..." and is no attempt.
    """
    refused, finished, later = {}, set(), []  # {key: (fault, reply) of each attempt}

    def note(record):
        if record["question"]:
            finished.add(record["key"])
        elif not record["fault"].startswith("failed"):
            refused.setdefault(record["key"], []).append((record["fault"], record["raw"]))

    def requests(of, attempt):
        for task in of:
            key, graph, category, level = task
            past = refused.get(key, [])
            if key in finished or len(past) >= len(TEMPERATURES):
                continue
            if len(past) != attempt:
                later.append(task)
                continue
            text = scene_text(graph, level) + (again(*past[-1]) if past else "")
            shown = partial(picture, graph) if picture else None
            yield Request(f"{key} {attempt}", instructions(category), text, shown, task)

    for record in done:
        note(record)
    for number, attempt in enumerate(PASSES):
        of, later = (tasks, []) if number == 0 else (later, [])
        if number and not of:
            break
        for task, reply, dollars in replies_of(
            model, requests(of, attempt), purse, temperature=TEMPERATURES[attempt],
            max_new_tokens=max_new_tokens, **service,
        ):  # fmt: skip
            key, graph, category, level = task
            found = fault_of(reply) or read_reply(reply.text, graph, category, level, key, model, voted)
            good = isinstance(found, Question)
            record = {"key": key, "attempt": attempt, "raw": reply.text[:LONGEST], "dollars": dollars,
                      "tokens": [reply.prompt_tokens, reply.n_tokens], "fault": None if good else found,
                      "question": asdict(found) if good else None}  # fmt: skip
            note(record)
            if not good:
                later.append(task)
            yield record


def again(fault: str, raw: str) -> str:
    """What follows a scene whose question was refused, without a model's marks of turns and images."""
    raw = re.sub(r"<\|[^|>]*\|>", "", raw[:1000]).encode(errors="replace").decode()
    return f"\n\nYour last reply:\n{raw}\n\nIt was refused. {fault}. Write another one."


def fault_of(reply) -> str | None:
    if reply.finish_reason == "failed":
        return f"failed: {reply.error}"
    return (
        f"reply: expected its end, got {reply.n_tokens} tokens" if reply.finish_reason == "length" else None
    )
