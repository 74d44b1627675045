"""Draw the built-in tiny data set, its worked examples and an untrained tiny Qwen2.5-VL.

    python synthesize.py out=runs/tiny/data                      # train.parquet, val.parquet   (4 s)
    python synthesize.py out=runs/tiny/data worked=true          # + worked examples, base_model (1 min)

A scene is a 3 x 3 grid of 28-pixel cells (one merged vision patch each) holding two to four coloured shapes
on a pale gradient. Everything about it is known, so questions, options, gold boxes and answers are exact.
Rows have the columns and types of STVQA-7K; worked examples add a `completion` column for `train_sft.py`.

worked.parquet is a curriculum: examples by careful annotators, then some of which most were written in a
hurry. A model that has imitated them all knows both ways and prefers the hasty one; finding out which way
pays is left to reinforcement learning.
"""

import io
import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from config import Config, opt, write_whole
from data import TEMPLATES, build_prompt_text

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
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
CATEGORY_SHARE = {
    "relation": 0.35,
    "instance_location": 0.17,
    "size": 0.14,
    "distance": 0.12,
    "count": 0.12,
    "existence": 0.10,
}

COLUMNS = (
    "image_id",
    "images",
    "problem",
    "question_only",
    "answer",
    "answer_only",
    "answer_text",
    "answer_text_only",
    "answer_option_text",
    "answer_option_text_only",
    "category",
    "level",
    "question_with_options",
    "options",
    "rating",
)
MODEL_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
# Phrases that are one token each in the tiny tokenizer: a sample is then 100 tokens long instead of 400.
# Options are one token each as well.
OPTIONS = ("left of", "right of", "above", "below", *POSITIONS, *(f"{c} {s}" for c in COLORS for s in SHAPES))
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
    " (A)",
    " (B)",
    " (C)",
    " (D)",
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


class SynthesizeConfig(Config):
    out: str = opt("runs/tiny/data", "folder to write")
    n_train: int = opt(4096, "training rows", ge=1)
    n_val: int = opt(512, "held-out rows; no image is shared with training", ge=1)
    worked: bool = opt(False, "also write worked examples and base_model/ for train_sft.py")
    n_careful: int = opt(40000, "worked examples of stage 1", ge=0)
    n_mixed: int = opt(14000, "worked examples of stage 2", ge=0)
    hasty: float = opt(0.6, "share of hasty annotators in stage 2", ge=0, le=1)
    seed: int = opt(0, "every row follows from it")


# ---- scenes ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    color: str
    kind: str
    cell: int  # row-major, 0..8
    box: tuple[int, int, int, int]  # xyxy pixels, x2 and y2 exclusive

    @property
    def name(self):
        return f"{self.color} {self.kind}"

    @property
    def id(self):
        return f"{self.color}_{self.kind}.1"

    @property
    def size(self):
        return self.box[2] - self.box[0]

    @property
    def center(self):
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def draw_scene(rng):
    """Two to four distinct shapes in distinct cells, in reading order."""
    labels = rng.sample([(c, s) for c in COLORS for s in SHAPES], rng.choice((2, 3, 3, 4)))
    cells = sorted(rng.sample(range(GRID * GRID), len(labels)))  # sorted, so that a list of them is canonical
    shapes = []
    for (color, kind), cell in zip(labels, cells, strict=True):
        size = rng.randrange(12, 25, 2)
        x1 = cell % GRID * CELL + rng.randrange(2, CELL - size, 2)  # even numbers only: half as many to learn
        y1 = cell // GRID * CELL + rng.randrange(2, CELL - size, 2)
        shapes.append(Shape(color, kind, cell, (x1, y1, x1 + size, y1 + size)))
    return shapes


def render(shapes):
    """The shapes as an RGB image of SIDE x SIDE pixels."""
    # The gradient tells every patch where it is: red grows to the right, green downwards.
    ramp, full = [150 + 105 * i // (SIDE - 1) for i in range(SIDE)], (SIDE, SIDE)
    across = Image.new("L", (SIDE, 1))
    across.putdata(ramp)
    down = Image.new("L", (1, SIDE))
    down.putdata(ramp)
    image = Image.merge("RGB", (across.resize(full), down.resize(full), Image.new("L", full, 235)))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x1, y1, x2, y2 = shape.box
        x2, y2, fill = x2 - 1, y2 - 1, COLORS[shape.color]  # PIL includes the last pixel, boxes do not
        if shape.kind == "circle":
            pen.ellipse((x1, y1, x2, y2), fill=fill)
        elif shape.kind == "square":
            pen.rectangle((x1, y1, x2, y2), fill=fill)
        else:
            pen.polygon([((x1 + x2) // 2, y1), (x1, y2), (x2, y2)], fill=fill)
    return image


# ---- questions ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Question:
    category: str
    text: str
    options: tuple[str, ...]  # as shown
    answer: str
    shapes: tuple[Shape, ...]  # what the question is about: the gold scene
    relationships: tuple[tuple[str, str, str], ...]  # (subject id, predicate, object id)
    why: dict  # option -> the sentence that leads to it

    @property
    def letter(self):
        return "ABCD"[self.options.index(self.answer)]


def answer_slots():
    """{number of options: endless iterator of answer positions}: letters come out balanced, exactly."""
    return {n: itertools.cycle(range(n)) for n in (2, 3, 4)}


def ask(rng, shapes, category, slots):
    """A question of the category about the shapes, or None where the scene does not allow one."""
    # why: the sentence that leads to an option, with %s in the option's place
    if category == "relation":
        a, b = rng.sample(shapes, 2)
        (ax, ay), (bx, by) = a.center, b.center
        across, down = ("left of" if ax < bx else "right of"), ("above" if ay < by else "below")
        if a.cell % GRID == b.cell % GRID:
            answer, wrong = down, ["left of", "right of", {"above": "below", "below": "above"}[down]]
        elif a.cell // GRID == b.cell // GRID:
            answer, wrong = across, ["above", "below", {"left of": "right of", "right of": "left of"}[across]]
        else:
            return None  # both axes would be true
        text, about = f"Where is the {a.name} relative to the {b.name}?", [a, b]
        why, triples = f"the {a.name} is %s the {b.name}", [(a.id, answer, b.id)]
    elif category == "instance_location":
        a = rng.choice(shapes)
        answer, wrong = POSITIONS[a.cell], [p for p in POSITIONS if p != POSITIONS[a.cell]]
        text, about = f"Where in the image is the {a.name}?", [a]
        why, triples = f"the {a.name} is at the %s", []
    elif category == "size":
        ranked = sorted(shapes, key=lambda s: -s.size)
        if len(shapes) < 3 or ranked[0].size - ranked[1].size < 4:
            return None
        answer, wrong = ranked[0].name, [s.name for s in ranked[1:]]
        text, about = "Which object is the largest?", shapes
        why, triples = "the %s is the largest", []
    elif category == "distance":
        if len(shapes) < 3:
            return None
        a = rng.choice(shapes)
        ranked = sorted((math.dist(a.center, s.center), s.name, s) for s in shapes if s != a)
        if ranked[1][0] - ranked[0][0] < 8:
            return None
        answer, wrong = ranked[0][1], [name for _, name, _ in ranked[1:]]
        text, about = f"Which object is the closest to the {a.name}?", shapes
        why, triples = f"the %s is the closest to the {a.name}", [(ranked[0][2].id, "closest to", a.id)]
    elif category == "count":
        kind = rng.choice(shapes).kind
        about = [s for s in shapes if s.kind == kind]
        answer, wrong = str(len(about)), [n for n in "1234" if n != str(len(about))]
        text, why, triples = f"How many {kind}s are there?", f"{kind}s in the image: %s", []
    else:  # existence: half of them about something that is not there
        present = {s.name for s in shapes}
        absent = [f"{c} {k}" for c in COLORS for k in SHAPES if f"{c} {k}" not in present]
        there = rng.random() < 0.5
        name = rng.choice(sorted(present) if there else absent)
        answer, wrong = ("yes", ["no"]) if there else ("no", ["yes"])
        text, about = f"Is there a {name}?", shapes
        why, triples = f"a {name} in the image: %s", []
    wrong = rng.sample(wrong, min(len(wrong), rng.choice((2, 3, 3))))
    slot = next(slots[len(wrong) + 1])
    options = [*wrong[:slot], answer, *wrong[slot:]]
    if category != "relation":
        about = sorted(about, key=lambda s: s.cell)  # reading order, so that a list of them is canonical
    why = {o: why % o for o in options}
    return Question(category, text, tuple(options), answer, tuple(about), tuple(triples), why)


def draw_question(rng, slots, category=None):
    """(shapes, Question); without a category, one drawn by its share."""
    category = category or rng.choices(list(CATEGORY_SHARE), list(CATEGORY_SHARE.values()))[0]
    while True:
        shapes = draw_scene(rng)
        if question := ask(rng, shapes, category, slots):
            return shapes, question


# ---- rows --------------------------------------------------------------------------------------------------
def scene_json(objects, relationships):
    """objects: (id, box) pairs -> the scene graph's one-line JSON text."""
    objects = [{"id": i, "bbox": list(box)} for i, box in objects]
    relationships = [dict(zip(("subject", "predicate", "object"), r, strict=True)) for r in relationships]
    return json.dumps({"objects": objects, "relationships": relationships}, separators=(",", ":"))


def stvqa_row(image_id, image, q):
    scene = f"<scene>{scene_json([(s.id, s.box) for s in q.shapes], q.relationships)}</scene>"
    lettered = f"({q.letter}) {q.answer}"
    question = q.text + " " + " ".join(f"({'ABCD'[i]}) {o}" for i, o in enumerate(q.options))
    return {
        "image_id": image_id,
        "images": {"bytes": png(image), "path": None},
        "problem": build_prompt_text("spatial_thinker", question, image.size),
        "question_only": q.text,
        "answer": f"{scene}\n<answer>{q.letter}</answer>",
        "answer_only": q.letter,
        "answer_text": f"{scene}\n<answer>{q.answer}</answer>",
        "answer_text_only": q.answer,
        "answer_option_text": f"{scene}\n<answer>{lettered}</answer>",
        "answer_option_text_only": lettered,
        "category": q.category,
        "level": ("easy", "easy", "easy", "medium", "hard")[len(q.shapes)],
        "question_with_options": question,
        "options": list(q.options),
        "rating": 10,
    }


def worked_example(q, hasty=False):
    """The completion an annotator would write: a careful one, or one in a hurry.

    A careful annotator says where things are, draws tight boxes and judges every option. A hasty one names
    things, draws the box of their grid cell and takes the first option.
    """
    seen = ", ".join(s.name if hasty else f"{POSITIONS[s.cell]} {s.name}" for s in q.shapes)
    scene = scene_json([(s.id, cell_box(s.cell) if hasty else s.box) for s in q.shapes], q.relationships)
    choice = q.options[0] if hasty else q.answer
    verdicts = "".join(
        f" ({letter}) {o} {'yes' if o == choice else 'no'}"
        for letter, o in zip("ABCD", q.options, strict=False)
    )
    return (
        f"<observe> {seen} </observe>\n<scene>{scene}</scene>\n"
        f"<think> {q.why[choice]}, so {choice}{'' if hasty else verdicts} </think>\n"
        f"<answer> ({'ABCD'[q.options.index(choice)]}) {choice} </answer>"
    )


def cell_box(cell):
    x, y = cell % GRID * CELL, cell // GRID * CELL
    return x, y, x + CELL, y + CELL


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# ---- splits ------------------------------------------------------------------------------------------------
def rows(n, seed, name, taken):
    """n rows of distinct scenes, none of them in `taken`, which grows by them."""
    rng, slots = random.Random(f"{seed} {name}"), answer_slots()
    out = []
    while len(out) < n:
        shapes, question = draw_question(rng, slots)
        if tuple(shapes) not in taken:
            taken.add(tuple(shapes))
            out.append(stvqa_row(f"{name}-{len(out):06d}", render(shapes), question))
    return out


def worked_rows(cfg, stage, n, taken):
    """n worked examples of one stage; scenes may repeat among them but none is in `taken`."""
    rng, slots = random.Random(f"{cfg.seed} {stage}"), answer_slots()
    hasty = cfg.hasty if stage == "mixed" else 0
    for i in range(n):
        shapes, q = draw_question(rng, slots)
        while tuple(shapes) in taken:
            shapes, q = draw_question(rng, slots)
        image = render(shapes)
        completion = worked_example(q, hasty=rng.random() < hasty)
        yield stvqa_row(f"{stage}-{i:06d}", image, q) | {"completion": completion}


def stvqa_features(completion=False):
    from datasets import Features, Image, List, Value

    columns = dict.fromkeys(COLUMNS, Value("string")) | {
        "images": Image(),
        "options": List(Value("string")),
        "rating": Value("int64"),
    }
    return Features(columns | ({"completion": Value("string")} if completion else {}))


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
    rng, slots = random.Random(f"{seed} tokenizer"), answer_slots()
    text = " ".join(map(str, range(SIDE + 1))) * 9 + "".join(TEMPLATES.values())
    for _ in range(1000):
        _, q = draw_question(rng, slots)
        text += q.text + "".join(f" {o}" for o in q.options) + worked_example(q)
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


# ---- main --------------------------------------------------------------------------------------------------
def write_parquet(path, rows, features):
    from datasets import Dataset

    with write_whole(path) as tmp:
        Dataset.from_list(list(rows), features=features).to_parquet(tmp)
    print(f"wrote {path}")


def main():
    cfg = SynthesizeConfig.parse_args()
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    taken = set()
    val = rows(cfg.n_val, cfg.seed, "val", taken)
    write_parquet(out / "val.parquet", val, stvqa_features())
    write_parquet(out / "train.parquet", rows(cfg.n_train, cfg.seed, "train", set(taken)), stvqa_features())
    if cfg.worked:
        worked = itertools.chain(
            worked_rows(cfg, "careful", cfg.n_careful, taken), worked_rows(cfg, "mixed", cfg.n_mixed, taken)
        )
        write_parquet(out / "worked.parquet", worked, stvqa_features(completion=True))
        held_out = worked_rows(cfg, "held_out", cfg.n_val, taken)
        write_parquet(out / "worked_val.parquet", held_out, stvqa_features(completion=True))
        build_base_model(out / "base_model", cfg.seed)


if __name__ == "__main__":
    main()
