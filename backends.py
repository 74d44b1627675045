"""Who answers: vLLM, transformers, and models behind an OpenAI-compatible or Anthropic API.

    for i, reply in vllm_replies(model_path, samples, encode, Decoding()): ...

Every back end takes samples and a `data.PromptEncoder` and yields (index of the sample, Reply) as replies
come in, in any order. All show the model the same prompt: images first, resized once into one pixel budget,
then the text. A request that fails for good is a Reply with finish_reason "failed" and says why.
"""

import base64
import gc
import importlib.metadata
import io
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from data import Prompt, PromptEncoder, Sample


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str  # stop, length, or failed
    n_tokens: int = 0
    prompt_tokens: int = 0
    latency_s: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Decoding:
    max_new_tokens: int = 2048
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    batch_size: int = 8  # vllm: requests in the engine at a time; hf: prompts generated together
    tensor_parallel_size: int = 1  # vllm: GPUs of one copy of the model
    base_url: str | None = None  # APIs: where the server is
    concurrency: int = 16  # APIs: requests at a time
    timeout_s: float = 300.0  # APIs: for one attempt
    retries: int = 8  # APIs: further attempts after 429, 5xx, a timeout or a cut connection

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


# ---- vLLM ----
def vllm_replies(model_path: str, samples: Sequence[Sample], encode: PromptEncoder, how: Decoding) -> Replies:
    """Replies of a vLLM engine that lives as long as the iterator and holds up to batch_size requests."""
    import torch

    cpu = not torch.cuda.is_available()
    if cpu:  # in this process, with a small cache: the default takes half of the memory
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    context = context_length(model_path)
    longest = max(_length(encode, s) for s in samples)
    length = min(context, longest + how.max_new_tokens)
    # A prompt prefilled in two chunks rewinds its seeded generator, which a CPU generator cannot do.
    device = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, length)} if cpu else {}
    llm = LLM(
        model=model_path,
        dtype="float32" if cpu else "auto",
        max_model_len=length,
        tensor_parallel_size=how.tensor_parallel_size,
        **device,
        limit_mm_per_prompt={"image": max(len(s.encoded_images) for s in samples), "video": 0},
        # The budget the images already fit, so that vLLM does not resize them again.
        mm_processor_kwargs={"size": {"shortest_edge": encode.min_pixels, "longest_edge": encode.max_pixels}},
        seed=how.seed,
    )
    engine, todo, flying = llm.llm_engine, iter(enumerate(samples)), {}
    try:
        while True:
            while len(flying) < how.batch_size and (found := next(todo, None)):
                i, sample = found
                prompt = prepare(encode.for_engine, sample, context)
                if isinstance(prompt, Reply):
                    yield i, prompt
                    continue
                request = {"prompt_token_ids": prompt.vllm_ids}
                request |= {"multi_modal_data": {"image": prompt.images}} if prompt.images else {}
                params = SamplingParams(
                    max_tokens=how.max_new_tokens,
                    temperature=how.temperature,
                    seed=how.seed_of(sample),
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(str(i), request, params)
                flying[str(i)] = (prompt.ids, time.time())
            if not flying:
                return
            for output in engine.step():
                if output.finished:
                    ids, started = flying.pop(output.request_id)
                    yield int(output.request_id), _vllm_reply(ids, output, encode, time.time() - started)
    finally:
        del engine, llm
        gc.collect()


def _length(encode: PromptEncoder, sample: Sample) -> int:
    """Tokens of a prompt; 0 for one that cannot be made, which fails by itself later."""
    try:
        return encode.length(sample)
    except (OSError, ValueError):
        return 0


def _vllm_reply(ids: list[int], output, encode: PromptEncoder, seconds: float) -> Reply:
    if output.prompt_token_ids != ids:
        got, expected = len(output.prompt_token_ids), len(ids)
        raise RuntimeError(f"item {output.request_id}: vLLM's prompt ({got} tokens) is not ours ({expected})")
    done = output.outputs[0]
    text = encode.processor.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    why = "length" if done.finish_reason == "length" else "stop"
    return Reply(text, why, len(done.token_ids), len(ids), seconds)


# ---- transformers ----
def hf_replies(model_path: str, samples: Sequence[Sample], encode: PromptEncoder, how: Decoding) -> Replies:
    """Replies of transformers' `generate` on left-padded batches."""
    import torch
    from transformers import AutoModelForImageTextToText

    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype).to(device).eval()
    torch.manual_seed(how.seed)
    context = context_length(model_path)
    for start in range(0, len(samples), how.batch_size):
        fits = []
        for i in range(start, min(start + how.batch_size, len(samples))):
            prompt = prepare(encode, samples[i], context)
            if isinstance(prompt, Reply):
                yield i, prompt
            else:
                fits.append((i, prompt))
        if fits:
            where, prompts = zip(*fits, strict=True)
            done = _hf_batch(model, encode.processor.tokenizer, prompts, how, context)
            yield from zip(where, done, strict=True)


def _hf_batch(model, tokenizer, prompts: Sequence[Prompt], how: Decoding, context: int) -> list[Reply]:
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
    # All that the model's own config would otherwise fill in, as Qwen2.5-VL's penalty of 1.05 for repetition:
    # with vLLM, which is given none of it, replies are to agree.
    sampling = {"temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature else {}
    config = GenerationConfig(
        max_new_tokens=min(how.max_new_tokens, context - longest),
        do_sample=how.temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=sorted(eos),
        pad_token_id=pad,
        **sampling,
    )
    started = time.time()
    with torch.inference_mode():
        out = model.generate(**{k: v.to(model.device) for k, v in batch.items()}, generation_config=config)
    replies = []
    for prompt, row in zip(prompts, out[:, longest:].tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in eos), None)
        tokens = row if end is None else row[: end + 1]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        why = "length" if end is None else "stop"
        replies.append(Reply(text, why, len(tokens), len(prompt.ids), time.time() - started))
    return replies


# ---- APIs ----
class Refused(RuntimeError):
    """The server will answer no request at all: a wrong key, an unknown model."""


def api_replies(
    complete: Callable,
    sdk,
    key: str,
    sampling: dict,
    samples: Sequence[Sample],
    encode: PromptEncoder,
    how: Decoding,
) -> Replies:
    """Replies of `complete` (text, images as base64 PNG, seed -> Reply), how.concurrency at a time.

    The client library waits and asks again after 429, 5xx, timeouts and cut connections by itself
    (exponential backoff with jitter, Retry-After); an answer that cannot be read is asked for again here. A
    model that takes no temperature is asked without: `sampling`, which the calls share, is emptied.
    Raises: Refused if no request can succeed.
    """

    def ask(sample):
        started, error = time.time(), ""
        try:
            images = [png(image) for image in encode.images(sample)]
            text = encode.messages(sample)[0]["content"][-1]["text"]
        except (OSError, ValueError) as failure:  # a damaged image
            return Reply("", "failed", error=f"{type(failure).__name__}: {failure}")
        for _ in range(3):
            asked = time.time()
            try:
                return replace(complete(text, images, how.seed_of(sample)), latency_s=time.time() - asked)
            except (sdk.AuthenticationError, sdk.PermissionDeniedError, sdk.NotFoundError) as refusal:
                raise Refused(f"{type(refusal).__name__}: {refusal}".replace(key, "***")[:500]) from None
            except sdk.APIError as failure:
                error = f"{type(failure).__name__}: {failure}"
                if isinstance(failure, sdk.BadRequestError) and "temperature" in str(failure):
                    if sampling:
                        print("warning: this model refuses a temperature; asked without it", flush=True)
                        sampling.clear()
                elif not isinstance(failure, sdk.APIResponseValidationError):
                    break
            except (ValueError, TypeError, LookupError, AttributeError) as failure:  # the answer's shape
                error = f"malformed answer: {type(failure).__name__}: {failure}"
        return Reply("", "failed", latency_s=time.time() - started, error=error.replace(key, "***")[:500])

    todo, done, stopped = queue.Queue(), queue.Queue(), threading.Event()

    def work():
        while (job := todo.get()) and not stopped.is_set():
            try:
                done.put((job[0], ask(job[1])))
            except Exception as error:  # handed to the consumer, which raises it
                done.put((job[0], error))

    for _ in range(how.concurrency):  # daemons: a program that ends does not wait for a slow server
        threading.Thread(target=work, daemon=True).start()
    items, flying = iter(enumerate(samples)), 0
    try:
        while True:
            while flying < 2 * how.concurrency and (found := next(items, None)):
                todo.put(found)
                flying += 1
            if not flying:
                return
            i, reply = done.get()
            flying -= 1
            if isinstance(reply, Exception):
                raise reply
            yield i, reply
    finally:
        stopped.set()
        for _ in range(how.concurrency):
            todo.put(None)


def api_key(variable: str, base_url: str | None) -> str:
    """The key in an environment variable; a server of one's own may do without."""
    if key := os.environ.get(variable):
        return key
    if base_url:
        return "EMPTY"
    raise Refused(f"{variable} is not set: export {variable}=..., or name your own server with --base_url")


def png(image) -> str:
    """Base64 of a lossless PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def openai_replies(model: str, samples: Sequence[Sample], encode: PromptEncoder, how: Decoding) -> Replies:
    """Replies of an OpenAI-compatible chat endpoint: OpenAI's, or how.base_url (vLLM, SGLang, ...)."""
    import openai

    key, sampling = api_key("OPENAI_API_KEY", how.base_url), {"temperature": how.temperature}
    client = openai.OpenAI(api_key=key, base_url=how.base_url, timeout=how.timeout_s, max_retries=how.retries)
    limit = "max_tokens" if how.base_url else "max_completion_tokens"  # OpenAI's newer models want the second

    def complete(text, images, seed):
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{i}"}} for i in images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        answer = client.chat.completions.create(
            model=model, messages=messages, seed=seed, **sampling, **{limit: how.max_new_tokens}
        )
        choice, usage = answer.choices[0], answer.usage  # some servers count no tokens
        why = "length" if choice.finish_reason == "length" else "stop"
        return Reply(
            choice.message.content or "",
            why,
            getattr(usage, "completion_tokens", 0),
            getattr(usage, "prompt_tokens", 0),
        )

    return api_replies(complete, openai, key, sampling, samples, encode, how)


def anthropic_replies(model: str, samples: Sequence[Sample], encode: PromptEncoder, how: Decoding) -> Replies:
    """Replies of Anthropic's messages endpoint, or one like it at how.base_url."""
    import anthropic

    key, sampling = api_key("ANTHROPIC_API_KEY", how.base_url), {"temperature": how.temperature}
    client = anthropic.Anthropic(
        api_key=key, base_url=how.base_url, timeout=how.timeout_s, max_retries=how.retries
    )

    def complete(text, images, seed):
        sources = [{"type": "base64", "media_type": "image/png", "data": i} for i in images]
        content = [{"type": "image", "source": source} for source in sources]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        answer = client.messages.create(  # no argument for a temperature, and no seed at all
            model=model, messages=messages, max_tokens=how.max_new_tokens, extra_body=dict(sampling)
        )
        text = "".join(block.text for block in answer.content if block.type == "text")
        why = "length" if answer.stop_reason == "max_tokens" else "stop"
        return Reply(text, why, answer.usage.output_tokens, answer.usage.input_tokens)

    return api_replies(complete, anthropic, key, sampling, samples, encode, how)


PROVIDERS = {"vllm": vllm_replies, "hf": hf_replies, "openai": openai_replies, "anthropic": anthropic_replies}
APIS = ("openai", "anthropic")


def choose_provider() -> str:
    """vllm where its build fits this machine, else hf."""
    import torch

    return "vllm" if package_version("vllm" if torch.cuda.is_available() else "vllm-cpu") else "hf"


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
