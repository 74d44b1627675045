"""Samples: load STVQA-7K or a look-alike, check every row, build prompts, resize, pack, and order batches.

    samples = load_samples("OX-PIXL/STVQA-7K", split="train")   # or a .parquet, .jsonl or save_to_disk folder
    samples[0].question, samples[0].load_images()

One prompt builder and one image path serve training, vLLM and evaluation, so that all three see the same
tokens. Boxes are in the pixels of the original image, whatever size the model is shown; the prompt states it.
"""

import base64
import functools
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from rewards import parse_ground_truth

# The column names of STVQA-7K. Another data set maps its own: columns={"question": "my_question", ...}.
COLUMNS = {
    "id": "image_id",
    "images": "images",
    "problem": "problem",
    "question": "question_with_options",
    "options": "options",
    "scene_answer": "answer_option_text",  # <scene>{json}</scene>\n<answer>(C) holding</answer>
    "answer": "answer_option_text_only",  # (C) holding
    "category": "category",
    "level": "level",
    "completion": "completion",  # a worked example, for supervised training only
}
OPTIONAL_COLUMNS = ("id", "problem", "category", "level", "completion")

# The first is the released inference template, word for word: the published checkpoints expect it.
TEMPLATES = {
    "spatial_thinker": (
        "You FIRST observe the image in <observe> </observe> tags, then visualise the relevant scene graph "
        "in <scene> </scene> tags, followed by thinking about the reasoning process as an internal monologue "
        "within <think> </think> tags and then provide the final answer. The final answer MUST BE put within "
        "<answer> </answer> tags, and only return the final choice including the correct option and answer "
        "within the answer tags, e.g., <answer> (A) cat </answer>."
    ),
    "reasoning": (
        "First reason step by step within <think> </think> tags, then give the final answer within <answer> "
        "</answer> tags: the letter of the correct option and its text, e.g., <answer> (A) cat </answer>."
    ),
    "no_reasoning": "Answer with the letter of the correct option and its text, e.g., (A) cat.",
}
SHOWS_SIZE = ("spatial_thinker",)  # only boxes need the frame they live in
SIZE_IN_PROMPT = re.compile(r"Image size: \(?(\d+) x (\d+)\)?")


# ---- samples -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One question about one or more images; the images stay encoded until `load_images`."""

    id: str
    encoded_images: tuple[dict, ...]  # {"bytes": ..., "path": ...} as the datasets library stores them
    size: tuple[int, int]  # (W, H) of the first image, pixels: the frame of every box
    question: str  # with its lettered options
    options: tuple[str, ...]
    answer: str  # "(C) holding"
    ground_truth: str  # "<scene>{json}</scene>\n<answer>(C) holding</answer>"; the answer where no scene is
    problem: str = ""  # the row's own full prompt
    category: str = ""
    level: str = ""
    completion: str = ""
    kind: str = "choice"  # or yes_no, number, word, point, sequence: how grading.py reads the answer
    meta: dict = field(default_factory=dict)  # what a benchmark's official score groups by

    def load_images(self) -> list[Image.Image]:
        return [to_rgb(open_image(e)) for e in self.encoded_images]


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; a depth map of more than 8 bits is scaled to them, where PIL would cut it off."""
    if image.mode.startswith(("I", "F")):
        depth = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((255 * (depth - depth.min()) / max(np.ptp(depth), 1e-9)).astype(np.uint8))
    return image.convert("RGB")


def open_image(encoded: dict) -> Image.Image:
    """The PIL image behind a {"bytes", "path"} record; only the header is read until pixels are asked for."""
    return Image.open(io.BytesIO(encoded["bytes"]) if encoded.get("bytes") else encoded["path"])


class Samples(Sequence):
    """The usable rows of a table, decoded one at a time, so that memory does not grow with their number."""

    def __init__(self, table, columns, rows, need_scene, clipped=0, skipped=(), max_images=1):
        self.table, self.columns, self.rows, self.need_scene = table, columns, rows, need_scene
        self.clipped, self.skipped = clipped, list(skipped)  # rows with clipped boxes; messages of bad rows
        self.max_images = max_images  # of one row

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.rows[i]
        return row_to_sample(self.table[row], self.columns, row, self.need_scene)[0]


def load_samples(
    source: str,
    split: str = "train",
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    need_scene: bool = True,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    prompt_length: Callable[[Sample], int] | None = None,
    max_prompt_length: int | None = None,
    skip_long_prompts: bool = False,
) -> Samples:
    """Load a data set and check every row before anything is trained on it.

    Args:
        source: Hub id, .parquet or .jsonl file, folder of parquet files, or `save_to_disk` folder.
        columns: names that differ from STVQA-7K's, as {our name: their name}; ours are the keys of COLUMNS.
        need_scene: the row must hold a gold scene (False for the sparse reward).
        skip_bad_rows: leave bad rows out and list them in `.skipped` instead of raising.
        prompt_length, max_prompt_length: a prompt of more tokens is an error too (or, with skip_long_prompts,
            left out). Prompts are never truncated: half a question has no answer.
    Raises: ValueError naming the row and the column.
    """
    if unknown := set(columns or {}) - set(COLUMNS):
        raise ValueError(f"columns: expected some of {list(COLUMNS)}, got {sorted(unknown)}")
    columns = COLUMNS | (columns or {})
    table = read_table(source, split, revision, [columns["images"]])
    needed = [
        c
        for key, c in columns.items()
        if key not in OPTIONAL_COLUMNS and (key != "scene_answer" or need_scene)
    ]
    if missing := [c for c in needed if c not in table.column_names]:
        raise ValueError(
            f"{source} ({split}): expected columns {needed}, missing {missing}, got {table.column_names}"
        )

    rows, skipped, clipped, max_images = [], [], 0, 0
    total = min(limit or len(table), len(table))
    for row in tqdm(range(total), desc=f"checking {Path(source).name} {split}", disable=None, leave=False):
        try:
            sample, was_clipped = row_to_sample(table[row], columns, row, need_scene)
            if prompt_length and (n := prompt_length(sample)) > max_prompt_length:
                message = f"row {sample.id}: prompt is {n} tokens long, expected at most {max_prompt_length}"
                if not skip_long_prompts:
                    raise ValueError(
                        f"{message} (raise max_prompt_length, lower max_pixels or set skip_long_prompts)"
                    )
                skipped.append(message)
                continue
        except ValueError as error:
            if not skip_bad_rows:
                raise ValueError(f"{source} ({split}): {error}") from None
            skipped.append(str(error))
            continue
        rows.append(row)
        clipped += was_clipped
        max_images = max(max_images, len(sample.encoded_images))
    if not rows:
        raise ValueError(
            f"{source} ({split}): no usable rows out of {total}" + "".join(f"\n  {s}" for s in skipped[:5])
        )
    return Samples(table, columns, np.array(rows), need_scene, clipped, skipped, max_images)


def read_table(
    source: str, split: str, revision: str | None, image_columns: Sequence[str], config: str | None = None
):
    """The rows as a memory-mapped `datasets.Dataset` whose images are left encoded.

    Args: source: Hub id (with `config`), .parquet, .jsonl or .tsv file (images in base64), or folder.
    """
    import datasets

    path = Path(source)
    if not source:
        raise ValueError("data: expected a Hub id, a file or a folder, got nothing")
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        table = datasets.load_from_disk(source)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"{source}: expected split {split!r}, got {list(table)}")
            table = table[split]
    elif path.is_dir():
        files = []
        for part in split.split("+"):  # "a+b" is how the Hub names the union of two splits
            files += sorted(path.glob(f"{part}*.parquet")) or sorted(path.glob(f"data/{part}*.parquet"))
        if not files:
            raise ValueError(
                f"{source}: expected {split}*.parquet in the folder, "
                f"got {sorted(p.name for p in path.iterdir())}"
            )
        table = datasets.Dataset.from_parquet([str(f) for f in files])
    elif path.suffix in (".parquet", ".jsonl", ".json", ".tsv"):
        if not path.exists():
            raise ValueError(f"{source}: no such file")
        kinds = {
            ".parquet": datasets.Dataset.from_parquet,
            ".tsv": functools.partial(datasets.Dataset.from_csv, sep="\t", keep_default_na=False),
        }
        try:
            table = kinds.get(path.suffix, datasets.Dataset.from_json)(str(path))
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(f"{source}: {error.__cause__ or error}") from None
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        table = datasets.load_dataset(source, config, split=split, revision=revision)
    else:
        raise ValueError(
            f"{source}: expected a Hub id, a .parquet, .jsonl or .tsv file, or a folder; found none of these"
        )

    base, written = path if path.is_dir() else path.parent, []  # columns with paths, relative to the file
    for name in image_columns:
        feature = table.features.get(name)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        elif feature is not None:
            written.append(name)

    def encode(x):
        if x is None or isinstance(x, list):
            return x and [encode(p) for p in x]
        if isinstance(x, (bytes, dict)):
            return {"bytes": x, "path": None} if isinstance(x, bytes) else x
        if path.suffix == ".tsv":
            return {"bytes": base64.b64decode(x), "path": None}
        return {"bytes": None, "path": str(base / x)}

    if written:
        table = table.with_transform(
            lambda batch: {k: [encode(x) for x in v] if k in written else v for k, v in batch.items()}
        )
    return table


def row_to_sample(row: dict, columns: dict[str, str], index: int, need_scene: bool) -> tuple[Sample, bool]:
    """-> (sample, whether a gold box was clipped). Raises ValueError naming the row and the column."""

    def get(key):
        return row.get(columns[key])

    row_id = f"{get('id')} (#{index})" if get("id") is not None else f"#{index}"

    def bad(key, expected, got):
        return ValueError(f"row {row_id}, column {columns[key]}: expected {expected}, got {got}")

    images = get("images")
    images = images if isinstance(images, list) else [images]
    if not images or any(e is None for e in images):
        raise bad("images", "an image", images or "nothing")
    try:
        size = open_image(images[0]).size
    except OSError as error:
        raise bad("images", "a readable image", error) from None

    options, answer, question = get("options"), get("answer"), get("question")
    if not isinstance(question, str) or not question.strip():
        raise bad("question", "a question", repr(question))
    if not isinstance(options, list) or len(options) < 2:
        raise bad("options", "a list of at least two options", repr(options))
    choices = {f"({'ABCDEFGHIJ'[i]}) {o}".strip().lower() for i, o in enumerate(options[:10])}
    if not isinstance(answer, str) or answer.strip().lower() not in choices:
        raise bad("answer", f"one of {sorted(choices)}", repr(answer))
    problem = get("problem") or ""
    if (stated := SIZE_IN_PROMPT.search(problem)) and tuple(map(int, stated.groups())) != size:
        raise bad("problem", f"the image's size {size}", f"{stated[0]!r}")

    ground_truth, clipped = answer, False
    if need_scene:
        try:
            scene, scene_answer = parse_ground_truth(get("scene_answer"))
        except ValueError as error:
            raise bad("scene_answer", "a gold scene and answer", error) from None
        if scene_answer.strip().lower() != answer.strip().lower():
            raise bad("scene_answer", f"the answer {answer!r}", repr(scene_answer))
        ground_truth = get("scene_answer")
        limit = (*size, *size)
        for o in scene["objects"]:
            if any(not -1 <= c <= m + 1 for c, m in zip(o["bbox"], limit, strict=True)):
                raise bad("scene_answer", f"boxes inside the image {size}", f"{o['id']} {o['bbox']}")
            inside = [min(max(c, 0), m) for c, m in zip(o["bbox"], limit, strict=True)]
            clipped |= inside != list(o["bbox"])
            o["bbox"] = inside
        if clipped:
            ground_truth = f"<scene>{json.dumps(scene)}</scene>\n<answer>{scene_answer}</answer>"

    sample = Sample(
        str(row_id if get("id") is None else get("id")),
        tuple(images),
        size,
        question,
        tuple(options),
        answer,
        ground_truth,
        problem,
        get("category") or "",
        get("level") or "",
        get("completion") or "",
    )
    return sample, clipped


# ---- prompts -----------------------------------------------------------------------------------------------
def build_prompt_text(template: str, question: str, size: tuple[int, int]) -> str:
    """The user's words: instructions, the image's size (W x H) where boxes are asked for, the question."""
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {[*TEMPLATES, 'problem']}, got {template!r}")
    frame = f"\n\nImage size: ({size[0]} x {size[1]})" if template in SHOWS_SIZE else ""
    return f"{TEMPLATES[template]}{frame}\n\n{question}"


def build_prompt(sample: Sample, template: str) -> list[dict]:
    """Chat messages for a sample: its images in order, then the text. Template "problem": the row's own."""
    own = template == "problem"
    text = sample.problem if own else build_prompt_text(template, sample.question, sample.size)
    text = text.replace("<image>", "").lstrip()
    if not text:
        raise ValueError(f"row {sample.id}: template 'problem' needs the column {COLUMNS['problem']}")
    images = [{"type": "image"} for _ in sample.encoded_images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def smart_size(
    width: int, height: int, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """(W, H), multiples of `factor` with W * H in [min_pixels, max_pixels]: what Qwen2.5-VL sees."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    h, w = smart_resize(height, width, factor, min_pixels, max_pixels)
    return w, h


def resize(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """The image at `smart_size`, resized once and here, so that no later stage resizes again."""
    size = smart_size(*image.size, min_pixels, max_pixels)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it."""

    sample: Sample
    images: list[Image.Image]  # resized
    vllm_ids: list[int]  # one image token per image: vLLM expands it to the ids below
    ids: list[int]  # (L,)
    pixel_values: object  # (patches, 1176) float32, or None without images
    image_grid_thw: object  # (images, 3) int64, or None


class PromptEncoder:
    """Sample -> Prompt with one processor, template and pixel budget; the sampler gets the same budget.

    Without a processor (None: a model behind an API) only `messages` and `images` work.
    """

    def __init__(self, processor, template: str, min_pixels: int, max_pixels: int):
        self.processor, self.template = processor, template
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        if processor is not None:
            processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}

    def messages(self, sample: Sample) -> list[dict]:
        return build_prompt(sample, self.template)

    def images(self, sample: Sample) -> list[Image.Image]:
        return [resize(i, self.min_pixels, self.max_pixels) for i in sample.load_images()]

    def text(self, sample: Sample) -> str:
        return self.processor.apply_chat_template(
            self.messages(sample), tokenize=False, add_generation_prompt=True
        )

    def __call__(self, sample: Sample) -> Prompt:
        text = self.text(sample)
        images = self.images(sample)
        out = self.processor(text=[text], images=images or None, return_tensors="pt")
        vllm_ids = self.processor.tokenizer(text)["input_ids"]
        ids = out["input_ids"][0].tolist()
        return Prompt(sample, images, vllm_ids, ids, out.get("pixel_values"), out.get("image_grid_thw"))

    def for_engine(self, sample: Sample) -> Prompt:
        """The Prompt without pixel values, which an inference engine computes itself."""
        images = self.images(sample)
        vllm_ids = self.processor.tokenizer(self.text(sample))["input_ids"]
        cells = iter([math.prod(image.size) // 28**2 for image in images])
        image_token = self.processor.image_token_id
        ids = [i for token in vllm_ids for i in [token] * (next(cells) if token == image_token else 1)]
        return Prompt(sample, images, vllm_ids, ids, None, None)

    def length(self, sample: Sample) -> int:
        """Tokens of the prompt, from the images' headers alone."""
        cells = [
            math.prod(smart_size(*open_image(e).size, self.min_pixels, self.max_pixels)) // 28**2
            for e in sample.encoded_images
        ]
        return len(self.processor.tokenizer(self.text(sample))["input_ids"]) + sum(cells) - len(cells)


# ---- batches -----------------------------------------------------------------------------------------------
def batch_at(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """Indices of step's batch: a pure function, so that a resumed run needs no loader state.

    The steps read through one endless row of epochs, each a permutation of range(n) of its own: nothing is
    dropped or repeated within an epoch, also where a batch straddles two.
    """
    at = range(step * batch_size, (step + 1) * batch_size)
    epochs = {e: np.random.default_rng([seed, e]).permutation(n) for e in {i // n for i in at}}
    return [int(epochs[i // n][i % n]) for i in at]


def micro_batches(sequences: list[tuple[object, int, int]], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, in order, in groups of at most max_tokens (one that is longer stands alone).

    Args: sequences: (key of the prompt, its tokens, the completion's tokens). Neighbours with the same key
        share the prompt, which then counts once a group: `pack` runs it once.

    >>> micro_batches([("a", 5, 2), ("a", 5, 2), ("b", 5, 1), ("c", 5, 1)], 15)
    [[0, 1, 2], [3]]
    """
    groups, used, last = [], math.inf, None
    for i, (key, prompt, completion) in enumerate(sequences):
        cost = completion if groups and key == last else prompt + completion
        if used + cost > max_tokens:
            groups.append([])
            used, cost = 0, prompt + completion
        groups[-1].append(i)
        used, last = used + cost, key
    return groups


def blank_prompt(config) -> Prompt:
    """One image token of a grey patch, and nothing to learn from it."""
    import torch

    v = config.vision_config
    patches = v.spatial_merge_size**2  # of one image token
    pixels = torch.zeros(patches, v.in_channels * v.temporal_patch_size * v.patch_size**2)
    grid = torch.tensor([[1, v.spatial_merge_size, v.spatial_merge_size]])
    ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    return Prompt(None, [], [], ids, pixels, grid)


def pack(prompts: list[tuple[Prompt, list[list[int]]]], model) -> dict:
    """Lay prompts, each followed by its completions, end to end in one row, as a batch for the model.

    Nothing is padded, and a prompt with its images is run once for all its completions: each of these attends
    to the prompt and to itself (`packed_attention`), which is what it would see alone. A batch without an
    image gets a blank one: sharded, the vision tower runs on all processes or hangs.

    Returns: input_ids (1, T), position_ids (4, 1, T), pixel_values, image_grid_thw; segments: (start, end,
        start of the prompt, its end) of every prompt (the last two 0) and completion; target_ids (N,), all
        completion tokens, completion by completion, and predicted_at (N,), the position before each. Row 0
        of position_ids counts from each prompt's beginning, rows 1-3 are the multi-dimensional rope's.
    """
    import torch

    if all(prompt.pixel_values is None for prompt, _ in prompts):
        prompts = [*prompts, (blank_prompt(model.config), [])]
    ids, positions, segments, targets, before = [], [], [], [], []
    for prompt, completions in prompts:
        row, first, length = torch.tensor([prompt.ids]), len(ids), len(prompt.ids)
        images = (row == model.config.image_token_id).int()
        rope, _ = model.model.get_rope_index(row, images, prompt.image_grid_thw)  # (3, 1, L)
        positions.append(torch.cat([torch.arange(length).view(1, 1, -1), rope]))  # (4, 1, L)
        ids += prompt.ids
        segments.append((first, len(ids), 0, 0))
        for completion in completions:
            start, steps = len(ids), torch.arange(len(completion))
            # Text positions go on from the largest one of the prompt, in all three dimensions alike.
            rope_steps = (steps + rope.max() + 1).expand(3, 1, -1)
            positions.append(torch.cat([(steps + length).view(1, 1, -1), rope_steps]))
            ids += completion
            targets += completion
            segments.append((start, len(ids), first, first + length))
            before += [first + length - 1, *range(start, len(ids) - 1)]  # the prompt's end predicts the first
    images = [prompt for prompt, _ in prompts if prompt.pixel_values is not None]
    return {
        "segments": tuple(segments),
        "input_ids": torch.tensor([ids]),  # (1, T)
        "position_ids": torch.cat(positions, dim=2),  # (4, 1, T)
        "target_ids": torch.tensor(targets, dtype=torch.long),  # (N,)
        "predicted_at": torch.tensor(before, dtype=torch.long),  # (N,)
        "pixel_values": torch.cat([p.pixel_values for p in images]),
        "image_grid_thw": torch.cat([p.image_grid_thw for p in images]),
    }


# ---- attention ---------------------------------------------------------------------------------------------
def packed_attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    """Causal attention within the segments of a packed row, so that no T x T mask is ever built.

    Args: query (1, H, T, D), key and value (1, H_kv, T, D); segments: from `pack`, which the model's forward
        hands down; without them (generation) plain SDPA.
    Returns: ((1, T, H, D), None), transformers' convention.
    """
    import torch
    import torch.nn.functional as F
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.is_cuda and has_flash_attention():
        return flash_attention(query, key, value, segments, scaling), None
    pieces = []
    for start, end, prompt_start, prompt_end in segments:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if prompt_end == prompt_start:
            pieces.append(
                F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            )
            continue
        k = torch.cat([key[:, :, prompt_start:prompt_end], k], dim=2)
        v = torch.cat([value[:, :, prompt_start:prompt_end], v], dim=2)
        sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        sees = sees.tril(prompt_end - prompt_start)  # the whole prompt, and itself up to the present
        # A mask and grouped heads together would leave a GPU the slow kernel: repeat them instead.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        pieces.append(F.scaled_dot_product_attention(q, k, v, sees, scale=scaling))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def flash_attention(query, key, value, segments, scaling):
    """The same in one call of flash-attn, whose causal mask is aligned at the end of the keys."""
    from flash_attn import flash_attn_varlen_func

    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rope leaves them in float32
    keys, own, seen, longest, most = flash_layout(segments, query.device)
    q, k, v = query[0].transpose(0, 1), key[0, :, keys].transpose(0, 1), value[0, :, keys].transpose(0, 1)
    return flash_attn_varlen_func(q, k, v, own, seen, longest, most, softmax_scale=scaling, causal=True)[None]


@functools.lru_cache(2)  # the layers of a forward pass share it
def flash_layout(segments, device):
    """Positions of the keys that each segment sees, its prompt's before its own; the bounds of queries and of
    keys; the most queries and keys of a segment."""
    import torch

    own = [end - start for start, end, *_ in segments]
    seen = [end - start + b - a for start, end, a, b in segments]
    keys = np.concatenate([np.r_[a:b, start:end] for start, end, a, b in segments])
    bounds = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device=device) for n in (own, seen)]
    return torch.from_numpy(keys).to(device), *bounds, max(own), max(seen)


def has_flash_attention() -> bool:
    import importlib.util

    return importlib.util.find_spec("flash_attn") is not None


def attention_implementation() -> dict[str, str]:
    """Register `packed_attention`; returns what `from_pretrained` takes as attn_implementation."""
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
    vision = "flash_attention_2" if torch.cuda.is_available() and has_flash_attention() else "sdpa"
    return {"text_config": "packed", "vision_config": vision}
