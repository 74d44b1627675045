"""Who answers: vLLM, transformers, and models behind an OpenAI-compatible or Anthropic API.

    for i, reply in vllm_replies(model_path, samples, encoder, Decoding()): ...

Every back end takes samples and a `data.PromptEncoder` and yields (index of the sample, Reply) as replies
come in, in any order. All show the model the same prompt: images first, resized once into one pixel budget,
then the text. A request that fails for good is a Reply with finish_reason "failed" and says why.

The trainer samples with the same engines: `start_vllm`, `vllm_generate` and `hf_generate` take prompts and
give token ids, and what is true of them (dtype on a CPU, the end of a reply, whose sampling settings count)
is true of both.
"""

import base64
import contextlib
import gc
import importlib.metadata
import io
import os
import queue
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from data import Prompt, PromptEncoder, Sample


@dataclass(frozen=True)
class Reply:
    """What a model said to one sample."""

    text: str
    finish_reason: str  # stop, length, or failed
    n_tokens: int = 0  # generated, with the end token
    prompt_tokens: int = 0  # with the images'
    latency_s: float = 0.0
    error: str = ""  # why it failed


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


def end_token_ids(generation_config, tokenizer) -> list[int]:
    """Tokens that end a reply: those of the model's generation config and the tokenizer's, as vLLM has it."""
    ids = generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


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
        # The budget that the images fit already, so that vLLM does not resize them again.
        "mm_processor_kwargs": {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}},
    }
    return LLM(model=model, **defaults | settings)


def vllm_generate(llm, requests: Iterable[tuple], at_once: int | None) -> Iterator[tuple]:
    """Work off requests and yield each with what it gave, as they finish: in any order.

    With all of them at once the engine sees what `llm.generate` would show it. With fewer, prompts and their
    images are made only when there is room for them, so that memory does not grow with their number.

    Args: requests: (key, Prompt, SamplingParams), n of which may be more than 1; at_once: requests in the
        engine at a time, None: all. The engine has to be idle, and this iterator to be run to its end.
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
            params.output_kind = RequestOutputKind.FINAL_ONLY
            running[str(n)] = (key, prompt)
            engine.add_request(str(n), request, params)
        if not running:
            return
        for output in engine.step():
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
    )
    from vllm import SamplingParams

    failed, started = [], {}  # what never reaches the engine: (index, Reply); index -> time

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
        for i, prompt, output in vllm_generate(llm, requests(), decoding.batch_size):
            while failed:
                yield failed.pop()
            said = output.outputs[0]
            text = encoder.processor.tokenizer.decode(said.token_ids, skip_special_tokens=True)
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
) -> list[Generated]:
    """A completion of each prompt, by transformers' `generate` on one left-padded batch.

    Equal prompts are not padded. The caller sets torch's seed and puts the model into evaluation mode.

    Args: temperature: 0 is greedy; token_bias: {token: what is added to its logit}; with_logps: keep the
        logits of all steps (0.6 MB a token and prompt at a vocabulary of 152k) for the log-probs, which are
        those of the logits with bias and temperature.
    """
    import torch
    from transformers import GenerationConfig

    longest = max(len(p.ids) for p in prompts)
    end, pad = end_token_ids(model.generation_config, tokenizer), tokenizer.pad_token_id
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
    out = model.generate(**{k: v.to(model.device) for k, v in batch.items()}, generation_config=config)
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
        )
        seconds = time.time() - started
        for (i, prompt), said in zip(fitting, generated, strict=True):
            text = tokenizer.decode(said.ids, skip_special_tokens=True)
            reason = "stop" if said.finished else "length"
            yield i, Reply(text, reason, len(said.ids), len(prompt.ids), seconds)


# ---- APIs ----
class NoService(RuntimeError):
    """The server will answer no request at all: no key or a wrong one, an unknown model, no such host."""


def api_replies(
    complete: Callable,
    sdk,
    key: str,
    sampling: dict,
    samples: Sequence[Sample],
    encoder: PromptEncoder,
    decoding: Decoding,
) -> Replies:
    """Replies of `complete` (text, images as base64 PNG, seed, instructions -> Reply), some at a time.

    The client library waits and asks again after 429, 5xx, timeouts and cut connections by itself
    (exponential backoff with jitter, Retry-After); an answer that cannot be read is asked for again here. A
    model that takes no temperature is asked without: `sampling`, which the calls share, is emptied.
    Raises: NoService if no request can succeed.
    """

    def ask(sample):
        started, error = time.time(), ""
        try:
            images = [png(image) for image in encoder.images(sample)]
            *first, user = encoder.messages(sample)
            text, system = user["content"][-1]["text"], first[0]["content"] if first else ""
        except (OSError, ValueError) as failure:  # a damaged image
            return Reply("", "failed", error=f"{type(failure).__name__}: {failure}")
        for _ in range(3):
            asked = time.time()
            try:
                return replace(
                    complete(text, images, decoding.seed_of(sample), system), latency_s=time.time() - asked
                )
            except (sdk.AuthenticationError, sdk.PermissionDeniedError, sdk.NotFoundError) as refusal:
                raise NoService(f"{type(refusal).__name__}: {refusal}".replace(key, "***")[:500]) from None
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
            if isinstance(
                reply, NoService
            ):  # what others were told meanwhile is handed on before it is raised
                refusal = reply
                with contextlib.suppress(queue.Empty):
                    while todo.get_nowait():
                        in_flight -= 1
            elif isinstance(reply, Exception):
                raise reply
            else:
                yield i, reply
    finally:
        stopped.set()
        for _ in range(decoding.concurrency):
            todo.put(None)


def api_key(variable: str, base_url: str | None) -> str:
    """The key in an environment variable; a server of one's own may do without."""
    if key := os.environ.get(variable):
        return key
    if base_url:
        return "EMPTY"
    raise NoService(f"{variable} is not set: export {variable}=..., or name your own server with --base_url")


def png(image) -> str:
    """Base64 of a lossless PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def openai_replies(
    model: str, samples: Sequence[Sample], encoder: PromptEncoder, decoding: Decoding
) -> Replies:
    """Replies of an OpenAI-compatible chat endpoint: OpenAI's, or decoding.base_url (vLLM, SGLang, ...)."""
    import openai

    key, sampling = api_key("OPENAI_API_KEY", decoding.base_url), {"temperature": decoding.temperature}
    client = openai.OpenAI(
        api_key=key, base_url=decoding.base_url, timeout=decoding.timeout_s, max_retries=decoding.retries
    )
    # Servers of one's own know the first, OpenAI's newer models want the second.
    limit = "max_tokens" if decoding.base_url else "max_completion_tokens"

    def complete(text, images, seed, system):
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{i}"}} for i in images]
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        answer = client.chat.completions.create(
            model=model, messages=messages, seed=seed, **sampling, **{limit: decoding.max_new_tokens}
        )
        choice, usage = answer.choices[0], answer.usage  # some servers count no tokens
        why = "length" if choice.finish_reason == "length" else "stop"
        return Reply(
            choice.message.content or "",
            why,
            getattr(usage, "completion_tokens", 0),
            getattr(usage, "prompt_tokens", 0),
        )

    return api_replies(complete, openai, key, sampling, samples, encoder, decoding)


def anthropic_replies(
    model: str, samples: Sequence[Sample], encoder: PromptEncoder, decoding: Decoding
) -> Replies:
    """Replies of Anthropic's messages endpoint, or one like it at decoding.base_url."""
    import anthropic

    key, sampling = api_key("ANTHROPIC_API_KEY", decoding.base_url), {"temperature": decoding.temperature}
    client = anthropic.Anthropic(
        api_key=key, base_url=decoding.base_url, timeout=decoding.timeout_s, max_retries=decoding.retries
    )

    def complete(text, images, seed, system):
        sources = [{"type": "base64", "media_type": "image/png", "data": i} for i in images]
        content = [{"type": "image", "source": source} for source in sources]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        answer = client.messages.create(  # no argument for a temperature, and no seed at all
            model=model,
            messages=messages,
            max_tokens=decoding.max_new_tokens,
            extra_body=dict(sampling),
            # The same for many calls: the server keeps what it has computed of it.
            system=[{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]
            if system
            else [],
        )
        text = "".join(block.text for block in answer.content if block.type == "text")
        why = "length" if answer.stop_reason == "max_tokens" else "stop"
        usage = answer.usage  # what its cache has written or read is counted apart
        cached = (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)
        return Reply(text, why, usage.output_tokens, usage.input_tokens + cached)

    return api_replies(complete, anthropic, key, sampling, samples, encoder, decoding)


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
