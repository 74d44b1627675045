"""Evaluate a model on STVQA-7K or a file with its columns: ask, grade, report.

    python evaluate.py --dataset stvqa                          # OX-PIXL/SpatialThinker-7B, 692 items
    python evaluate.py --template reasoning --model_path Qwen/Qwen2.5-VL-7B-Instruct --limit 100
    python evaluate.py --dataset data/val.parquet --model_path runs/tiny/merged --min_pixels 784

Greedy, zero-shot, at most 2,048 new tokens, images scaled into the pixel budget of training, as in the paper.
Writes OUT/NAME.jsonl (a header line, then one record an item) and OUT/NAME.summary.json, and prints a table.

What differs from the paper's evaluator: a reply that names no option is unparsed, never option A, and one
that names two is a contradiction, never the first. Unparsed, truncated and failed replies stay in the
denominator of the score and are counted beside it.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
import shlex
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from config import plain_errors
from data import COLUMNS, TEMPLATES, Prompt, PromptEncoder, Sample, Samples, load_samples, read_table
from rewards import (
    MAX_CHARS,
    TERMS,
    Weights,
    extract_answer,
    label_similarity,
    parse_ground_truth,
    score_completion,
)

DATASETS = {"stvqa": ("OX-PIXL/STVQA-7K", "val")}  # name -> (Hub id, split)
LETTERS = "ABCDEFGHIJ"
MAX_STATEMENT = 120  # characters; a longer reply that announces no answer is a thought, not an answer
MAX_PHRASES = 16  # final-answer phrases read, the last ones


# ---- reading a choice out of a reply ----
_WRAPPERS = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathsf)\s?\{([^{}]*)\}")  # \text{B} -> B
_DRESS = re.compile(r"[*`$#\"“”]|\\[()\[\]]")
_FULL_WIDTH = str.maketrans("（）：．，’", "():.,'")
_BOXED = re.compile(r"\\boxed\s?\{((?:[^{}]|\{[^{}]*\})*)\}")
_FINAL = re.compile(r"\bfinal (?:answer|choice)(?: (?:is|would be))?\s?[:=]?\s|最终答案[是为]?:?", re.I)
_PHRASE = re.compile(
    r"\b(?:answer|option|choice)\s?(?:is|would be|should be|must be|:|=|->|→)(?:\s?:|\s(?=\S)|(?=[(\[])|$)"
    r"|(?:^|\n)answer\s*\n|\bI(?:'d| would| will|'ll)? (?:choose|pick|select|go with|say|answer)\b:?"
    r"|答案[是为]?:?",
    re.I,
)
_VERDICT = re.compile(
    r"(?:[(\[]([A-J])[)\]]|\b([A-J]))[.,]? (?:is|must be|seems) (?:the )?(?:correct|right|best|answer)\b"
)
_LEAD = re.compile(  # a letter in its dress; a bare one only where it can be no article
    r"(?:(?:so|thus|hence|therefore),? )?(?:it's |it is |i think )?"
    r"(?:the )?(?:correct )?(?:(?:option|choice|answer):? )?"
    r"(?:[(\[{] ?([a-j]) ?[)\]}]|([a-j]) ?[).:,;](?!\w)"
    r"|([a-j])(?=$| (?:because|since|or|and)\b| ?[/&] ?[a-j]\b| [-–—] ))",
    re.I,
)
_ANOTHER = re.compile(
    r"[(\[]([A-Ja-j])[)\]]|(?:\b(?:or|and)|[/,&]) ?(?:option )?([A-J])(?= ?(?:$|[).,;:/&]|or\b|and\b))"
)
_NEGATION = re.compile(r"\b(?:not|neither|nor|never|no|none|cannot)\b|n't\b")
_YES_NO = re.compile(r"(yes|no)\b(?!/| (?:or|and)\b)")
_NO_IDEA = re.compile(r"\bno (?:idea|clue|answer|information|image)\b")
_SENTENCE_END = re.compile(r"(?<=\w\w)[.!?](?:\s|$)")
_NUMBER_WORDS = {w: str(i) for i, w in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}  # fmt: skip
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBER_WORDS)})\b")


def _plain(text: str) -> str:
    """Without Markdown and LaTeX dress, runs of blanks as one."""
    text = _DRESS.sub("", _WRAPPERS.sub(r"\1", text)).translate(_FULL_WIDTH)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _normal(text: str) -> str:
    """Plain text as it is compared: lower case, digits for number words, no full stop."""
    text = _NUMBER_WORD.sub(lambda m: _NUMBER_WORDS[m[0]], text.lower().replace("\n", " "))
    return text.strip(" .,;:!")


@dataclass(frozen=True)
class _Options:
    letters: dict[str, set[str]]  # normalised option text -> its letters (more than one if options repeat)
    anywhere: re.Pattern  # any option text on word and number boundaries, the longest first
    yes_no: bool


@lru_cache(maxsize=4096)
def _options(choices: tuple[str, ...]) -> _Options:
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices: expected 2 to {len(LETTERS)} options, got {len(choices)}: {choices!r}")
    letters = defaultdict(set)
    for letter, choice in zip(LETTERS, choices, strict=False):
        letters[_normal(_plain(choice))].add(letter)
    texts = sorted(filter(None, letters), key=len, reverse=True)
    inside = "|".join(rf"(?<!-){re.escape(t)}" if t[0].isdigit() else re.escape(t) for t in texts)
    anywhere = re.compile(rf"(?<!\w)(?<!\d[.,])(?:{inside})(?!\w)(?![.,]\d)")
    return _Options(dict(letters), anywhere, set(texts) == {"yes", "no"})


def _named_texts(statement: str, options: _Options) -> set[str]:
    """Letters of the options whose text a statement names; none where it negates outside those texts."""
    statement = _normal(statement)
    if statement in options.letters:
        return options.letters[statement]
    if options.yes_no:
        statement = _NO_IDEA.sub("", statement)
        if leading := _YES_NO.match(statement):
            return options.letters[leading[1]]
    if _NEGATION.search(options.anywhere.sub("", statement)):
        return set()
    return {letter for text in options.anywhere.findall(statement) for letter in options.letters[text]}


def _named_letters(statement: str, options: _Options) -> set[str]:
    """Letters at the head of a statement, in any usual dress: B  b)  (B)  [B]  B.  B: left  Option B."""
    if found := _LEAD.match(statement):
        rest = statement[found.end(found.lastindex) :]
        others = {(a or b).upper() for a, b in _ANOTHER.findall(rest.partition("\n")[0])}
        return {found[found.lastindex].upper()} | others
    if statement[1:2] == " " and options.letters.get(_normal(statement[2:])) == {statement[0]}:
        return {statement[0]}  # "B left"
    return set()


def _stated(statement: str, options: _Options) -> set[str]:
    """All options that a short statement names: none, one, or a contradiction."""
    letters = _named_letters(statement, options)
    if not letters or (len(statement) > 1 and _normal(statement) in options.letters):
        return _named_texts(statement, options)  # an option may itself begin like a letter: "A is closer"
    texts = _named_texts(statement, options)
    return letters | texts if len(texts) == 1 else letters


def _announced(text: str, options: _Options) -> tuple[set[str], str]:
    """Options named in the last box or after final-answer phrases -> (letters, method)."""
    if (boxed := _BOXED.findall(text)) and (found := _stated(_plain(boxed[-1]), options)):
        return found, "boxed"
    text = _plain(text)
    for pattern in (_FINAL, _PHRASE):
        found = {a or b for a, b in _VERDICT.findall(text)} if pattern is _PHRASE else set()
        for phrase in list(pattern.finditer(text))[-MAX_PHRASES:]:
            line = text[phrase.end() : phrase.end() + 2 * MAX_STATEMENT].lstrip(" :\n").partition("\n")[0]
            found |= _stated(_SENTENCE_END.split(line, maxsplit=1)[0], options)
        if found:
            return found, "phrase"
    return set(), "none"


def _read(text: str, options: _Options) -> tuple[set[str], str]:
    """Options named by a text outside its thinking -> (letters, method)."""
    found, method = _announced(text, options)
    if found:
        return found, method
    text, method = _plain(text), "text"
    for line in {text.partition("\n")[0], text.rpartition("\n")[2]}:  # before or after the explanation
        line = line[: 2 * MAX_STATEMENT]
        if _named_letters(line, options):
            found, method = found | _stated(line, options), "letter"
        else:
            found = found | options.letters.get(_normal(line), set())
    if not found and len(text) <= MAX_STATEMENT:
        found = _named_texts(text, options)
    return found, method


def read_choice(reply: str, choices: Sequence[str]) -> tuple[str | None, str]:
    """The option a reply settles on, and how that was found: (letter, method) or (None, why not).

    Methods: answer_tag, boxed, phrase, letter, text. Reasons: none (names no option), conflict (several, or a
    letter and the text of another option), outside (a letter beyond the options), empty. Text never raises.
    """
    options = _options(tuple(choices))
    if not isinstance(reply, str) or not reply.strip():
        return None, "empty"
    reply = reply[-MAX_CHARS:]
    thought, closed, visible = reply.rpartition("</think>")
    if not closed and "<think>" in reply:
        visible = ""  # cut off while thinking
    if "<answer>" in visible:
        block, _, tail = visible.rpartition("<answer>")[2].partition("</answer>")
    else:
        block, tail = extract_answer(reply), ""
    if block.strip():
        found, method = _read(block, options)[0] | _announced(tail, options)[0], "answer_tag"
    else:
        found, method = _read(visible, options)
    if len(found) != 1:
        return None, "conflict" if found else "none"
    letter = next(iter(found))
    return (letter, method) if letter in LETTERS[: len(choices)] else (None, "outside")


def parse_choice(reply: str, choices: Sequence[str]) -> str | None:
    r"""The letter of the option a reply settles on, or None: never a default, never a guess.

    Args: the model's whole reply; the option texts in order, without letters.
    The first of these that names an option decides: the last <answer> block; the last \boxed{}; final-answer
    phrases; a reply (or its first or last line) that is a letter in any usual dress; a short reply with the
    text of one option, on word and number boundaries, the longest option winning. Two candidates: None.

    >>> parse_choice("<think>A cup? No.</think><answer>(B) arm chair</answer>", ["chair", "arm chair"])
    'B'
    >>> parse_choice("It is the arm chair.", ["chair", "arm chair"])
    'B'
    >>> parse_choice("(A) arm chair", ["chair", "arm chair"]) is None
    True
    """
    return read_choice(reply, choices)[0]


# ---- grading ----
def grade(
    sample: Sample,
    reply: str,
    weights: Weights = Weights(),  # noqa: B008 frozen
    similarity: Callable[[str, str], float] = label_similarity,
) -> dict:
    """What a reply to a sample is worth.

    Returns: parsed (letter or None), method (see `read_choice`), correct (bool: parsed is the gold letter);
        and if the sample has a gold scene:
        terms         reward, format, count, accuracy, spatial of `rewards.score_completion`
        reason        why the format was refused, or None
        matches       (predicted index, gold index, IoU, CIoU) of matched objects; none if the format is wrong
        gold_objects  number of gold objects
        mean_iou, mean_ciou  over `matches`, None without any
        recall50      share of the gold objects matched with IoU >= 0.5, None without gold objects
    """
    letter, method = read_choice(reply, sample.options)
    graded = {"parsed": letter, "method": method, "correct": letter == sample.answer.strip()[1].upper()}
    if "<scene>" not in sample.ground_truth:
        return graded
    score = score_completion(reply, sample.ground_truth, sample.size, weights=weights, similarity=similarity)
    n_gold = _count_gold(sample.ground_truth)
    ious, cious = [m[2] for m in score.matches], [m[3] for m in score.matches]
    return graded | {
        "terms": {term: getattr(score, term) for term in TERMS},
        "reason": score.reason,
        "matches": [list(m) for m in score.matches],
        "gold_objects": n_gold,
        "mean_iou": _mean(ious),
        "mean_ciou": _mean(cious),
        "recall50": sum(iou >= 0.5 for iou in ious) / n_gold if n_gold else None,
    }


@lru_cache(maxsize=4096)
def _count_gold(ground_truth: str) -> int:
    return len(parse_ground_truth(ground_truth)[0]["objects"])


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def wilson(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion k / n; (0, 1) for n = 0. Default z: 95 %.

    >>> [round(end, 3) for end in wilson(8, 10)]
    [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p, shrink = k / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _tally(records: Sequence[dict]) -> dict:
    n, correct = len(records), sum(r["correct"] for r in records)
    accuracy = correct / n if n else 0.0
    return {"n": n, "correct": correct, "accuracy": accuracy, "ci95": list(wilson(correct, n))}


def summarise(records: Sequence[dict]) -> dict:
    """Figures over the results of `grade`, each optionally with category and finish_reason.

    Returns: n, correct, accuracy = correct / n, ci95 (Wilson); unparsed, truncated, failed (counts, part
        of n); methods {method: n}; categories {name: n, correct, accuracy, ci95}; and over the items with a
        gold scene:
        scenes        their number
        reward, format, count, spatial  means of these reward terms
        exact         mean of the reward's accuracy term, which compares letter and text
        reasons       {why a format was refused: n}
        mean_iou, mean_ciou  over all matched pairs of all items with the right format, each pair counting
                      once; 0.0 without any pair
        recall50      gold objects matched with IoU >= 0.5 / all gold objects; refused replies count
    """
    by_category = defaultdict(list)
    for r in records:
        by_category[r.get("category") or ""].append(r)
    summary = _tally(records) | {
        "unparsed": sum(r["parsed"] is None for r in records),
        "truncated": sum(r.get("finish_reason") == "length" for r in records),
        "failed": sum(r.get("finish_reason") == "failed" for r in records),
        "methods": dict(Counter(r["method"] for r in records).most_common()),
        "categories": {name: _tally(by_category[name]) for name in sorted(by_category)},
    }
    scenes = [r for r in records if r.get("terms")]
    if not scenes:
        return summary
    pairs = [pair for r in scenes for pair in r["matches"]]
    n_gold = sum(r["gold_objects"] for r in scenes)
    terms = {term: _mean(r["terms"][term] for r in scenes) for term in TERMS}
    return summary | {
        "scenes": len(scenes),
        **{"exact" if term == "accuracy" else term: mean for term, mean in terms.items()},
        "reasons": dict(Counter(r["reason"] for r in scenes if r["reason"]).most_common()),
        "mean_iou": _mean(iou for *_, iou, _ in pairs) or 0.0,
        "mean_ciou": _mean(quality for *_, quality in pairs) or 0.0,
        "recall50": sum(iou >= 0.5 for *_, iou, _ in pairs) / n_gold if n_gold else 1.0,
    }


# ---- back ends: samples -> replies ----
@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str  # stop, length, or failed
    n_tokens: int


FAILED = Reply("", "failed", 0)


@dataclass(frozen=True)
class Decoding:
    max_new_tokens: int = 2048
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    batch_size: int = 8  # prompts encoded, and for hf generated, together


def context_length(model_path: str) -> int:
    """Positions the model was made for."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path).get_text_config().max_position_embeddings


def vllm_replies(model_path: str, samples: Sequence, encode: PromptEncoder, how: Decoding) -> Iterator[Reply]:
    """One reply a sample, in order, from a vLLM engine that lives as long as the iterator."""
    import torch

    cpu = not torch.cuda.is_available()
    if cpu:  # in this process, with a small cache: the default takes half of the memory
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    context = context_length(model_path)
    longest = max(encode.length(s) for s in samples)
    length = min(context, longest + how.max_new_tokens)
    # A prompt prefilled in two chunks rewinds its seeded generator, which a CPU generator cannot do.
    device = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, length)} if cpu else {}
    llm = LLM(
        model=model_path,
        dtype="float32" if cpu else "auto",
        max_model_len=length,
        **device,
        limit_mm_per_prompt={"image": max(len(s.encoded_images) for s in samples), "video": 0},
        # The budget the images already fit, so that vLLM does not resize them again.
        mm_processor_kwargs={"size": {"shortest_edge": encode.min_pixels, "longest_edge": encode.max_pixels}},
        seed=how.seed,
    )
    def params(sample):  # a seed of its own for every item: one for all would give all the same noise
        return SamplingParams(max_tokens=how.max_new_tokens, temperature=how.temperature,
                              seed=zlib.crc32(f"{how.seed} {sample.id}".encode()))

    try:
        for start in range(0, len(samples), how.batch_size):
            batch = samples[start : start + how.batch_size]
            prompts = [replace(encode(s), pixel_values=None) for s in batch]  # the engine makes its own
            fits = [len(p.ids) < context for p in prompts]
            requests = [{"prompt_token_ids": p.vllm_ids, "multi_modal_data": {"image": p.images}}
                        for p, ok in zip(prompts, fits, strict=True) if ok]  # fmt: skip
            each = [params(p.sample) for p, ok in zip(prompts, fits, strict=True) if ok]
            outputs = iter(llm.generate(requests, each, use_tqdm=False))
            for prompt, ok in zip(prompts, fits, strict=True):
                yield _vllm_reply(prompt, next(outputs), encode.processor.tokenizer) if ok else FAILED
    finally:
        del llm
        gc.collect()


def _vllm_reply(prompt: Prompt, output, tokenizer) -> Reply:
    if output.prompt_token_ids != prompt.ids:
        got, expected = len(output.prompt_token_ids), len(prompt.ids)
        raise RuntimeError(f"row {prompt.sample.id}: vLLM's prompt ({got} tokens) is not ours ({expected})")
    done = output.outputs[0]
    text = tokenizer.decode(done.token_ids, skip_special_tokens=True)  # vLLM's own text drops a cut character
    return Reply(text, "length" if done.finish_reason == "length" else "stop", len(done.token_ids))


def hf_replies(model_path: str, samples: Sequence, encode: PromptEncoder, how: Decoding) -> Iterator[Reply]:
    """One reply a sample, in order, from transformers' `generate` on left-padded batches."""
    import torch
    from transformers import AutoModelForImageTextToText

    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype).to(device).eval()
    torch.manual_seed(how.seed)
    context = context_length(model_path)
    for start in range(0, len(samples), how.batch_size):
        prompts = [encode(s) for s in samples[start : start + how.batch_size]]
        fits = [p for p in prompts if len(p.ids) < context]
        replies = iter(_hf_batch(model, encode.processor.tokenizer, fits, how, context) if fits else [])
        for prompt in prompts:
            yield next(replies) if len(prompt.ids) < context else FAILED


def _hf_batch(model, tokenizer, prompts: list[Prompt], how: Decoding, context: int) -> list[Reply]:
    import torch
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos])
    longest = max(len(p.ids) for p in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in prompts])  # (B, L)
    real = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts])  # (B, L)
    batch = {"input_ids": ids, "attention_mask": real,
             # Without it positions silently become one-dimensional.
             "mm_token_type_ids": (ids == model.config.image_token_id).int()}  # fmt: skip
    if seen := [p for p in prompts if p.pixel_values is not None]:
        batch["pixel_values"] = torch.cat([p.pixel_values for p in seen]).to(model.dtype)
        batch["image_grid_thw"] = torch.cat([p.image_grid_thw for p in seen])
    # A fresh config: the model's own may hold sampling settings and a repetition penalty, which vLLM ignores.
    sampling = {"temperature": how.temperature, "top_k": 0} if how.temperature else {}
    config = GenerationConfig(
        max_new_tokens=min(how.max_new_tokens, context - longest),
        do_sample=how.temperature > 0,
        eos_token_id=sorted(eos),
        pad_token_id=pad,
        **sampling,
    )
    with torch.inference_mode():
        out = model.generate(**{k: v.to(model.device) for k, v in batch.items()}, generation_config=config)
    replies = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in eos), None)
        tokens = row if end is None else row[: end + 1]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        replies.append(Reply(text, "length" if end is None else "stop", len(tokens)))
    return replies


PROVIDERS = {"vllm": vllm_replies, "hf": hf_replies}


def choose_provider() -> str:
    """vllm where its build fits this machine, else hf."""
    import torch

    return "vllm" if package_version("vllm" if torch.cuda.is_available() else "vllm-cpu") else "hf"


# ---- items ----
def load_items(args) -> Samples:
    """The samples to ask, checked; a part of them with --limit."""
    source, split = DATASETS.get(args.dataset, (args.dataset, "val"))
    source = args.local_path or source
    columns = read_table(source, split, args.revision, COLUMNS["images"]).column_names
    samples = load_samples(source, split, args.revision, need_scene=COLUMNS["scene_answer"] in columns)
    if args.limit and args.limit < len(samples):
        chosen = stratified([s.category for s in samples], args.limit, args.seed)
        samples = Samples(samples.table, samples.columns, samples.rows[chosen], samples.need_scene)
    return samples


def stratified(categories: Sequence[str], limit: int, seed: int) -> list[int]:
    """Indices in order of `limit` items drawn at random, each category by its share (largest remainder)."""
    groups = defaultdict(list)
    for i, category in enumerate(categories):
        groups[category].append(i)
    share = {c: limit * len(members) / len(categories) for c, members in groups.items()}
    take = {c: int(share[c]) for c in groups}
    for c in sorted(groups, key=lambda c: (take[c] - share[c], c))[: limit - sum(take.values())]:
        take[c] += 1
    rng = random.Random(seed)
    return sorted(i for c in sorted(groups) for i in rng.sample(groups[c], take[c]))


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of what is asked: ids, questions, gold and images, in order."""
    digest = hashlib.sha256()
    for s in samples:
        digest.update(json.dumps([s.id, s.question, s.options, s.ground_truth]).encode())
        for image in s.encoded_images:
            digest.update(image.get("bytes") or Path(image["path"]).read_bytes())
    return digest.hexdigest()[:16]


# ---- records ----
def make_record(row: int, sample: Sample, reply: Reply) -> dict:
    return {
        "id": sample.id,
        "row": row,
        "category": sample.category,
        "gold": sample.answer,
        "choices": sample.options,
        "reply": reply.text,
        **grade(sample, reply.text),
        "finish_reason": reply.finish_reason,
        "n_tokens": reply.n_tokens,
    }


def make_header(args, provider: str, samples: Samples) -> dict:
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "datasets", "numpy", "scipy")
    return {"header": {
        "command": shlex.join(sys.orig_argv),
        "config": vars(args) | {"provider": provider},
        "versions": {p: version for p in packages if (version := package_version(p))},
        "data": {"n": len(samples), "fingerprint": fingerprint(samples)},
    }}  # fmt: skip


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_records(path) -> tuple[dict, list[dict]]:
    """(header, records) of a results file."""
    with open(path, encoding="utf-8") as f:
        header, *records = map(json.loads, f)
    if "header" not in header:
        raise ValueError(f"{path}: expected a header in the first line, got keys {sorted(header)}")
    return header["header"], records


def write_text(path: Path, text: str):
    """Whole or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def table(summary: dict) -> str:
    """The terminal's view of a summary."""
    width = max(map(len, [*summary["categories"], "category"]))
    lines = [f"{'category':<{width}}      n  accuracy  95 % interval"]
    for name, t in [*summary["categories"].items(), ("all", summary)]:
        accuracy, low, high = (100 * share for share in (t["accuracy"], *t["ci95"]))
        lines.append(f"{name:<{width}}  {t['n']:>5}  {accuracy:>8.1f}  {low:>5.1f} - {high:.1f}")
    lines.append(", ".join(f"{key} {summary[key]}" for key in ("unparsed", "truncated", "failed")))
    if "scenes" in summary:
        keys = ("reward", "format", "count", "exact", "spatial", "mean_iou", "mean_ciou", "recall50")
        lines.append(", ".join(f"{key} {summary[key]:.3f}" for key in keys))
    if summary.get("reasons"):
        lines.append("refused: " + ", ".join(f"{reason} {n}" for reason, n in summary["reasons"].items()))
    return "\n".join(lines)


# ---- main ----
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="stvqa", help=f"{', '.join(DATASETS)}, or a file with its columns")
    p.add_argument("--local_path", help="file or folder to read instead of the Hub")
    p.add_argument("--revision", help="Hub revision of the data")
    p.add_argument("--model_path", default="OX-PIXL/SpatialThinker-7B", help="Hub id or folder")
    p.add_argument("--processor_name", help="Hub id or folder of the processor (default: the model's)")
    p.add_argument("--template", default="spatial_thinker", choices=[*TEMPLATES, "problem"], help="prompt")
    p.add_argument("--provider", default="auto", choices=["auto", *PROVIDERS], help="who generates")
    p.add_argument("--cuda", help="GPU to use, as CUDA_VISIBLE_DEVICES takes it")
    p.add_argument("--batch_size", type=int, help="prompts at a time (default: vllm 256, hf 8)")
    p.add_argument("--limit", type=int, help="ask that many items, drawn by category")
    p.add_argument("--seed", type=int, default=0, help="of --limit and of sampling")
    p.add_argument("--max_new_tokens", type=int, default=2048)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--min_pixels", type=int, default=512 * 512, help="images are scaled into this budget")
    p.add_argument("--max_pixels", type=int, default=2048 * 2048)
    p.add_argument("--out", default="results", help="folder of the results")
    p.add_argument("--custom_filename", help="name of the results (default: data set, model and template)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.cuda is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.cuda  # before torch looks
    from transformers import AutoProcessor

    provider = choose_provider() if args.provider == "auto" else args.provider
    batch_size = args.batch_size or {"vllm": 256, "hf": 8}[provider]
    how = Decoding(args.max_new_tokens, args.temperature, args.seed, batch_size)
    with plain_errors():
        samples = load_items(args)
        processor = AutoProcessor.from_pretrained(args.processor_name or args.model_path)
    encode = PromptEncoder(processor, args.template, args.min_pixels, args.max_pixels)
    source = args.local_path or args.dataset
    print(f"{len(samples)} items of {source} | {args.model_path} through {provider} | "
          f"template {args.template} | images of {args.min_pixels} to {args.max_pixels} pixels", flush=True)

    started = time.time()
    replies = PROVIDERS[provider](args.model_path, samples, encode, how)
    replies = tqdm(replies, total=len(samples), disable=None)
    rows = zip(samples.rows, samples, replies, strict=True)
    records = [make_record(int(row), sample, reply) for row, sample, reply in rows]
    summary = summarise(records)

    parts = (args.dataset, args.model_path, args.template, *([f"limit{args.limit}"] if args.limit else []))
    name = args.custom_filename or "_".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = [make_header(args, provider, samples), *records]
    write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(out / f"{name}.summary.json", json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    print(f"wrote {out / name}.jsonl and .summary.json after {time.time() - started:.0f} s")
    if summary["failed"]:
        raise SystemExit(f"{summary['failed']} items failed: longer than the model's context")


if __name__ == "__main__":
    main()
