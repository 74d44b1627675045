"""Who answers: vLLM, transformers, and models behind an OpenAI-compatible or Anthropic API.

    for i, reply in vllm_replies(model_path, samples, encoder, Decoding()): ...

Every back end takes samples and a `data.PromptEncoder` and yields (index of the sample, Reply) as replies
come in, in any order. All show the model the same prompt: images first, resized once into one pixel budget,
then the text. A model of another family than Qwen-VL gets its images unresized: its own processor sees to
that (`OwnEncoder`). A request that fails for good is a Reply with finish_reason "failed" and says why.

The trainer samples with the same engines: `start_vllm`, `vllm_generate` and `hf_generate` take prompts and
give token ids, and what is true of them (dtype on a CPU, the end of a reply, whose sampling settings count)
is true of both.
"""

import asyncio
import base64
import contextlib
import gc
import importlib.metadata
import io
import json
import math
import os
import queue
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

from config import public_url, url_secrets
from data import Prompt, PromptEncoder, Sample, smart_size


@dataclass(frozen=True)
class Reply:
    """What a model said to one sample."""

    text: str
    finish_reason: str  # stop, length, or failed
    n_tokens: int = 0  # generated, with the end token
    prompt_tokens: int = 0  # with the images'
    latency_s: float = 0.0
    error: str = ""  # why it failed
    stop_reason: str = ""  # APIs: the server's own word for the end, where it says more than finish_reason
    note: str = ""  # APIs: what was sent otherwise than asked for


@dataclass(frozen=True)
class Decoding:
    """How replies are generated."""

    max_new_tokens: int = 2048
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    batch_size: int = 8  # vllm: requests in the engine at a time; hf: prompts generated together
    tensor_parallel_size: int = 1  # vllm: GPUs of one copy of the model
    base_url: str | None = None  # APIs: where the server is
    concurrency: int = 16  # APIs: requests at a time
    timeout_s: float = 300.0  # APIs: for one attempt, to the last byte
    retries: int = 8  # APIs: further attempts after 429, 5xx, a timeout or a cut connection
    show: Callable[[str], None] | None = None  # gets the text of a lone sample's reply piece by piece

    def seed_of(self, sample: Sample) -> int:
        """A seed of its own for every item: one for all would give all the same noise."""
        return zlib.crc32(f"{self.seed} {sample.id}".encode()) >> 1  # APIs take 31 bits


Replies = Iterator[tuple[int, Reply]]


def prepare(build: Callable[[Sample], Prompt], sample: Sample, context: int) -> Prompt | Reply:
    """The prompt of a sample, or the failure of one that cannot be read or leaves no room for an answer."""
    try:
        prompt = build(sample)
    except (OSError, ValueError) as error:  # a damaged image
        return Reply("", "failed", error=f"{type(error).__name__}: {error}")
    n = len(prompt.ids)
    if n >= context:
        return Reply("", "failed", 0, n, error=f"prompt of {n} tokens, context of {context}")
    return prompt


def context_length(model_path: str) -> int:
    """Positions the model was made for."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path).get_text_config().max_position_embeddings


def end_token_ids(generation_config, tokenizer) -> list[int]:
    """Tokens that end a reply: those of the model's generation config and the tokenizer's, as vLLM has it."""
    ids = generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


# ---- models of any family ----
@dataclass(frozen=True)
class OwnPrompt(Prompt):
    """A Prompt that its model's own processor has made."""

    text: str = ""  # of the chat template, before image tokens are expanded


class OwnEncoder:
    """Sample -> OwnPrompt by the chat template and processor of whatever model it is.

    The processor sizes the images and lays out their tokens. Where it takes Qwen-VL's pixel budget, as that
    of Qwen3-VL does, images are resized into it once, as for Qwen2.5-VL; elsewhere the budget has no meaning.
    """

    def __init__(self, plain: PromptEncoder, processor):
        """Args: plain: an encoder without a processor, for the messages. Raises: ValueError."""
        self.messages, self.processor = plain.messages, processor
        self.min_pixels, self.max_pixels = plain.min_pixels, plain.max_pixels
        tokenizer, images = (getattr(processor, name, None) for name in ("tokenizer", "image_processor"))
        if not tokenizer or not images or not (processor.chat_template or tokenizer.chat_template):
            raise ValueError(
                f"{type(processor).__name__}: expected the processor of a model that sees, with tokenizer, "
                "image processor and chat template: name one with --processor_name"
            )
        processor.chat_template = processor.chat_template or tokenizer.chat_template
        tokenizer.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        self.cell = (getattr(images, "patch_size", 0) or 0) * (getattr(images, "merge_size", 0) or 0)
        if self.cell:
            images.size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    def images(self, sample: Sample) -> list:
        images, budget = sample.load_images(), (self.min_pixels, self.max_pixels)
        return [i.resize(smart_size(*i.size, *budget, self.cell), 3) for i in images] if self.cell else images

    def __call__(self, sample: Sample) -> OwnPrompt:
        text, images = self.processor.apply_chat_template(
            self.messages(sample), tokenize=False, add_generation_prompt=True
        ), self.images(sample)  # fmt: skip
        vllm_ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = OwnPrompt(sample, images, vllm_ids, [], None, None, text)
        return replace(prompt, ids=self.batch([prompt])["input_ids"][0].tolist())

    for_engine = __call__

    def batch(self, prompts: Sequence[OwnPrompt]) -> dict:
        """Inputs of the model, padded on the left."""
        images = [p.images for p in prompts] if any(p.images for p in prompts) else None
        how = {"padding": True, "padding_side": "left", "add_special_tokens": False}  # the template has them
        return dict(self.processor(images=images, text=[p.text for p in prompts], return_tensors="pt", **how))

    def length(self, sample: Sample) -> int:
        return len(self(sample).ids)


def encoder_for(make: Callable, processor) -> PromptEncoder | OwnEncoder:
    """The encoder for a model: exact and cheap for Qwen2-VL to Qwen3-VL, by its own processor for others.

    Args: make: processor or None -> PromptEncoder; processor: None behind an API.
    """
    qwen = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "NoneType")
    return make(processor) if type(processor).__name__ in qwen else OwnEncoder(make(None), processor)


def text_streamer(tokenizer, show: Callable[[str], None], skip_prompt: bool = False):
    """What takes tokens by `put` as they are generated, until `end`, and gives their text by whole words."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: show(text)
    return streamer


# ---- vLLM ----
def has_gpu() -> bool:
    """Whether there is a GPU, asked of its driver: CUDA itself stays untouched in this process.

    torch would else start CUDA to find out, and an engine in a process of its own, forked, could not use it.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()


def start_vllm(model: str, *, max_model_len: int, images: int, min_pixels: int, max_pixels: int, **settings):
    """A vLLM engine for prompts of up to `images` images that fit the pixel budget already.

    Args: settings: further arguments of vllm.LLM; they win over what is set here.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # whatever has touched CUDA before
    if not has_gpu():
        # The engine in this process, since a child would load torch again; a small cache (in GiB), since the
        # default takes half of the memory.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # A prompt prefilled in two chunks rewinds its seeded generator, which a CPU generator cannot do. So
        # the longest prompt has to fit into one step.
        batched = max(settings.pop("max_num_batched_tokens", None) or 8192, max_model_len)
        on_cpu = {"dtype": "float32", "enable_chunked_prefill": False, "max_num_batched_tokens": batched}
        settings = on_cpu | {"enforce_eager": True} | settings  # compiling takes half a minute
    from vllm import LLM  # after the environment, which it reads once

    defaults = {
        "max_model_len": max_model_len,
        "limit_mm_per_prompt": {"image": images, "video": 0},
        "mm_processor_cache_gb": 0,  # of 4 GiB of images: none comes twice
        # The budget that the images fit already, so that vLLM does not resize them again.
        "mm_processor_kwargs": {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}},
    }
    return LLM(model=model, **defaults | settings)


def vllm_generate(
    llm, requests: Iterable[tuple], at_once: int | None, seen: Callable[[list[int]], None] | None = None
) -> Iterator[tuple]:
    """Work off requests and yield each with what it gave, as they finish: in any order.

    With all of them at once the engine sees what `llm.generate` would show it. With fewer, prompts and their
    images are made only when there is room for them, so that memory does not grow with their number.

    Args: requests: (key, Prompt, SamplingParams), n of which may be more than 1; at_once: requests in the
        engine at a time, None: all; seen: gets the tokens of a lone request so far after every step. The
        engine has to be idle, and this iterator to be run to its end.
    Yields: (key, Prompt, RequestOutput), whose `outputs` are all n in order of their index.
    Raises: RuntimeError if vLLM reads another prompt than Prompt.ids, the trainer's or transformers'.
    """
    from vllm.sampling_params import RequestOutputKind

    engine, waiting, running = llm.llm_engine, enumerate(requests), {}  # engine's name -> (key, Prompt)
    while True:
        while (at_once is None or len(running) < at_once) and (entry := next(waiting, None)):
            n, (key, prompt, params) = entry
            request = {"prompt_token_ids": prompt.vllm_ids}
            request |= {"multi_modal_data": {"image": prompt.images}} if prompt.images else {}
            params.output_kind = RequestOutputKind.CUMULATIVE if seen else RequestOutputKind.FINAL_ONLY
            running[str(n)] = (key, prompt)
            engine.add_request(str(n), request, params)
        if not running:
            return
        for output in engine.step():
            if seen:
                seen(output.outputs[0].token_ids)
            if output.finished:
                key, prompt = running.pop(output.request_id)
                if output.prompt_token_ids != prompt.ids:
                    got, ours = len(output.prompt_token_ids), len(prompt.ids)
                    raise RuntimeError(
                        f"request {key}, row {prompt.sample.id}: vLLM's prompt ({got} tokens) is not ours "
                        f"({ours} tokens)"
                    )
                yield key, prompt, output


def vllm_reload(llm, weights: Iterable[tuple], check: bool = True):
    """Copy (name, whole tensor) pairs into an engine. Raises: RuntimeError if it then holds other values."""
    from checkpoint import row_sums

    sent = {}

    def counted():
        for name, weight in weights:
            sent[name] = row_sums(weight)[:2]
            yield name, weight

    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": counted()})
    if check:
        check_weights(sent, engine_sums(llm))


def engine_sums(llm) -> dict:
    """{name: sum of the values, sum of their magnitudes} of this process's weights in a vLLM engine, float64.

    Without the matrices that vLLM for CPUs has packed into a form of its own.
    """
    from checkpoint import row_sums

    (sums,) = llm.apply_model(lambda m: {n: row_sums(p)[:2] for n, p in m.named_parameters() if p.numel()})
    return sums


def published_names(name: str) -> list[str]:
    """What the trainer calls a weight of the engine: several names where that lays matrices side by side.

    >>> published_names("language_model.model.layers.0.mlp.gate_up_proj.weight")[1]
    'model.language_model.layers.0.mlp.up_proj.weight'
    """
    name = name.replace("language_model.lm_head", "lm_head")
    name = re.sub(r"^visual\b", "model.visual", name)
    name = re.sub(r"^language_model\.model\b", "model.language_model", name)
    side_by_side = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    fused = next((part for part in side_by_side if part in name), None)
    return [name.replace(fused, part) for part in side_by_side[fused]] if fused else [name]


def check_weights(sent: dict, held: dict):
    """The engine must hold what the trainer sent, to the last bit.

    Args: sums as of `engine_sums`, by the published names and by the engine's. Raises: RuntimeError.
    """
    compared = 0
    for name, got in held.items():
        names = published_names(name)
        if all(n in sent for n in names):
            expected = sum(sent[n] for n in names)
            # One of 5e8 weights around 0.02 that moves by a step of its bf16, 1e-4, is 1e-11 of the
            # magnitudes; sums in another order differ by 1e-14 of them.
            if not ((got - expected).abs() <= 1e-12 * expected[1]).all():  # "not <=": NaN fails too
                raise RuntimeError(
                    f"sync: vLLM holds another {name} than the trainer sent: expected the sums "
                    f"{expected.tolist()} of values and magnitudes, got {got.tolist()}"
                )
            compared += 1
    if not compared:
        raise RuntimeError(f"sync: expected weights of the names that the trainer sends, got {[*held][:3]}")


def vllm_replies(
    model_path: str, samples: Sequence[Sample], encoder: PromptEncoder, decoding: Decoding
) -> Replies:
    """Replies of a vLLM engine that lives as long as the iterator and holds up to batch_size requests."""
    context = context_length(model_path)
    longest = max(prompt_length(encoder, s) for s in samples)
    llm = start_vllm(
        model_path,
        max_model_len=min(context, longest + decoding.max_new_tokens),
        images=max(len(s.encoded_images) for s in samples),
        min_pixels=encoder.min_pixels,
        max_pixels=encoder.max_pixels,
        tensor_parallel_size=decoding.tensor_parallel_size,
        seed=decoding.seed,
        **(
            {} if getattr(encoder, "cell", 28) else {"mm_processor_kwargs": None}
        ),  # a budget for Qwen-VL only
    )
    from vllm import SamplingParams

    failed, started = [], {}  # what never reaches the engine: (index, Reply); index -> time
    tokenizer, seen, shown = encoder.processor.tokenizer, None, 0
    if decoding.show:
        import torch

        streamer = text_streamer(tokenizer, decoding.show)

        def seen(ids):
            nonlocal shown
            streamer.put(torch.tensor(ids[shown:], dtype=torch.long))
            shown = len(ids)

    def requests():
        for i, sample in enumerate(samples):
            prompt = prepare(encoder.for_engine, sample, context)
            if isinstance(prompt, Reply):
                failed.append((i, prompt))
                continue
            started[i] = time.time()
            yield (
                i,
                prompt,
                SamplingParams(
                    max_tokens=decoding.max_new_tokens,
                    temperature=decoding.temperature,
                    seed=decoding.seed_of(sample),
                    detokenize=False,
                ),
            )

    try:
        for i, prompt, output in vllm_generate(llm, requests(), decoding.batch_size, seen):
            while failed:
                yield failed.pop()
            said = output.outputs[0]
            if seen:
                streamer.end()
            text = tokenizer.decode(said.token_ids, skip_special_tokens=True)
            reason = "length" if said.finish_reason == "length" else "stop"
            seconds = time.time() - started.pop(i)
            yield i, Reply(text, reason, len(said.token_ids), len(prompt.ids), seconds)
        yield from failed
    finally:
        del llm
        gc.collect()


def prompt_length(encoder: PromptEncoder, sample: Sample) -> int:
    """Tokens of a prompt; 0 for one that cannot be made, which fails by itself later."""
    try:
        return encoder.length(sample)
    except (OSError, ValueError):
        return 0


# ---- transformers ----
@dataclass(frozen=True)
class Generated:
    """One completion."""

    ids: list[int]  # (T,), with the end token where it came
    logps: list[float]  # (T,), of the distribution that was sampled from; empty unless asked for
    finished: bool  # False: cut at max_new_tokens


def hf_generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    token_bias: dict[int, float] | None = None,
    with_logps: bool = False,
    batch: dict | None = None,
    streamer=None,
) -> list[Generated]:
    """A completion of each prompt, by transformers' `generate` on one left-padded batch.

    Equal prompts are not padded. The caller sets torch's seed and puts the model into evaluation mode.

    Args: temperature: 0 is greedy; token_bias: {token: what is added to its logit}; with_logps: keep the
        logits of all steps (0.6 MB a token and prompt at a vocabulary of 152k) for the log-probs, which are
        those of the logits with bias and temperature; batch: the model's inputs (`OwnEncoder.batch`), for
        other families than Qwen2.5-VL; streamer: takes the tokens of a lone prompt as they come.
    """
    import torch
    from transformers import GenerationConfig

    end, pad = end_token_ids(model.generation_config, tokenizer), tokenizer.pad_token_id
    batch = batch or qwen_batch(model, prompts, pad)
    batch = {k: v.to(model.dtype) if torch.is_floating_point(v) else v for k, v in batch.items()}
    longest = batch["input_ids"].shape[1]
    # All that the model's own config would otherwise fill in, as Qwen2.5-VL's penalty of 1.05 for repetition:
    # with vLLM, which is given none of it, replies are to agree.
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    if token_bias:
        sampling["sequence_bias"] = [[[token], bias] for token, bias in token_bias.items()]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=end,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=with_logps,
        **sampling,
    )
    batch = {k: v.to(model.device) for k, v in batch.items()}
    out = model.generate(**batch, generation_config=config, streamer=streamer)
    new = out.sequences[:, longest:]  # (B, T)
    logps = torch.zeros(len(prompts), 0)
    if with_logps:  # a step at a time: the logits of all, in float32 and again as log-probs, would double it
        steps = zip(out.scores, new.split(1, dim=1), strict=True)  # (B, V), (B, 1)
        logps = torch.cat([s.float().log_softmax(-1).gather(1, token) for s, token in steps], dim=1)  # (B, T)
    generated = []
    for row, row_logps in zip(new.tolist(), logps.tolist(), strict=True):
        stop = next((t + 1 for t, token in enumerate(row) if token in end), None)
        generated.append(Generated(row[:stop], row_logps[:stop], stop is not None))
    return generated


def qwen_batch(model, prompts: Sequence[Prompt], pad: int) -> dict:
    """Inputs of Qwen2.5-VL for prompts padded on the left."""
    import torch

    longest = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in prompts])  # (B, L)
    real = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts])  # (B, L)
    batch = {"input_ids": ids, "attention_mask": real,
             # Without it positions silently become one-dimensional.
             "mm_token_type_ids": (ids == model.config.image_token_id).int()}  # fmt: skip
    if seen := [p for p in prompts if p.pixel_values is not None]:
        batch["pixel_values"] = torch.cat([p.pixel_values for p in seen])
        batch["image_grid_thw"] = torch.cat([p.image_grid_thw for p in seen])
    return batch


def hf_replies(
    model_path: str, samples: Sequence[Sample], encoder: PromptEncoder, decoding: Decoding
) -> Replies:
    """Replies of transformers' `generate`, batch_size prompts together."""
    import torch
    from transformers import AutoModelForImageTextToText

    from packing import FAMILIES, use_packed_attention

    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype).to(device).eval()
    if model.config.model_type in FAMILIES:
        use_packed_attention(model, text="sdpa")  # prompts are padded
    tokenizer, context = encoder.processor.tokenizer, context_length(model_path)
    torch.manual_seed(decoding.seed)
    for start in range(0, len(samples), decoding.batch_size):
        fitting = []  # (index, Prompt)
        for i in range(start, min(start + decoding.batch_size, len(samples))):
            prompt = prepare(encoder, samples[i], context)
            if isinstance(prompt, Reply):
                yield i, prompt
            else:
                fitting.append((i, prompt))
        if not fitting:
            continue
        prompts, started = [prompt for _, prompt in fitting], time.time()
        room = context - max(len(p.ids) for p in prompts)
        generated = hf_generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=min(decoding.max_new_tokens, room),
            temperature=decoding.temperature,
            batch=encoder.batch(prompts) if isinstance(encoder, OwnEncoder) else None,
            streamer=text_streamer(tokenizer, decoding.show, skip_prompt=True) if decoding.show else None,
        )
        seconds = time.time() - started
        for (i, prompt), said in zip(fitting, generated, strict=True):
            text = tokenizer.decode(said.ids, skip_special_tokens=True)
            reason = "stop" if said.finished else "length"
            yield i, Reply(text, reason, len(said.ids), len(prompt.ids), seconds)


# ---- APIs ----
class NoService(RuntimeError):
    """The server will answer no request at all: no key or a wrong one, an unknown model, no such host."""


ODD = 3  # attempts at an answer that is none: malformed, broken off by the server, an error in its place
WHOLE = "stop end_turn stop_sequence eos eos_token tool_calls tool_use function_call refusal".split()
CUT = ("length", "max_tokens")
BROKEN = re.compile("error|abort|cancel|time_?out|fail|resource|interrupt|overload|network|pause")
LIMITS = ("max_tokens", "max_completion_tokens")  # two names of one parameter
TOO_LONG = re.compile(r"context.{0,9}(length|limit|window|size)|(prompt|input).{0,9}too (long|large)", re.I)
TOO_HEAVY = re.compile(r"image.{0,80}(exceed|too (large|big)|maximum|dimension)", re.I)


def one_line(text: str, hide: Callable[[str], str] = str) -> str:
    """Text for a record and a screen: no markup, no control characters, no secret, at most 500 letters."""
    text = hide(re.sub(r"<[^<>]*>", " ", text[:20_000]).encode(errors="replace").decode())
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())[:500]


def reason_of(body) -> str:
    """The words of an error, whatever shape its server gives it."""
    if isinstance(body, list):
        return "; ".join(map(reason_of, body[:3]))
    if not isinstance(body, dict):
        return str(body)
    for key in ("message", "msg", "error", "detail", "errors", "reason"):
        if body.get(key):
            place = body.get("loc") or body.get("param")
            place = ".".join(map(str, place)) if isinstance(place, list) else place
            words = reason_of(body[key])
            return f"{place}: {words}" if isinstance(place, str) and place not in words else words
    return json.dumps(body)


def content_text(content) -> str:
    """The text of a message's content: itself, that of its parts, or JSON of a number or an object."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "".join(map(content_text, content))
    if isinstance(content, dict) and ("type" in content or "text" in content):
        return content_text(content.get("text", content.get("refusal")))  # not what it thought, nor tools
    return json.dumps(content, ensure_ascii=False)


def count(usage, *names: str) -> int:
    """The sum of a server's counts of tokens; what is no count is 0."""
    counts = [usage.get(name) for name in names] if isinstance(usage, dict) else []
    return sum(int(n) for n in counts if type(n) in (int, float) and 0 <= n < 1e9)


def ended(text: str, reason, prompt_tokens: int, tokens: int) -> Reply:
    """A Reply by the server's word for its end, which is kept where it says more than ours.

    A refusal and a call of a tool are what the model had to say. What a filter or an unknown reason ended is
    read as cut off; what the server broke off has failed.
    """
    word = reason.get("type") if isinstance(reason, dict) else reason
    word = one_line("" if word is None else str(word))[:60]
    plain = word.lower()
    why = "stop" if not plain or plain in WHOLE else "failed" if BROKEN.search(plain) else "length"
    text = text.encode(errors="replace").decode()  # half a surrogate pair cannot be written
    error = f"the server ended it: {word}" if why == "failed" else ""
    kept = "" if plain in ("", "stop", "end_turn", *CUT) else word
    return Reply(text, why, tokens, prompt_tokens, error=error, stop_reason=kept)


def read_openai(answer: dict) -> Reply:
    """Raises: LookupError, TypeError, AttributeError: no chat completion."""
    choice, usage = answer["choices"][0], answer.get("usage")
    message = choice.get("message", choice.get("text"))
    message = message if isinstance(message, dict) else {"content": message}
    text, reason = content_text(message.get("content")), choice.get("finish_reason")
    if not text and (text := content_text(message.get("refusal"))):
        reason = "refusal"
    if choice.get("error"):
        reason = f"error: {reason_of(choice['error'])}"
    return ended(text, reason, count(usage, "prompt_tokens"), count(usage, "completion_tokens"))


def read_anthropic(answer: dict) -> Reply:
    """Raises: LookupError, TypeError: no message."""
    if answer["content"] is None:
        raise TypeError("no content")
    usage = answer.get("usage")  # what its cache has written or read is counted apart
    seen = count(usage, "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return ended(
        content_text(answer["content"]), answer.get("stop_reason"), seen, count(usage, "output_tokens")
    )


def asked_wait(headers) -> float | None:
    """Seconds that a server asks to wait, a number or a date; None: none, or in the past, or not readable."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError, OSError):
                continue
        if seconds > 0:  # not a number is not
            return seconds
    return None


def encoded(image, kind: str, **settings) -> str:
    """Base64 of a file of that kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return base64.b64encode(buffer.getvalue()).decode()


def png(image) -> str:
    """Base64 of a lossless PNG."""
    return encoded(image, "PNG")


def encode_image(image, most: float, side: float) -> tuple[str, str, str]:
    """(media type, base64, what was done): a lossless PNG if the server takes it, else JPEG, ever coarser.

    Args: most: letters of base64; side: pixels.
    """

    size = image.size
    if max(size) > side:
        image = image.resize([max(1, int(s * side / max(size))) for s in size])
    note = "" if image.size == size else f"{image.width} x {image.height} pixels, not {size[0]} x {size[1]}"
    if len(data := png(image)) <= most:
        return "image/png", data, note
    for quality in (95, 90, 80, 70, 60, 50, 40, 30, 20):
        if len(data := encoded(image.convert("RGB"), "JPEG", quality=quality)) <= most:
            return "image/jpeg", data, ", ".join(filter(None, [f"JPEG of quality {quality}", note]))
    return (
        encode_image(image, most, max(image.size) // 2) if max(image.size) > 1 else ("image/jpeg", data, "")
    )


@dataclass
class Request:
    """One sample on its way to a server, as it is changed until the server takes it."""

    text: str
    system: str
    images: list  # PIL
    sampling: dict
    most: float  # letters of an image in base64
    changed: dict = field(default_factory=dict)  # {refused parameter: what is sent for it, {} for nothing}
    refused: set = field(default_factory=set)  # parameters
    notes: list = field(default_factory=list)
    encoded: list = field(default_factory=list)  # (media type, base64)

    def encode(self, side: float):
        self.encoded, self.notes = [], [n for n in self.notes if not n.startswith("image ")]
        for i, image in enumerate(self.images, 1):
            *encoded, note = encode_image(image, self.most, side)
            self.encoded.append(encoded)
            self.notes += [f"image {i} as {note}"] if note else []

    def lighten(self, side: float) -> bool:
        """Halve the images that a server finds too large; False: they cannot be made smaller."""
        largest = max((len(data) for _, data in self.encoded), default=0)
        if largest < 2000:
            return False
        self.most = largest // 2
        self.encode(side)
        return True

    def adapt(self, reason: str, needs_limit: bool) -> bool:
        """Do without the parameter that a server's reason names, or under its other name; False: none.

        Where prompt and reply together exceed the context, this request goes without a limit, or with what
        is left: no more than the limit, which did not fit.
        """
        limit = next((name for name in LIMITS if name in self.sampling), None)
        if TOO_LONG.search(reason):
            room = re.search(r"(\d+) \+ \d+ > (\d+)", reason)
            left = int(room[2]) - int(room[1]) if room else 0
            if limit is None or (needs_limit and not 0 < left < self.sampling[limit]):
                return False
            self.sampling.pop(limit)
            self.sampling |= {limit: left} if needs_limit else {}
            self.notes.append(f"{limit}: only what the context has left")
            return True
        name = next((n for n in self.sampling if re.search(rf"\b{n}\b", reason)), None)
        if name is None:
            return False
        instead = {}
        if name == limit and needs_limit:  # "max_tokens: 8192 > 4096"
            most = re.search(r"> *(\d+)", reason)
            if not most or not 0 < int(most[1]) < self.sampling[name]:
                return False
            instead = {name: int(most[1])}
        elif name == limit and not self.refused & set(LIMITS):
            instead = {LIMITS[1 - LIMITS.index(name)]: self.sampling[name]}
        self.refused.add(name)
        self.sampling.pop(name)
        self.sampling |= instead
        self.changed[name] = instead
        return True


class Service:
    """A server: asks it, again where that may help, and remembers the parameters that it refuses.

    Requests run in one event loop, so that an attempt has one deadline for all of it: a client's time limits
    are for the next byte, and a trickle of bytes meets them for ever.
    """

    def __init__(self, sdk, client, call, stream, read, sampling, limits, hide, decoding):
        """Args: call(Request) -> awaitable of a raw response; stream(Request, show) -> awaitable of the JSON
        that one would hold, empty if it broke off; read(JSON) -> Reply; sampling: parameters of all requests;
        limits: (letters of base64, pixels of a side) of an image, for this API."""
        self.sdk, self.client, self.call, self.stream, self.read = sdk, client, call, stream, read
        self.hide, self.decoding = hide, decoding
        self.sampling, (self.most, self.side), self.lock = sampling, limits, threading.Lock()
        self.needs_limit = sdk.__name__ == "anthropic"  # of new tokens
        self.stopped, self.loop = threading.Event(), asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def ask(self, encoder: PromptEncoder, sample: Sample) -> Reply:
        started = time.time()
        try:
            images = encoder.images(sample)
            *first, user = encoder.messages(sample)
            with self.lock:
                sampling = dict(self.sampling)
            if "seed" in sampling:
                sampling["seed"] = self.decoding.seed_of(sample)
            most = min(self.most, 6 * self.most // max(1, len(images)))  # all of a request count as well
            system = first[0]["content"] if first else ""
            request = Request(user["content"][-1]["text"], system, images, sampling, most)
            request.encode(self.side)
        except (OSError, ValueError) as failure:  # a damaged image
            return Reply("", "failed", error=one_line(f"{type(failure).__name__}: {failure}", self.hide))
        reply = self.streamed(request) or self.until_answered(request)
        self.learn(request, reply)
        note = one_line("; ".join(request.notes), self.hide)
        seconds = reply.latency_s or time.time() - started
        return replace(reply, text=self.hide(reply.text, 6), latency_s=seconds, note=note)

    def streamed(self, request: Request) -> Reply | None:
        """The reply, shown as it comes; None where nobody looks, no stream can be had, or one breaks off."""
        show, asked = self.decoding.show, time.time()
        if not show:
            return None
        try:
            answer = self.run(self.stream(request, lambda piece: show(self.hide(piece, 6))))
            reply = replace(self.read(answer), latency_s=time.time() - asked)
        except Exception:  # of any of the client's libraries: the whole answer will say what is wrong
            return None
        return None if reply.finish_reason == "failed" else reply

    def until_answered(self, request: Request) -> Reply:
        down = odd = 0
        while True:
            asked, wait = time.time(), None
            try:
                answer = json.loads(self.run(self.call(request)).http_response.content)
                if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
                    reason = reason_of(answer["error"])
                    if request.adapt(reason, self.needs_limit):
                        continue
                    reply = Reply("", "failed", error=f"error for an answer: {reason}")
                else:
                    reply = replace(self.read(answer), latency_s=time.time() - asked)
                if reply.finish_reason != "failed":
                    return reply
                odd += 1
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as failure:
                odd += 1  # not of the API's shape
                reply = Reply("", "failed", error=f"malformed answer: {type(failure).__name__}: {failure}")
            except (self.sdk.APIError, TimeoutError) as failure:
                status = getattr(failure, "status_code", 0)
                reply = self.failure(failure)
                if status in (401, 403, 404):
                    raise NoService(reply.error) from None
                wait = asked_wait(failure.response.headers) if status else None
                down += status in (0, 408, 409, 429) or status >= 500
                if status == 413 or (status in (400, 422) and TOO_HEAVY.search(reply.error)):
                    if request.lighten(self.side):
                        continue
                if status in (400, 422) and request.adapt(reply.error, self.needs_limit):
                    continue
                if not (status in (0, 408, 409, 429) or status >= 500):
                    return reply
            reply = replace(reply, error=one_line(reply.error, self.hide))
            if down > self.decoding.retries or odd >= ODD:
                return reply
            pause = min(0.25 * 2.0 ** min(down + odd - 1, 9), 8) * random.uniform(0.75, 1)
            # However long the server wants: not longer than an attempt may take.
            self.stopped.wait(min(pause if wait is None else wait, self.decoding.timeout_s))
            if self.stopped.is_set():
                return reply

    def run(self, asked):
        """What an awaitable gives within the time for an attempt."""

        async def attempt():
            async with asyncio.timeout(self.decoding.timeout_s):
                return await asked

        return asyncio.run_coroutine_threadsafe(attempt(), self.loop).result()

    def failure(self, failure: Exception) -> Reply:
        """The failed Reply that says what the server said."""
        name, status = type(failure).__name__, getattr(failure, "status_code", "")
        if isinstance(failure, TimeoutError):
            seconds = f"{self.decoding.timeout_s:g} s"
            return Reply("", "failed", error=f"APITimeoutError: no whole answer within {seconds}")
        body = getattr(failure, "body", None)
        cause = failure.__cause__ or failure  # "Connection error." alone says little
        words = reason_of(body) if body else str(failure if status else cause) or type(cause).__name__
        return Reply("", "failed", error=one_line(f"{name}{status and f' {status}'}: {words}", self.hide))

    def learn(self, request: Request, reply: Reply):
        """Once a request got an answer without a parameter, the others are sent without it as well."""
        if reply.finish_reason == "failed" or not request.changed:
            return
        with self.lock:
            for name, instead in request.changed.items():
                if name in self.sampling and self.sampling[name] != instead.get(name):
                    del self.sampling[name]
                    self.sampling |= instead
                    other = " and ".join(f"{key}={value}" for key, value in instead.items())
                    how = f"with {other}" if other else "without it"
                    print(f"warning: this model refuses a {name}; asked {how} from now on", flush=True)
        request.notes += [f"without {name}" for name in request.changed]

    def close(self):
        async def end():
            requests = asyncio.all_tasks() - {asyncio.current_task()}
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, self.client.close(), return_exceptions=True)
            self.loop.stop()

        self.stopped.set()
        asyncio.run_coroutine_threadsafe(end(), self.loop)


def api_replies(
    service: Service, samples: Sequence[Sample], encoder: PromptEncoder, decoding: Decoding
) -> Replies:
    """Replies of a server, some at a time. Raises: NoService if no request can succeed."""
    todo, done = queue.Queue(), queue.Queue()

    def work():
        while (job := todo.get()) and not service.stopped.is_set():
            try:
                done.put((job[0], service.ask(encoder, job[1])))
            except Exception as error:  # handed to the consumer, which raises it
                done.put((job[0], error))

    for _ in range(decoding.concurrency):  # daemons: a program that ends does not wait for a slow server
        threading.Thread(target=work, daemon=True).start()
    items, in_flight, refusal = iter(enumerate(samples)), 0, None
    try:
        while True:
            while refusal is None and in_flight < 2 * decoding.concurrency and (job := next(items, None)):
                todo.put(job)
                in_flight += 1
            if not in_flight:
                if refusal:
                    raise refusal
                return
            i, reply = done.get()
            in_flight -= 1
            if isinstance(reply, NoService):  # what others were told meanwhile is handed on before it
                refusal = reply
                with contextlib.suppress(queue.Empty):
                    while todo.get_nowait():
                        in_flight -= 1
            elif isinstance(reply, Exception):
                raise reply
            else:
                yield i, reply
    finally:
        service.close()
        for _ in range(decoding.concurrency):
            todo.put(None)


def api_key(variable: str, base_url: str | None) -> str:
    """The key in an environment variable; a server of one's own may do without."""
    if key := os.environ.get(variable):
        return key
    if base_url:
        return "EMPTY"
    raise NoService(f"{variable} is not set: export {variable}=..., or name your own server with --base_url")


def connection(key: str, base_url: str | None) -> tuple[dict, Callable]:
    """(settings of a client, what hides the secrets in a text: the key, and all of a URL but its place).

    Raises: ValueError if the URL is none.
    """
    address, query = base_url, ""
    if base_url:
        address, _, query = base_url.strip().partition("#")[0].partition("?")
        try:
            parts = urlsplit(address)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                f"base_url: expected http://HOST:PORT/PATH, got {public_url(base_url) or 'another text'}"
            )
    secrets = {*url_secrets(base_url or ""), *([key] if key != "EMPTY" else [])}
    spelled = {form for s in secrets for form in (s, quote(s, safe=""), quote_plus(s), json.dumps(s)[1:-1])}
    longest_first = sorted(filter(None, spelled), key=len, reverse=True)

    def hide(text: str, least: int = 1) -> str:
        """Args: least: letters of a secret that is hidden; short ones are hidden only as whole words."""
        for secret in longest_first:
            edge = ("", "") if len(secret) > 5 else (r"(?<!\w)", r"(?!\w)")
            if len(secret) >= least:
                text = re.sub(edge[0] + re.escape(secret) + edge[1], "***", text, flags=re.I)
        return text

    query = dict(parse_qsl(query, keep_blank_values=True))
    ours = {"timeout": None, "max_retries": 0}  # Service sees to both
    return {"api_key": key, "base_url": address, "default_query": query} | ours, hide


def openai_replies(
    model: str, samples: Sequence[Sample], encoder: PromptEncoder, decoding: Decoding
) -> Replies:
    """Replies of an OpenAI-compatible chat endpoint: OpenAI's, or decoding.base_url (vLLM, SGLang, ...)."""
    import openai

    settings, hide = connection(api_key("OPENAI_API_KEY", decoding.base_url), decoding.base_url)
    client = openai.AsyncOpenAI(**settings)
    # Servers of one's own know the first, OpenAI's newer models want the second.
    limit = LIMITS[0 if decoding.base_url else 1]
    sampling = {"temperature": decoding.temperature, "seed": 0, limit: decoding.max_new_tokens}

    def body(request: Request) -> dict:
        urls = [f"data:{media};base64,{data}" for media, data in request.encoded]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": request.text}]})
        return {"model": model, "messages": messages, "extra_body": request.sampling}

    def call(request: Request):
        return client.chat.completions.with_raw_response.create(**body(request))

    async def stream(request: Request, show) -> dict:
        text, why, usage = "", None, None
        async for chunk in await client.chat.completions.create(
            **body(request), stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices[:1]:
                why = choice.finish_reason or why
                text += choice.delta.content or ""
                show(choice.delta.content or "")
        choice = {"message": {"content": text}, "finish_reason": why}
        return {"choices": [choice], "usage": usage and usage.model_dump()} if why else {}

    limits = (20e6, math.inf)  # of OpenAI: 20 MB an image
    service = Service(openai, client, call, stream, read_openai, sampling, limits, hide, decoding)
    return api_replies(service, samples, encoder, decoding)


def anthropic_replies(
    model: str, samples: Sequence[Sample], encoder: PromptEncoder, decoding: Decoding
) -> Replies:
    """Replies of Anthropic's messages endpoint, or one like it at decoding.base_url."""
    import anthropic

    settings, hide = connection(api_key("ANTHROPIC_API_KEY", decoding.base_url), decoding.base_url)
    client = anthropic.AsyncAnthropic(**settings)
    sampling = {"temperature": decoding.temperature, "max_tokens": decoding.max_new_tokens}  # no seed at all

    def body(request: Request) -> dict:
        sources = [{"type": "base64", "media_type": media, "data": data} for media, data in request.encoded]
        content = [{"type": "image", "source": source} for source in sources]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": request.text}]}]
        # The same for many calls: the server keeps what it has computed of it.
        system = [{"type": "text", "text": request.system, "cache_control": {"type": "ephemeral"}}]
        return {
            "model": model,
            "messages": messages,
            "max_tokens": request.sampling["max_tokens"],
            "extra_body": request.sampling,  # `create` has no argument for a temperature
            "system": system if request.system else [],
        }

    def call(request: Request):
        return client.messages.with_raw_response.create(**body(request))

    async def stream(request: Request, show) -> dict:
        async with client.messages.stream(**body(request)) as pieces:
            async for piece in pieces.text_stream:
                show(piece)
            answer = (await pieces.get_final_message()).model_dump()
        return answer if answer["stop_reason"] else {}

    limits = (5 * 2**20, 8000)  # of Anthropic: 5 MB and 8,000 pixels an image
    service = Service(anthropic, client, call, stream, read_anthropic, sampling, limits, hide, decoding)
    return api_replies(service, samples, encoder, decoding)


PROVIDERS = {"vllm": vllm_replies, "hf": hf_replies, "openai": openai_replies, "anthropic": anthropic_replies}
APIS = ("openai", "anthropic")


def choose_provider() -> str:
    """vllm where its build fits this machine, else hf."""
    return "vllm" if package_version("vllm" if has_gpu() else "vllm-cpu") else "hf"


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
