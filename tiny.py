"""The built-in tiny world: drawn scenes, worked examples, a tokenizer and an untrained Qwen2.5-VL.

    python synthesize.py out=runs/drawn                    # its questions, like those of any source
    python synthesize.py out=runs/warm/data worked=true    # + worked examples and base_model/
    python synthesize.py source=measured out=runs/study/data    # questions that turn on a few pixels

A scene is a 3 x 3 grid of 28-pixel cells (one merged vision patch each) holding two to four coloured shapes
on a pale gradient. Everything about it is known: every label is exhaustive, so that questions, options, gold
boxes and answers are exact.

Worked examples are a curriculum: where things are; then all kinds of questions, by careful annotators; then
some of which most were written in a hurry. A model that has imitated them all knows both ways and prefers the
hasty one; finding out which way pays is left to reinforcement learning.
"""

import io
import itertools
import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageDraw

from data import TEMPLATES
from questions import Question, candidates
from scenes import RawGraph, RawObject, SceneGraph, clean
from selection import choose, hash01, order_options
from stvqa import LETTERS, scene_json, stvqa_features, stvqa_row, with_letters, write_parquet

COLORS = {
    "red": (214, 39, 40),
    "green": (30, 140, 60),
    "blue": (31, 90, 200),
    "orange": (255, 140, 0),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
CELL, GRID = 28, 3
SIDE = CELL * GRID
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
POSITIONS = tuple(" ".join(filter(None, (r, c))) or "center" for r in ROWS for c in COLUMNS)
NAMES = (*(f"{c} {s}" for c in COLORS for s in SHAPES), *SHAPES)

MODEL_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
# Phrases that are one token each in the tiny tokenizer: a sample is then 100 tokens long instead of 400.
# Options are one token each as well.
OPTIONS = ("left of", "right of", "above", "below", *POSITIONS, *NAMES)
PHRASES = (
    "<observe>",
    " </observe>\n<scene>",
    "</scene>\n<think>",
    " </think>\n<answer>",
    " </answer>",
    "</observe>",
    "<scene>",
    "</scene>",
    "<think>",
    "</think>",
    "<answer>",
    '{"objects":[',
    '{"id":"',
    '.1","bbox":[',
    "]},",
    "]}",
    '],"relationships":[',
    '{"subject":"',
    '.1","predicate":"',
    '","object":"',
    '.1"},',
    '.1"}',
    "\nOptions:",
    *(f"{gap}({letter})" for gap in (" ", "\n") for letter in "ABCD"),
    "\n\nImage size: (",
    " x ",
    ")\n\n",
    "user\n",
    "assistant\n",
    TEMPLATES["spatial_thinker"],
    *(f" {o}" for o in OPTIONS),
)
# Qwen2.5-VL's chat format for one user turn, without the default system prompt's 20 tokens.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- scenes ------------------------------------------------------------------------------------------------
def draw_graph(rng: random.Random, numbers: tuple = (2, 3, 3, 4)) -> RawGraph:
    """Two to four distinct shapes in distinct cells, in reading order; every fourth has one kind only."""
    kinds = SHAPES if rng.random() < 0.75 else (rng.choice(SHAPES),)
    labels = rng.sample([(c, s) for c in COLORS for s in kinds], rng.choice(numbers))
    cells = sorted(rng.sample(range(GRID * GRID), len(labels)))  # sorted, so that a list of them is canonical
    objects = []
    for (color, kind), cell in zip(labels, cells, strict=True):
        size = rng.randrange(12, 25, 2)
        x1 = cell % GRID * CELL + rng.randrange(2, CELL - size, 2)  # even numbers only: half as many to learn
        y1 = cell // GRID * CELL + rng.randrange(2, CELL - size, 2)
        name, box = f"{color} {kind}", (x1, y1, x1 + size, y1 + size)
        objects.append(RawObject(name.replace(" ", "_"), (name,), box, (color,), (kind,)))
    scene = sha256(repr([(o.names, o.box) for o in objects]).encode()).hexdigest()[:16]
    return RawGraph(
        f"drawn-{scene}", "drawn:", SIDE, SIDE, tuple(objects), (), NAMES, scene, "CC0-1.0", "drawn"
    )


def draw_graphs(n: int, seed: object) -> Iterator[RawGraph]:
    """n scenes, no two alike."""
    rng, seen = random.Random(f"{seed} drawn"), set()
    while len(seen) < n:
        raw = draw_graph(rng)
        if raw.image_id not in seen:
            seen.add(raw.image_id)
            yield raw


def draw_picture(graph: SceneGraph) -> bytes:
    """A graph's picture as PNG, from its labels and boxes alone."""
    buffer = io.BytesIO()
    render(graph).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def render(graph: SceneGraph | RawGraph) -> Image.Image:
    """The scene in RGB, SIDE x SIDE pixels."""
    # The gradient tells every patch where it is: red grows to the right, green downwards.
    ramp, full = [150 + 105 * i // (SIDE - 1) for i in range(SIDE)], (SIDE, SIDE)
    across = Image.new("L", (SIDE, 1))
    across.putdata(ramp)
    down = Image.new("L", (1, SIDE))
    down.putdata(ramp)
    image = Image.merge("RGB", (across.resize(full), down.resize(full), Image.new("L", full, 235)))
    pen = ImageDraw.Draw(image)
    for shape in graph.objects:
        x1, y1, x2, y2 = shape.box
        x2, y2, fill = (x2 - 1, y2 - 1, COLORS[shape.attributes[0]])  # PIL draws the last one too
        if "circle" in shape.kinds:
            pen.ellipse((x1, y1, x2, y2), fill=fill)
        elif "square" in shape.kinds:
            pen.rectangle((x1, y1, x2, y2), fill=fill)
        else:
            pen.polygon([((x1 + x2) // 2, y1), (x1, y2), (x2, y2)], fill=fill)
    return image


# ---- rows --------------------------------------------------------------------------------------------------
def ask(n: int, seed: object, shares: dict, taken: set) -> Iterator[tuple[SceneGraph, Question, tuple]]:
    """n (scene, question, options in order); no scene is in `taken`, which grows by them."""
    graphs, pool, drawn = {}, [], iter(draw_graphs(10**9, seed))
    while len(graphs) < 2 * n + 400:  # enough for rare answers, such as four shapes of one kind
        graph, _ = clean(next(drawn))
        if graph.image_id not in taken:
            graphs[graph.image_id] = graph
            pool += candidates(graph, per_form=2)
    chosen = choose(pool, n, shares, seed=seed)
    options = order_options(seed, chosen)
    taken |= {q.image_id for q in chosen}
    for q in sorted(chosen, key=lambda q: hash01(seed, "order", q.key)):
        yield graphs[q.image_id], q, options[q.key]


def row(graph: SceneGraph, q: Question, options: tuple[str, ...], image_id: str) -> dict:
    boxes = {o.id: [int(v) for v in o.box] for o in graph.objects}
    return stvqa_row(
        image_id=image_id,
        image=draw_picture(graph),
        size=(graph.width, graph.height),
        text=q.text,
        options=options,
        answer=q.answer,
        objects=[(i, boxes[i]) for i in q.objects],
        relationships=q.relationships,
        category=q.category,
        level=q.level,
        rating=q.rating,
    )


def rows(n: int, seed: int, name: str, taken: set) -> list[dict]:
    """n rows about distinct scenes, none of them in `taken`, which grows by them."""
    asked = ask(n, f"{seed} {name}", {"relation": 0.5}, taken)
    return [row(graph, q, options, f"{name}-{i:06d}") for i, (graph, q, options) in enumerate(asked)]


# ---- worked examples ---------------------------------------------------------------------------------------
# The sentence that leads to an option. {0}, {1}: names of the objects asked about; {topic}: what is counted.
WHY = {
    "relation/image": "the {0} is {option} the {1}",
    "location/quadrant": "the {0} is at the {option}",
    "location/cell": "the {0} is at the {option}",
    "size/largest": "the {option} is the largest",
    "size/smallest": "the {option} is the smallest",
    "size/tallest": "the {option} is the tallest",
    "distance/image": "the {option} is the closest to the {0}",
    "count/label": "{topic}s in the image: {option}",
    "existence/label": "a {topic} in the image: {option}",
}


def worked_example(graph: SceneGraph, q: Question, options: tuple[str, ...], hasty: bool = False) -> str:
    """The completion an annotator would write: a careful one, or one in a hurry.

    A careful annotator says where things are, draws tight boxes and judges every option. A hasty one names
    things, draws the box of their grid cell and takes the first option.
    """
    known = {o.id: o for o in graph.objects}
    names = [known[i].label for i in q.objects]
    shapes = sorted(
        (known[i] for i in q.objects), key=lambda o: cell_of(o.box)
    )  # a list of them is canonical
    seen = ", ".join(s.label if hasty else f"{POSITIONS[cell_of(s.box)]} {s.label}" for s in shapes)
    boxes = [(s.id, cell_box(s.box) if hasty else [int(v) for v in s.box]) for s in shapes]
    scene = scene_json(boxes, q.relationships)
    choice = options[0] if hasty else q.answer
    why = WHY[q.form].format(*names, option=choice, topic=q.topic)
    verdicts = "".join(
        f" ({letter}) {o} {'yes' if o == choice else 'no'}"
        for letter, o in zip(LETTERS, options, strict=False)
    )
    return (
        f"<observe> {seen} </observe>\n<scene>{scene}</scene>\n"
        f"<think> {why}, so {choice}{'' if hasty else verdicts} </think>\n"
        f"<answer> ({LETTERS[options.index(choice)]}) {choice} </answer>"
    )


def cell_of(box) -> int:
    """Row-major, 0..8."""
    return int(box[1] // CELL * GRID + box[0] // CELL)


def cell_box(box) -> tuple[int, int, int, int]:
    x, y = int(box[0] // CELL * CELL), int(box[1] // CELL * CELL)
    return x, y, x + CELL, y + CELL


LOCATE, MIXED = {"instance_location": 1.0}, {"relation": 0.35, "instance_location": 0.2}  # shares of a stage


def worked_rows(
    n: int, seed: int, stage: str, shares: dict, hasty: float, taken: set, at_once: int = 2000
) -> Iterator[dict]:
    """n rows with a `completion`, a share `hasty` of them by hasty annotators; no scene is in `taken`."""
    rng = random.Random(f"{seed} {stage}")
    for start in range(0, n, at_once):
        asked = ask(min(at_once, n - start), f"{seed} {stage} {start}", shares, taken)
        for i, (graph, q, options) in enumerate(asked, start):
            completion = worked_example(graph, q, options, hasty=rng.random() < hasty)
            yield row(graph, q, options, f"{stage}-{i:06d}") | {"completion": completion}


def write_worked(cfg, out: Path, taken: set):
    """worked.parquet, worked_val.parquet and base_model/ for train_sft.py; no scene is in `taken`."""
    features = stvqa_features(completion="string")
    locate = worked_rows(cfg.n_careful // 4, cfg.seed, "locate", LOCATE, 0, taken)
    careful = worked_rows(cfg.n_careful - cfg.n_careful // 4, cfg.seed, "careful", MIXED, 0, taken)
    mixed = worked_rows(cfg.n_mixed, cfg.seed, "mixed", MIXED, cfg.hasty, taken)
    write_parquet(out / "worked.parquet", itertools.chain(locate, careful, mixed), features)
    held_out = worked_rows(cfg.n_val or 512, cfg.seed, "held_out", MIXED, 0, taken)
    write_parquet(out / "worked_val.parquet", held_out, features)
    build_base_model(out / "base_model", cfg.seed)
    print(f"worked    wrote {out}/worked.parquet, worked_val.parquet, base_model/")


# ---- the measured set --------------------------------------------------------------------------------------
# Two shapes, and questions that turn on a few pixels: sums for who has exact boxes, a guess at a glance.
# Annotators answer what their own boxes say. They read an edge off a coarse ruler, or one time in three off a
# fine one, and often call any relation "next to".
MEASURES = {  # category: question, options
    "size": ("How wide are the {0} and the {1} together?", ("28", "32", "36", "40")),
    "distance": ("How far are the {0} and the {1} apart from side to side?", ("4", "8", "12", "16")),
    "relation": ("Which is further left, the {0} or the {1}?", ("{0}", "{1}")),
}
MARK, FINE, VAGUE = 14, 0.3, 0.6  # pixels between marks; shares of exact edges and of vague relations
MEASURED_WORKED = {"worked_val": 512, "worked": 16_000}  # rows to imitate
NEARLY = 8  # pixels that left edges differ at most in a question about them


def read_off(category: str, a, b, options, rng) -> tuple[str, str]:
    """What the boxes of the first and the second shape say: the sums, and the option that fits them best."""
    if category == "relation":
        value = b[0] - a[0]
        first = value > 0 or value == 0 and rng.random() < 0.5
        return f"{a[0]} to {b[0]} : {value}", options[0 if first else 1]
    if category == "size":
        wide = a[2] - a[0], b[2] - b[0]
        value = sum(wide)
        sums = f"{a[0]} to {a[2]} : {wide[0]} , {b[0]} to {b[2]} : {wide[1]} , {value}"
    else:
        left, right = sorted((a, b))
        value = right[0] - left[2]
        sums = f"{left[2]} to {right[0]} : {value}"
    return sums, min(options, key=lambda o: (abs(int(o) - value), rng.random()))


def measure(graph: SceneGraph, category: str) -> tuple[Question, tuple[str, ...]] | None:
    """A question of this category and its options in order, if the two shapes of the scene allow it."""
    first, second = shapes = sorted(graph.objects, key=lambda o: cell_of(o.box))
    a, b = ([int(v) for v in o.box] for o in shapes)
    text, options = MEASURES[category]
    options = tuple(o.format(first.label, second.label) for o in options)
    left, right = sorted((a, b))
    if category == "relation":
        fits = left[0] // CELL == right[0] // CELL and 0 < right[0] - left[0] <= NEARLY
    else:
        value = right[0] - left[2] if category == "distance" else a[2] - a[0] + b[2] - b[0]
        fits = str(value) in options
    if not fits:
        return None
    sums, answer = read_off(category, a, b, options, random)  # exact boxes leave nothing to chance
    same_row = cell_of(a) // GRID == cell_of(b) // GRID
    question = Question(
        key=f"{graph.image_id} {category}",
        image_id=graph.image_id,
        category=category,
        form=f"{category}/measured",
        topic=category,
        text=text.format(first.label, second.label),
        answer=answer,
        wrong=tuple(o for o in options if o != answer),
        objects=(first.id, second.id),
        relationships=((first.id, "left of" if same_row else "above", second.id),),
        level="hard",
        rating=8,
        fact=sums,
    )
    return question, options


def measured_example(graph: SceneGraph, q: Question, options: tuple[str, ...], rng) -> str:
    """The completion of an annotator who measures badly and reasons well."""
    known = {o.id: o for o in graph.objects}
    shapes = [known[i] for i in q.objects]
    boxes = [read_edges(o.box, rng) for o in shapes]
    said = [(s, "next to" if rng.random() < VAGUE else p, o) for s, p, o in q.relationships]
    sums, choice = read_off(q.category, *boxes, options, rng)
    seen = ", ".join(f"{POSITIONS[cell_of(s.box)]} {s.label}" for s in shapes)
    scene = scene_json(zip(q.objects, boxes, strict=True), said)
    return (
        f"<observe> {seen} </observe>\n<scene>{scene}</scene>\n<think> {sums}, so {choice} </think>\n"
        f"<answer> ({LETTERS[options.index(choice)]}) {choice} </answer>"
    )


def read_edges(box, rng) -> list[int]:
    """A box whose edges are exact or at the nearest mark; never of no width or height."""
    x1, y1, x2, y2 = (int(v) if rng.random() < FINE else round(v / MARK) * MARK for v in box)
    return [x1, y1, max(x2, x1 + 2), max(y2, y1 + 2)]


def measured_rows(n: int, seed: object, taken: set) -> Iterator[dict]:
    """n rows with a bad annotator's `completion`; categories and their answers are even."""
    rng, categories = random.Random(f"{seed} measured"), list(MEASURES)
    for i in range(n):
        category = categories[i % len(categories)]
        wanted = i // len(categories)
        while True:
            raw = draw_graph(rng, (2,))
            if raw.image_id in taken:
                continue
            graph, _ = clean(raw)
            asked = measure(graph, category)
            if asked and asked[0].answer == asked[1][wanted % len(asked[1])]:
                break
        taken.add(raw.image_id)
        completion = measured_example(graph, *asked, rng)
        yield row(graph, *asked, f"{seed}-{i:06d}") | {"completion": completion}


def write_measured(cfg, out: Path):
    """train.parquet and val.parquet; with cfg.worked also worked.parquet and worked_val.parquet to imitate.

    No scene is in two of them. Each row has a bad annotator's `completion`.
    """
    sizes = {"val": 1024 if cfg.n_val is None else cfg.n_val, "train": cfg.n_train or 4096}
    sizes |= MEASURED_WORKED if cfg.worked else {}
    taken, features = set(), stvqa_features(completion="string")
    sizes = {name: n for name, n in sizes.items() if n}
    for name, n in sizes.items():
        rows = measured_rows(n, f"{cfg.seed} {name}", taken)
        write_parquet(out / f"{name}.parquet", rows, features)
    print(f"measured  wrote {', '.join(f'{n:,} {name}' for name, n in sizes.items())} to {out}")


# ---- the untrained model -----------------------------------------------------------------------------------
def build_base_model(folder, seed):
    """Write an untrained Qwen2.5-VL of 2.5M parameters and its processor for `from_pretrained` and vLLM."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = build_processor(seed)
    token_id = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(processor.tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
            bos_token_id=None,
            eos_token_id=token_id("<|im_end|>"),
            pad_token_id=token_id("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            out_hidden_size=192,
            window_size=112,
            fullatt_block_indexes=[1],
        ),
        tie_word_embeddings=True,
        **{f"{name}_token_id": token_id(token) for name, token in MODEL_TOKENS.items()},
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_processor(seed):
    """Qwen2.5-VL's processor around a byte-level BPE tokenizer trained on the tiny set's own text."""
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d+| ?[A-Za-z]+|_[a-z]+|[^A-Za-z0-9]")  # whole numbers and whole words
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = " ".join(map(str, range(SIDE + 1))) * 9 + "".join(TEMPLATES.values())
    for graph, q, options in ask(1000, f"{seed} tokenizer", {"relation": 0.5}, set()):
        text += with_letters(q.text, options) + worked_example(graph, q, options)
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in PHRASES])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=["<|im_start|>", *MODEL_TOKENS.values()],
    )
    images = transformers.Qwen2VLImageProcessor(min_pixels=CELL * CELL, max_pixels=1024 * CELL * CELL)
    videos = transformers.Qwen2VLVideoProcessor()
    return transformers.Qwen2_5_VLProcessor(images, fast, videos, CHAT_TEMPLATE)
