"""What an answer is, and how models behind an OpenAI-compatible or Anthropic API are asked for one.

    for i, reply in openai_replies("gpt-4o", samples, encoder, Decoding(concurrency=16)): ...

A server may answer late, broken, in another shape or with an error in place of an answer. `Service` asks
again where that may help, within one deadline for each attempt, does without the parameters that the server
refuses, and keeps the server's own words; no key, and no secret of a URL, comes out of here.
"""

import asyncio
import base64
import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

from config import public_url, url_secrets
from data import PromptEncoder, Sample


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


class NoService(RuntimeError):
    """The server will answer no request at all: no key or a wrong one, an unknown model."""


ODD = 3  # attempts at an answer that is none: malformed, broken off by the server, an error in its place
WHOLE = "stop end_turn stop_sequence eos eos_token tool_calls tool_use function_call refusal".split()
CUT = ("length", "max_tokens")
BROKEN = re.compile("error|abort|cancel|time_?out|fail|resource|interrupt|overload|network|pause")
LIMITS = ("max_tokens", "max_completion_tokens")  # two names of one parameter
TOO_LONG = re.compile(r"context.{0,9}(length|limit|window|size)|(prompt|input).{0,9}too (long|large)", re.I)
AT_MOST = re.compile(r"(?:>|<=|at most|up to|equal to|\[\d+,|maximum(?: [a-z]+){0,4}:?)[ `]*(\d{1,9})", re.I)
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

    content: list[dict]  # of the user's message: texts, and images in the order of `images`
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

    def parts(self, show: Callable[[str, str], dict]) -> list[dict]:
        """The content as a server takes it. Args: show(media type, base64) -> an image's part."""
        encoded = iter(self.encoded)
        return [part if part["type"] == "text" else show(*next(encoded)) for part in self.content]

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
        fits = (n for n in map(int, AT_MOST.findall(reason)) if 0 < n < self.sampling[name])
        if name == limit and (most := next(fits, None)):  # "max_tokens: 8192 > 4096"
            instead = {name: most}
        elif name == limit and needs_limit:
            return False
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
        self.answered = False
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
            request = Request(user["content"], system, images, sampling, most)
            request.encode(self.side)
        except (OSError, ValueError) as failure:  # a damaged image
            return Reply("", "failed", error=one_line(f"{type(failure).__name__}: {failure}", self.hide))
        reply = self.streamed(request) or self.until_answered(request)
        self.answered |= reply.finish_reason != "failed"
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
                # 403 is a moderator's word for one item as well, and 404 one of a model that has answered.
                if status == 401 or (status == 404 and not self.answered):
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
        for name, instead in request.changed.items():
            other = " and ".join(f"{key}={value}" for key, value in instead.items())
            request.notes.append(how := f"with {other}" if other else f"without {name}")
            with self.lock:
                if name in self.sampling and self.sampling[name] != instead.get(name):
                    del self.sampling[name]
                    self.sampling |= instead
                    print(f"warning: this model refuses a {name}; asked {how} from now on", flush=True)

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


def split_url(url: str | None, name: str = "base_url") -> tuple[str | None, str]:
    """(address, query) of a server. Raises: ValueError with the name of the option if the URL is none."""
    if not url:
        return url, ""
    address, _, query = url.strip().partition("#")[0].partition("?")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{name}: expected http://HOST:PORT/PATH, got {public_url(url) or 'another text'}")
    return address, query


def connection(key: str, base_url: str | None) -> tuple[dict, Callable]:
    """(settings of a client, what hides the secrets in a text: the key, and all of a URL but its place).

    Raises: ValueError if the URL is none.
    """
    address, query = split_url(base_url)
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
        content = request.parts(
            lambda media, data: {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}
        )
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": content})
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
        def show(media: str, data: str) -> dict:
            return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}

        messages = [{"role": "user", "content": request.parts(show)}]
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
