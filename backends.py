"""Who answers: vLLM, transformers, and models behind an API (apis.py).

    for i, reply in vllm_replies(model_path, samples, encoder, Decoding()): ...

Every back end takes samples and a `data.PromptEncoder` and yields (index of the sample, Reply) as replies
come in, in any order. All show the model the same prompt: images first, resized once into one pixel budget,
then the text. A model of another family than Qwen-VL gets its images unresized: its own processor sees to
that (`OwnEncoder`). A request that fails for good is a Reply with finish_reason "failed" and says why.

The trainer samples with the same engines: `start_vllm`, `vllm_generate` and `hf_generate` take prompts and
give token ids, and what is true of them (dtype on a CPU, the end of a reply, whose sampling settings count)
is true of both.
"""

import gc
import importlib.metadata
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from apis import Decoding, Replies, Reply, anthropic_replies, openai_replies
from data import Prompt, PromptEncoder, Sample, smart_size


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
        self.box_frame = plain.box_frame
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
