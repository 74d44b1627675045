"""backends.py: real engines on the tiny model, real clients against a server that misbehaves."""

import base64
import email.utils
import io
import json
import os
import random
import re
import shutil
import time
import urllib.parse
import urllib.request
from dataclasses import replace

import pictures
import pytest
import torch
from bounds import logp_bound
from families import FAMILIES, HOW, SAMPLES, build, encoder_of
from families import said as said_in_order
from fixtures import flags, served
from PIL import Image
from programs import run_script, start_script, wait_until
from servers import KEY, anthropic_answer, openai_answer, serve, text_of

from apis import Decoding, asked_wait, encode_image
from backends import PROVIDERS, OwnEncoder, check_weights, encoder_for, end_token_ids, hf_generate, qwen_batch
from config import public_url
from data import PromptEncoder, Sample, load_samples
from evaluate import main
from results import read_records

QUICK = {"retry-after-ms": "20"}
ANSWER = {"openai": openai_answer, "anthropic": anthropic_answer}
ERROR = {"error": {"type": "x", "message": f"no good, your key {KEY}"}}
FAULTS = {  # every item meets one of these before it is answered
    "429": (429, ERROR, QUICK),
    "500": (500, ERROR, QUICK),
    "503 without words": (503, b"", QUICK),
    "hang": "hang",
    "cut": "cut",
    "malformed JSON": (200, b'{"choices": [', {}),
    "empty body": (200, b"", {}),
    "another shape": (200, {"hello": "world"}, {}),
    "no choices": (200, {"choices": [], "content": None, "usage": None}, {}),
}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def ask(url, provider, data, out, *extra, limit=9):
    url = f"{url}/v1" if provider == "openai" else url
    main(
        [
            *("--dataset", str(data / "val.parquet"), "--model_path", "tiny", "--provider", provider),
            *("--base_url", url, "--min_pixels", "784", "--limit", str(limit), "--out", str(out)),
            *("--custom_filename", "x", "--timeout", "0.6", "--concurrency", "4", *extra),
        ]
    )
    return read_records(out / "x.jsonl")


# ---- APIs ----
@pytest.mark.parametrize("provider", ANSWER)
def test_every_fault_is_outlived(provider, tiny_data, tmp_path, capsys):
    faults, met = list(FAULTS.values()), {}

    def respond(body, nth):
        fault = faults[met.setdefault(text_of(body), len(met)) % len(faults)]
        return fault if nth == 1 else (200, ANSWER[provider]("(A)"), {})

    with serve(respond) as (url, api):
        header, records = ask(url, provider, tiny_data, tmp_path, "--price", "2", "10")
    assert [r["reply"] for r in records] == ["(A)"] * 9 and {r["method"] for r in records} == {"letter"}
    assert set(api.counts.values()) == {2}  # the fault, and the answer
    assert {r["finish_reason"] for r in records} == {"stop"} and all(r["latency_s"] >= 0 for r in records)
    summary = json.loads((tmp_path / "x.summary.json").read_text())
    assert (summary["prompt_tokens"], summary["tokens"], summary["failed"]) == (450, 27, 0)
    assert summary["usd"] == (450 * 2 + 27 * 10) / 1e6
    assert KEY not in (tmp_path / "x.jsonl").read_text() + "".join(capsys.readouterr())
    assert any(KEY in value for value in api.headers[0].values())


@pytest.mark.parametrize("provider", ANSWER)
def test_what_is_sent(provider, tiny_data, tmp_path):
    with serve(lambda body, nth: (200, ANSWER[provider]("(A)"), {})) as (url, api):
        ask(url, provider, tiny_data, tmp_path, "--max_new_tokens", "77", "--min_pixels", "12544", limit=2)
    body = api.bodies[0]
    assert body["temperature"] == 0.0 and body["max_tokens"] == 77 and body["model"] == "tiny"
    image, text = body["messages"][0]["content"]  # the image first
    encoded = image["source"]["data"] if provider == "anthropic" else image["image_url"]["url"].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (112, 112)  # 84 x 84, scaled up once
    assert "<observe>" in text["text"] and "Image size: (84 x 84)" in text["text"]
    assert api.most <= 4


@pytest.mark.parametrize("provider", ANSWER)
def test_a_model_without_temperature_is_asked_without(provider, tiny_data, tmp_path, capsys):
    def respond(body, nth):
        if "temperature" in body:
            return 400, {"error": {"type": "x", "message": "temperature is not supported"}}, {}
        return 200, ANSWER[provider]("(A)"), {}

    with serve(respond) as (url, api):
        _, records = ask(url, provider, tiny_data, tmp_path, "--concurrency", "1")
    assert {r["reply"] for r in records} == {"(A)"} and len(api.bodies) == 10
    assert capsys.readouterr().out.count("refuses a temperature") == 1


def test_what_fails_for_good_is_counted_and_asked_again(tiny_data, tmp_path):
    broken = {}

    def respond(body, nth):
        if not broken:
            broken[text_of(body)] = True
        if broken.get(text_of(body)):
            return 400, ERROR, {}
        return 200, openai_answer("(A)"), {}

    with serve(respond) as (url, api):
        with pytest.raises(SystemExit, match="1 items failed or are missing, expected at most 0"):
            ask(url, "openai", tiny_data, tmp_path)
        _, records = read_records(tmp_path / "x.jsonl")
        failed = [r for r in records if r["finish_reason"] == "failed"]
        assert len(failed) == 1 and "BadRequestError" in failed[0]["error"] and KEY not in failed[0]["error"]
        assert failed[0]["correct"] is False and failed[0]["method"] == "failed"
        assert json.loads((tmp_path / "x.summary.json").read_text())["failed"] == 1
        ask(url, "openai", tiny_data, tmp_path, "--max_failures", "1")
        asked = sum(api.counts.values())
        broken[next(iter(broken))] = False
        _, records = ask(url, "openai", tiny_data, tmp_path)
        assert sum(api.counts.values()) == asked + 1  # that one alone
    assert len(records) == 9 and {r["finish_reason"] for r in records} == {"stop"}


@pytest.mark.parametrize("status, first", [(403, True), (403, False), (404, False)])
def test_an_item_that_a_server_refuses_does_not_end_the_run(status, first, tiny_data, tmp_path):
    """A moderator's 403, be it the very first answer; a 404 of a model that has answered."""

    def respond(body, nth):
        return (
            (status, ERROR, {}) if len(api.bodies) == (1 if first else 4) else (200, openai_answer("(A)"), {})
        )

    with serve(respond) as (url, api):
        with pytest.raises(SystemExit, match="1 items failed or are missing"):
            ask(url, "openai", tiny_data, tmp_path, "--concurrency", "1")
    _, records = read_records(tmp_path / "x.jsonl")
    assert len(records) == 9
    assert [str(status) in r["error"] for r in records if r["finish_reason"] == "failed"] == [True]


@pytest.mark.parametrize("status, name", [(401, "AuthenticationError"), (404, "NotFoundError")])
def test_a_server_that_refuses_everything_ends_the_run(status, name, tiny_data, tmp_path):
    with serve(lambda body, nth: (status, ERROR, {})) as (url, api):
        with pytest.raises(SystemExit, match=f"(?s){name}.*nothing is lost") as ended:
            ask(url, "openai", tiny_data, tmp_path)
    assert KEY not in str(ended.value) and len(api.bodies) <= 9


def test_no_server_ends_the_run_with_one_message(tiny_data, tmp_path):
    with pytest.raises(SystemExit, match="the first 2 requests failed: APIConnectionError"):
        ask("http://127.0.0.1:9", "openai", tiny_data, tmp_path, "--retries", "0", "--concurrency", "1")


@pytest.mark.parametrize("provider", ANSWER)
def test_a_missing_key_is_named(provider, tiny_data, tmp_path, monkeypatch):
    variable = f"{provider.upper()}_API_KEY"
    monkeypatch.delenv(variable)
    with pytest.raises(SystemExit, match=f"{variable} is not set"):
        main(
            [
                *("--dataset", str(tiny_data / "val.parquet"), "--provider", provider),
                *("--model_path", "m", "--out", str(tmp_path)),
            ]
        )


def test_no_password_of_a_url_is_written(tiny_data, tmp_path):
    with serve(lambda body, nth: (200, openai_answer("(A)"), {})) as (url, _):
        ask(url.replace("//", "//me:hidden@"), "openai", tiny_data, tmp_path, limit=1)
    assert "hidden" not in (tmp_path / "x.jsonl").read_text()


def test_what_fails_for_good_does_not_end_a_run_that_has_answers(tiny_data, tmp_path):
    broken = {}

    def respond(body, nth):
        if len(broken) < 3 and len(api.bodies) > 5:
            broken[text_of(body)] = True
        return (400, ERROR, {}) if text_of(body) in broken else (200, openai_answer("(A)"), {})

    with serve(respond) as (url, api):
        for _ in range(2):  # the second time nothing but these three is asked
            ask(url, "openai", tiny_data, tmp_path, "--concurrency", "1", "--max_failures", "3", limit=24)
    assert json.loads((tmp_path / "x.summary.json").read_text())["failed"] == 3


def test_a_server_that_counts_no_tokens_is_heard(tiny_data, tmp_path):
    with serve(lambda body, nth: (200, openai_answer("(A)") | {"usage": None}, {})) as (url, api):
        _, records = ask(url, "openai", tiny_data, tmp_path, limit=2)
    assert [r["reply"] for r in records] == ["(A)"] * 2 and len(api.bodies) == 2


def test_an_empty_reply_is_an_answer_that_says_nothing(tiny_data, tmp_path):
    with serve(lambda body, nth: (200, openai_answer(""), {})) as (url, api):
        _, records = ask(url, "openai", tiny_data, tmp_path, limit=2)
    assert [(r["method"], r["finish_reason"]) for r in records] == [("empty", "stop")] * 2
    assert set(api.counts.values()) == {1}


# What a server says -> (reply, finish_reason, the server's word for it, tokens of prompt and reply).
PARTS = [
    {"type": "thinking", "thinking": "hm"},
    {"type": "text", "text": "(A"},
    {"type": "text", "text": ")"},
]
CONTENTS = {
    "text": ("(A)", "(A)"),
    "parts": (PARTS, "(A)"),
    "texts": (["(", "A)"], "(A)"),
    "nested": ([[{"type": "output_text", "text": {"text": "(A)"}}]], "(A)"),
    "number": (3, "3"),
    "zero": (0, "0"),
    "half": (0.5, "0.5"),
    "truth": (True, "true"),
    "object": ({"answer": "Ä"}, '{"answer": "Ä"}'),
    "object with text": ({"text": "(A)"}, "(A)"),
    "half a pair": ("(A) \ud83d", "(A) ?"),
    "no parts": ([], ""),
}
USAGES = {
    "null": None, "text": "many", "list": [1], "texts": ("12", "3"), "nulls": (None, None),
    "truths": (True, True), "negative": (-5, -1),
    "huge": (10**300, 10**12), "floats": (50.0, 3.0), "objects": ({}, []),
    "no numbers": (float("nan"), float("inf")),
}  # fmt: skip
ENDS = {  # finish_reason -> ours, and the word that is kept
    "stop": ("stop", ""), "end_turn": ("stop", ""), None: ("stop", ""), "length": ("length", ""),
    "max_tokens": ("length", ""), "stop_sequence": ("stop", "stop_sequence"),
    "tool_calls": ("stop", "tool_calls"), "tool_use": ("stop", "tool_use"), "refusal": ("stop", "refusal"),
    "content_filter": ("length", "content_filter"), "SAFETY": ("length", "SAFETY"),
    "model_context_window_exceeded": ("length", "model_context_window_exceeded"),
    "never heard of": ("length", "never heard of"),
    "abort": ("failed", "abort"), "error": ("failed", "error"),
    "insufficient_system_resource": ("failed", "insufficient_system_resource"), "STOP": ("stop", ""),
    "pause_turn": ("failed", "pause_turn"),
}  # fmt: skip


def answer_of(provider, content="(A)", usage=(50, 3), reason="stop"):
    answer, names = ANSWER[provider](content), ("input_tokens", "output_tokens")
    names = ("prompt_tokens", "completion_tokens") if provider == "openai" else names
    answer["usage"] = dict(zip(names, usage, strict=True)) if isinstance(usage, tuple) else usage
    if provider == "anthropic":
        return answer | {"content": content, "stop_reason": reason}
    answer["choices"][0]["finish_reason"] = reason
    return answer


def asked(url, provider, names, images=(), **settings):
    """{question: Reply} of a server, one question of each name."""
    url = f"{url}/v1" if provider == "openai" else url
    settings = {"timeout_s": 0.6, "concurrency": 4, "base_url": url, "max_new_tokens": 77} | settings
    encoded = tuple({"bytes": image, "path": None} for image in images)
    samples = [Sample(str(name), encoded, (84, 56), str(name), (), "", "") for name in names]
    encoder = PromptEncoder(None, "no_reasoning", 784, 2**30)
    replies = PROVIDERS[provider]("m", samples, encoder, Decoding(**settings))
    return {names[i]: reply for i, reply in replies}


def server_of(answers):
    """A server that gives to a question what stands under its name, a JSON body or all that `serve` takes."""

    def respond(body, nth):
        answer = answers[text_of(body).split("\n")[-1]]
        answer = answer(body, nth) if callable(answer) else answer
        return (200, answer, {}) if isinstance(answer, dict | list) else answer

    return serve(respond)


@pytest.mark.parametrize("provider", ANSWER)
def test_every_shape_of_an_answer_is_read(provider):
    cases = {
        name: (answer_of(provider, content), (text, "stop", "", 50, 3))
        for name, (content, text) in CONTENTS.items()
    }
    for name, usage in USAGES.items():
        counts = (50, 3) if name == "floats" else (0, 0)
        cases[f"usage {name}"] = answer_of(provider, usage=usage), ("(A)", "stop", "", *counts)
    for word, (why, kept) in ENDS.items():
        cases[f"end {word}"] = answer_of(provider, reason=word), ("(A)", why, kept, 50, 3)
    with server_of({name: answer for name, (answer, _) in cases.items()}) as (url, api):
        replies = asked(url, provider, list(cases), concurrency=16, timeout_s=9)
    for name, (_, expected) in cases.items():
        r = replies[name]
        assert (r.text, r.finish_reason, r.stop_reason, r.prompt_tokens, r.n_tokens) == expected, name
        assert bool(r.error) == (r.finish_reason == "failed")
    times = {text.split("\n")[-1]: n for text, n in api.counts.items()}
    assert {n for text, n in times.items() if text.startswith("end abort")} == {3}  # asked again
    assert {n for text, n in times.items() if text.startswith("end content_filter")} == {1}


def test_shapes_of_chat_completions_alone():
    plain = answer_of("openai")
    refusal = answer_of("openai", None)
    refusal["choices"][0]["message"]["refusal"] = "I cannot."
    old = {"choices": [{"text": "(A)", "finish_reason": {"type": "length"}}]}
    inner = answer_of("openai", None, reason=None)
    inner["choices"][0]["error"] = {"code": 502, "message": "upstream\nis gone"}
    answers = {
        "null": answer_of("openai", None),
        "refusal": refusal,
        "old": old,
        "inner": inner,
        "plain": plain,
    }
    with server_of(answers) as (url, _):
        replies = asked(url, "openai", list(answers))
    got = {name: (r.text, r.finish_reason, r.stop_reason) for name, r in replies.items()}
    assert got["null"] == ("", "stop", "") and got["refusal"] == ("I cannot.", "stop", "refusal")
    assert got["old"] == ("(A)", "length", "") and got["plain"] == ("(A)", "stop", "")
    assert got["inner"][1] == "failed" and "upstream is gone" in replies["inner"].error


DEEP = b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
FAILURES = {  # -> (what the record says of it, how often it is asked)
    "error in a 200": ((200, {"error": {"message": "no such\nroom", "code": 500}}, {}), "no such room", 3),
    "error text in a 200": ((200, {"error": "no room"}, {}), "no room", 3),
    "deep": ((200, DEEP, {}), "malformed answer: ", 3),
    "deep error": ((400, DEEP, {}), "400", 1),
    "list": ((200, [], {}), "malformed answer: ", 3),
    "words": ((200, b"hello", {}), "malformed answer: ", 3),
    "bytes": ((200, b"\xff\xfe{", {}), "malformed answer: ", 3),
    "long number": ((200, b'{"choices": ' + b"9" * 9999 + b"}", {}), "malformed answer: ", 3),
    "detail": ((422, {"detail": [{"loc": ["body", "messages"], "msg": "too many"}]}, {}),
               "body.messages: too many", 1),
    "message": ((400, {"object": "error", "message": "no\tway"}, {}), "BadRequestError 400: no way", 1),
    "text": ((400, b"what was that?", {}), "BadRequestError 400: what was that?", 1),
    "page": ((502, b"<html><body><h1>502 Bad\r\n Gateway</h1></body></html>", {}), "502 Bad Gateway", 2),
    "screen": ((400, {"error": {"message": "\x1b[2Jred \u009b1m"}}, {}), "400: [2Jred 1m", 1),
    "context": ((400, {"error": {"message": "prompt is too long: 9 tokens > 4"}}, {}), "is too long: 9", 1),
    "odd status": ((418, {"error": {"message": "a teapot"}}, {}), "418: a teapot", 1),
}  # fmt: skip


@pytest.mark.parametrize("provider", ANSWER)
def test_why_it_failed_stands_in_one_short_line(provider):
    with server_of({name: answer for name, (answer, *_) in FAILURES.items()}) as (url, api):
        replies = asked(url, provider, list(FAILURES), retries=1, concurrency=16, timeout_s=9)
    for name, (_, words, times) in FAILURES.items():
        reply = replies[name]
        times += name == "context" and provider == "openai"  # without a limit of its own
        assert reply.finish_reason == "failed" and words in reply.error, (name, reply.error)
        assert len(reply.error) <= 500 and reply.error.isprintable()
        assert sum(n for text, n in api.counts.items() if text.endswith(f"\n{name}")) == times, name


@pytest.mark.parametrize("provider", ANSWER)
def test_a_trickle_of_bytes_does_not_stretch_an_attempt(provider):
    body = json.dumps(answer_of(provider)).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    started = time.time()
    with server_of({"head": head + body}) as (url, api):
        reply = asked(url, provider, ["head"], retries=1, timeout_s=0.4)["head"]
    assert reply.error == "APITimeoutError: no whole answer within 0.4 s" and len(api.bodies) == 2
    assert 0.8 < time.time() - started < 3


DATES = [f"Wed, {date} 07:28:00 GMT" for date in ("21 Oct 2099", "21 Oct 1999", "99 Oct 99999")]


@pytest.mark.parametrize("value", ["86400", "1e400", "-5", "soon", "nan", "", *DATES])
def test_a_server_that_asks_to_wait_is_asked_again_in_time(value):
    slowly = (429, {"error": {"message": "slowly"}}, {"retry-after": value})
    with server_of({"x": lambda body, nth: slowly if nth < 2 else answer_of("openai")}) as (url, _):
        started = time.time()
        assert asked(url, "openai", ["x"], timeout_s=0.3)["x"].text == "(A)"
        assert time.time() - started < 1.5


def test_seconds_to_wait():
    def date(seconds):
        return email.utils.formatdate(time.time() + seconds, usegmt=True)

    for headers, low, high in (
        ({"retry-after": "7"}, 7, 7), ({"retry-after": "0.25"}, 0.25, 0.25),
        ({"retry-after-ms": "20"}, 0.02, 0.02),
        ({"retry-after": date(100)}, 98, 101), ({"retry-after-ms": "x", "retry-after": "3"}, 3, 3),
    ):  # fmt: skip
        assert low <= asked_wait(headers) <= high
    for value in ("-1", "0", "nan", "soon", "", date(-100), "Wed, 99 Oct 99999 07:28:00 GMT"):
        assert asked_wait({"retry-after": value}) is None


REFUSALS = {  # parameter -> (what the server says, what is sent instead)
    "seed": ({"error": {"message": "Unrecognized request argument supplied: seed"}}, {}),
    "temperature": ({"error": {"message": "Unsupported value", "param": "temperature"}}, {}),
    "max_tokens": ({"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this "
                              "model. Use 'max_completion_tokens' instead."}}, {"max_completion_tokens": 77}),
    "max_tokens at all": ({"detail": [{"loc": ["body", "max_tokens"], "msg": "Extra inputs"}]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_parameter_is_left_out_or_renamed(case, capsys):
    body, instead = REFUSALS[case]
    name, at_all = case.split()[0], case.endswith("all")

    def answer(body_asked, nth):
        refused = [n for n in (name, *(["max_completion_tokens"] if at_all else [])) if n in body_asked]
        words = json.loads(json.dumps(body).replace(name, refused[0])) if refused else None
        return (400, words, {}) if refused else answer_of("openai")

    with server_of(dict.fromkeys("abc", answer)) as (url, api):
        replies = asked(url, "openai", list("abc"), concurrency=1)
    assert {r.text for r in replies.values()} == {"(A)"} and len(api.bodies) == 4 + at_all
    assert all(name not in b and instead.items() <= b.items() for b in api.bodies[1 + at_all :])
    others = {"seed", "temperature", "max_tokens"} - {name}
    assert all(others <= b.keys() for b in api.bodies)
    out = capsys.readouterr().out
    assert out.count("warning: this model refuses a") == 1 + at_all and f"refuses a {name};" in out
    sent = "with max_completion_tokens=77" if name == "max_tokens" else f"without {name}"
    assert sent in replies["a"].note


@pytest.mark.parametrize("provider, words", [
    ("anthropic", "max_tokens: 77 > 40, which is the maximum allowed number of output tokens for m-4-8"),
    ("openai", "max_tokens is too large: 77. This model supports at most 40 completion tokens, whereas you "
               "provided 77."),
    ("openai", "`max_tokens` must be less than or equal to `40`, the maximum value for `max_tokens`"),
    ("openai", "Invalid max_tokens value, the valid range of max_tokens is [1, 40]"),
])  # fmt: skip
def test_a_limit_that_the_server_lowers(provider, words, capsys):
    def answer(body, nth):
        if body["max_tokens"] > 40:
            return 400, {"type": "error", "error": {"type": "invalid_request_error", "message": words}}, {}
        return answer_of(provider)

    with server_of(dict.fromkeys("ab", answer)) as (url, api):
        replies = asked(url, provider, list("ab"), concurrency=1)
    assert [b["max_tokens"] for b in api.bodies] == [77, 40, 40] and replies["a"].text == "(A)"
    assert replies["a"].note == "with max_tokens=40" and "with max_tokens=40" in capsys.readouterr().out


def test_a_prompt_that_leaves_less_room_than_asked_for_is_asked_for_that(capsys):
    """Of one item alone: the next may be shorter."""
    vllm = "This model's maximum context length is 2048 tokens, 'max_tokens' is too large: 77"
    anthropic = "input length and `max_tokens` exceed context limit: 1990 + 77 > 2048"

    def answer(provider, words, most):
        def respond(body, nth):
            fits = body.get("max_tokens", 0) <= most or text_of(body).endswith("b")
            return answer_of(provider) if fits else (400, {"error": {"message": words}}, {})

        return dict.fromkeys("ab", respond)

    for provider, words, most, sent in (
        ("openai", vllm, 0, [77, None, 77]),
        ("anthropic", anthropic, 58, [77, 58, 77]),
    ):
        with server_of(answer(provider, words, most)) as (url, api):
            replies = asked(url, provider, list("ab"), concurrency=1)
        assert [b.get("max_tokens") for b in api.bodies] == sent
        assert {r.text for r in replies.values()} == {"(A)"} and "context" in replies["a"].note
        assert replies["b"].note == "" and "refuses" not in capsys.readouterr().out


def test_a_name_in_another_error_changes_nothing(capsys):
    """A request without that parameter has to succeed before others go without it."""
    answers = {
        "a": (400, {"error": {"message": "bad question: what temperature has the seed?"}}, {}),
        "b": answer_of("openai"),
    }
    with server_of(answers) as (url, api):
        replies = asked(url, "openai", list("ab"), concurrency=1)
    assert replies["a"].finish_reason == "failed" and "what temperature" in replies["a"].error
    assert {"temperature", "seed"} <= api.bodies[-1].keys() and replies["b"].text == "(A)"
    assert "refuses" not in capsys.readouterr().out


def noise(width, height) -> bytes:
    """A picture that no PNG makes smaller."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), random.Random(0).randbytes(3 * width * height)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def sent_image(body):
    image = body["messages"][0]["content"][0]
    if image["type"] == "image":
        return image["source"]["media_type"], image["source"]["data"]
    return image["image_url"]["url"].removeprefix("data:").split(";base64,")


def test_an_image_beyond_the_limit_is_sent_as_jpeg():
    with server_of({"x": answer_of("anthropic")}) as (url, api):
        large = asked(url, "anthropic", ["x"], [noise(1400, 1400)], timeout_s=9)["x"]
        slim = asked(url, "anthropic", ["x"], [noise(8400, 56)], timeout_s=9)["x"]
        small = asked(url, "anthropic", ["x"], [noise(56, 56)], timeout_s=9)["x"]
    kinds = [sent_image(body) for body in api.bodies]
    assert [kind for kind, _ in kinds] == ["image/jpeg", "image/png", "image/png"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in kinds]
    assert [p.size for p in pictures] == [(1400, 1400), (8000, 53), (56, 56)]
    assert pictures[0].format == "JPEG" and 10**6 < len(kinds[0][1]) <= 5 * 2**20
    assert re.fullmatch(r"image 1 as JPEG of quality \d\d", large.note)
    assert slim.note == "image 1 as 8000 x 53 pixels, not 8400 x 56" and small.note == ""


@pytest.mark.parametrize(
    "status, words", [(413, "Request Entity Too Large"), (400, "image exceeds 5 kB maximum")]
)
def test_an_image_that_a_server_finds_too_large_is_sent_smaller(status, words):
    def answer(body, nth):
        fits = len(sent_image(body)[1]) < 5000
        return answer_of("openai") if fits else (status, {"error": {"message": words}}, {})

    with server_of({"x": answer}) as (url, _):
        reply = asked(url, "openai", ["x"], [noise(112, 112)])["x"]
    assert reply.text == "(A)" and "JPEG of quality" in reply.note


def test_an_image_of_any_limit_is_made_to_fit():
    image = Image.open(io.BytesIO(noise(300, 200)))
    for most in (10**6, 50_000, 9_000, 2_000, 900):
        kind, data, note = encode_image(image, most, 8000)
        assert len(data) <= most and (kind == "image/png") == (note == "")


@pytest.mark.parametrize("usage", [None, "many", {"prompt_tokens": "x", "completion_tokens": None}])
def test_a_server_that_counts_wrongly_does_not_lock_the_results(usage, tiny_data, tmp_path):
    with serve(lambda body, nth: (200, openai_answer("(A)") | {"usage": usage}, {})) as (url, api):
        for _ in range(2):
            _, records = ask(url, "openai", tiny_data, tmp_path, limit=2)
    assert [(r["reply"], r["n_tokens"]) for r in records] == [("(A)", 0)] * 2 and len(api.bodies) == 2


URLS = ["http://me:hidd3n@HOST?api=hidd3n&b=c#hidd3n", "HTTP://hidd3n:hidd3n@HOST/?hidd3n",
        "http://me:hidd3n%40x%2Fy@HOST?k=hidd3n%20b", "http://hidd3n@HOST#/hidd3n"]  # fmt: skip


@pytest.mark.parametrize("spelled", URLS)
def test_no_secret_of_a_url_or_key_is_written_or_shown(spelled, tiny_data, tmp_path, capsys, monkeypatch):
    """Not even where the server echoes all that it was sent."""

    def respond(body, nth):
        echo = " ".join(api.headers[-1].values()) + f" {base_url} {urllib.parse.unquote(base_url)}"
        return (
            (400, {"error": {"message": echo}}, {}) if len(api.bodies) % 2 else (200, openai_answer(echo), {})
        )

    with serve(respond) as (url, api):
        base_url = spelled.replace("HOST", url.removeprefix("http://") + "/v1")
        monkeypatch.setattr(
            "sys.orig_argv", ["python", "evaluate.py", f"--base_url={base_url}", "--base_url", base_url]
        )
        with pytest.raises(SystemExit) as ended:
            main(served(base_url, tiny_data, tmp_path, "--limit", "4"))
    written = (
        "".join(path.read_text() for path in tmp_path.iterdir())
        + "".join(capsys.readouterr())
        + str(ended.value)
    )
    basic = base64.b64encode(b"me:hidd3n").decode()
    assert "hidd3n" not in written.lower() and KEY not in written and basic not in written
    header, records = read_records(tmp_path / "x.jsonl")
    assert header["config"]["base_url"].lower().rstrip("/") == f"{url}/v1" and len(records) == 4
    assert any("***" in r["reply"] + r.get("error", "") for r in records)


def test_no_secret_of_a_url_is_in_the_record_of_a_run(tmp_path, monkeypatch):
    from config import write_run_record
    from synthesize import SynthesizeConfig

    url = "http://me:hidd3n@h/v1?key=hidd3n"
    monkeypatch.setattr("sys.orig_argv", ["python", "synthesize.py", f"base_url={url}"])
    write_run_record(SynthesizeConfig(source="drawn", out="x", base_url=url), tmp_path)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "hidd3n" not in written and written.count("http://h/v1") == 3


def test_what_a_url_shows():
    for url, shown in {
        "http://h/v1": "http://h/v1", "https://h:8000": "https://h:8000", "http://[::1]:8/v1": "http://[::1]:8/v1",
        "HTTPS://a:b@h/v1": "HTTPS://h/v1", "a:b@h/v1": "h/v1", "http://h/v1?key=a@b": "http://h/v1",
        "http://a:b/c@h/v1": "http://h/v1", "http://a:b#c@h/v1": "http://h/v1", "http://a:b@c@h": "http://h",
        "http:/a:b@h": "http:/h", "http://h/v1;token=a": "http://h/v1",
        "//a@h": "//h", "http://h#a": "http://h", "": "", None: None,
    }.items():  # fmt: skip
        assert public_url(url) == shown


@pytest.mark.parametrize(
    "url", ["ftp://me:hidd3n@h", "me:hidd3n@h/v1", "http://me:hidd3n@h:x/v1", "http://", "hello"]
)
def test_a_url_that_is_none_is_refused_in_one_line(url):
    with pytest.raises(ValueError, match="base_url: expected http://HOST:PORT/PATH, got ") as refused:
        asked("", "openai", ["x"], base_url=url)
    assert "hidd3n" not in str(refused.value) and "\n" not in str(refused.value)


def test_the_query_of_a_url_reaches_the_server():
    with server_of({"x": answer_of("openai")}) as (url, api):
        assert asked(url, "openai", ["x"], base_url=f"{url}/v1?version=2&key=a%20b#c")["x"].text == "(A)"
    assert api.paths == ["/v1/chat/completions?version=2&key=a+b"]


# ---- engines ----
HF = ("--provider", "hf", "--max_new_tokens", "12")


@pytest.mark.slow
def test_batch_size_does_not_change_replies(tiny_base, tiny_data, tmp_path):
    for size in ("1", "7"):
        main(
            flags(
                tiny_base,
                tiny_data,
                tmp_path,
                *HF,
                *("--limit", "8", "--batch_size", size, "--custom_filename", size),
            )
        )
    one, seven = (read_records(tmp_path / f"{size}.jsonl")[1] for size in ("1", "7"))
    # on any machine: the two best logits of these steps lie at least 0.008 apart, float32 errs by 1e-5
    assert [r["reply"] for r in one] == [r["reply"] for r in seven]
    assert [r["n_tokens"] for r in one] == [r["n_tokens"] for r in seven]


@pytest.mark.slow
def test_the_models_own_sampling_settings_are_not_used(tiny_start, tiny_data, tmp_path):
    """Qwen2.5-VL ships a penalty for repetition, which vLLM is not given either."""
    model = shutil.copytree(tiny_start, tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    config |= {"repetition_penalty": 3.0, "top_p": 0.1, "do_sample": True, "temperature": 0.1}
    (model / "generation_config.json").write_text(json.dumps(config))
    for name, path in (("own", model), ("plain", tiny_start)):
        main(
            flags(
                path,
                tiny_data,
                tmp_path,
                *("--provider", "hf", "--max_new_tokens", "48", "--limit", "2"),
                *("--custom_filename", name),
            )
        )
    own, plain = (read_records(tmp_path / f"{name}.jsonl")[1] for name in ("own", "plain"))
    assert [r["reply"] for r in own] == [r["reply"] for r in plain]


@pytest.mark.slow
def test_batches_mark_padding_and_image_tokens(tiny_base, tiny_data, tmp_path, monkeypatch):
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    seen, generate = [], Qwen2_5_VLForConditionalGeneration.generate
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate",
                        lambda self, **batch: seen.append(batch) or generate(self, **batch))  # fmt: skip
    main(flags(tiny_base, tiny_data, tmp_path, *HF, "--batch_size", "24"))
    tokenizer = AutoProcessor.from_pretrained(tiny_base).tokenizer
    ids, mask = seen[0]["input_ids"], seen[0]["attention_mask"]
    assert (mask == (ids != tokenizer.pad_token_id)).all() and (mask == 0).any() and mask[:, -1].all()
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (seen[0]["mm_token_type_ids"] == (ids == image_token)).all()
    assert (ids == image_token).sum() == 24 * 9


def test_a_prompt_beyond_the_context_fails_and_is_counted(tiny_base, tiny_data, tmp_path):
    with pytest.raises(SystemExit, match="2 items failed or"):
        main(
            flags(
                tiny_base,
                tiny_data,
                tmp_path,
                *HF,
                *("--min_pixels", "802816", "--limit", "2", "--custom_filename", "x"),
            )
        )
    records = read_records(tmp_path / "x.jsonl")[1]
    assert {r["finish_reason"] for r in records} == {"failed"}
    assert all(re.search(r"prompt of \d+ tokens, context of", r["error"]) for r in records)


def test_the_engines_prompt_is_the_models(tiny_base, tiny_data):
    """for_engine counts image tokens from sizes; the processor expands them."""
    from transformers import AutoProcessor

    samples = load_samples(str(tiny_data / "val.parquet"), "val")
    for budget in ((784, 802816), (112 * 112, 802816), (784, 2000)):
        encoder = PromptEncoder(AutoProcessor.from_pretrained(tiny_base), "spatial_thinker", *budget)
        for sample in samples[:3]:
            assert encoder.for_engine(sample).ids == encoder(sample).ids
            assert encoder.length(sample) == len(encoder(sample).ids)


# ---- models of other families ----
@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        build(name, folder / name)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_any_family_is_asked_as_its_own_processor_has_it(name, families):
    """Against transformers' own chat call and generate, a prompt at a time; and the same in a batch."""
    from transformers import AutoModelForImageTextToText

    folder, expected = families / name, []
    encoder, model = (
        encoder_of(folder),
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
    )
    assert type(encoder) is (PromptEncoder if name == "qwen3vl" else OwnEncoder)
    processor = encoder.processor
    for sample in SAMPLES:
        (message,) = encoder.messages(sample)
        (image,) = encoder.images(sample)
        content = [{"type": "image", "image": image}, *message["content"][1:]]
        inputs = processor.apply_chat_template(
            [message | {"content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt")  # fmt: skip
        prompt = encoder(sample)
        assert prompt.ids == inputs["input_ids"][0].tolist() and encoder.length(sample) == len(prompt.ids)
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(prompt.ids) :].tolist()
        end = processor.tokenizer.eos_token_id in new
        text = processor.tokenizer.decode(new, skip_special_tokens=True)
        expected.append([text, "stop" if end else "length", len(new), len(prompt.ids), ""])
    assert expected[0][3] != expected[1][3]  # one is padded
    for batch_size in (1, 2):
        how = replace(HOW, batch_size=batch_size)
        assert said_in_order(PROVIDERS["hf"](str(folder), SAMPLES, encoder, how)) == expected


def test_the_image_is_seen_in_every_family(families):
    """Another picture, another distribution: what a prompt without its pixels would not show."""
    from transformers import AutoModelForImageTextToText

    for name in FAMILIES:
        encoder = encoder_of(families / name)
        model = AutoModelForImageTextToText.from_pretrained(families / name, dtype=torch.float32).eval()
        others = replace(SAMPLES[0], encoded_images=(pictures.noise(84, 56, seed=9),))
        with torch.no_grad():
            prompts = [encoder(s) for s in (SAMPLES[0], others)]
            own = getattr(encoder, "batch", lambda prompts, model=model: qwen_batch(model, prompts, pad=0))
            a, b = (model(**own([prompt])).logits[0, -1] for prompt in prompts)
        assert (a - b).abs().max() > 1e-3, name


def test_no_picture_at_all_is_a_prompt_as_well(families):
    for name in FAMILIES:
        encoder, blind = encoder_of(families / name), replace(SAMPLES[0], encoded_images=())
        text = encoder.processor.tokenizer.decode(encoder(blind).ids)
        assert text.endswith("assistant:") and blind.question in text and "image" not in text


def test_a_processor_that_cannot_chat_is_refused_in_one_line(families):
    processor = encoder_of(families / "gemma3").processor
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="Gemma3Processor: expected .* chat template: name one with"
    ) as refused:
        encoder_for(lambda p: PromptEncoder(p, "no_reasoning", 784, 802816), processor)
    assert "\n" not in str(refused.value)


def test_qwens_own_path_is_its_own(tiny_base):
    assert type(encoder_of(tiny_base)) is PromptEncoder


@pytest.mark.slow
def test_vllm_reads_another_family_as_transformers_does(families):
    """The other families agree as well, at six seconds each."""
    got = json.loads(run_script("tests/families.py", families, "smolvlm").stdout.splitlines()[-1])
    folder = families / "smolvlm"
    assert got["smolvlm"] == said_in_order(PROVIDERS["hf"](str(folder), SAMPLES, encoder_of(folder), HOW))


# ---- the engines that the trainer shares ----
def load(folder):
    """(model, encoder) of a tiny Qwen2.5-VL, in evaluation mode."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PromptEncoder(AutoProcessor.from_pretrained(folder), "spatial_thinker", 784, 802816)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probs_are_those_of_the_distribution_sampled_from(temperature, tiny_base, tiny_data):
    """Against a forward pass over prompt and completion, on a padded batch, with bias and temperature."""
    import torch

    model, encoder = load(tiny_base)
    samples = load_samples(str(tiny_data / "val.parquet"), "val")[:3]
    longer = replace(samples[0], question=samples[0].question + " Which one is it?")
    prompts = [encoder(s) for s in (*samples, longer)]
    assert len({len(p.ids) for p in prompts}) > 1
    tokenizer, bias = encoder.processor.tokenizer, {7: -100.0, 11: 3.0}
    torch.manual_seed(0)
    how = {"max_new_tokens": 12, "temperature": temperature, "token_bias": bias}
    generated = hf_generate(model, tokenizer, prompts, with_logps=True, **how)
    torch.manual_seed(0)
    assert [g.ids for g in hf_generate(model, tokenizer, prompts, **how)] == [g.ids for g in generated]
    for prompt, g in zip(prompts, generated, strict=True):
        ids = torch.tensor([prompt.ids + g.ids])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=prompt.pixel_values,
                image_grid_thw=prompt.image_grid_thw,
            ).logits[0, len(prompt.ids) - 1 : -1]  # (T, V)
        for token, value in bias.items():
            logits[:, token] += value
        logps = (logits / (temperature or 1.0)).log_softmax(-1)
        expected = logps.gather(1, torch.tensor(g.ids)[:, None])[:, 0]
        bound = logp_bound(model.config, ids.shape[1]) / (temperature or 1.0)
        assert g.logps == pytest.approx(expected.tolist(), rel=0, abs=bound)
        assert 7 not in g.ids and len(g.ids) == len(g.logps)
        if temperature == 0:  # the best, or one that rounding cannot tell from it
            assert (expected >= logps.amax(-1) - 2 * bound).all()


def test_a_reply_ends_with_its_end_token_or_where_it_is_cut(tiny_base, tiny_data):
    from types import SimpleNamespace

    model, encoder = load(tiny_base)
    prompt = encoder(load_samples(str(tiny_data / "val.parquet"), "val")[0])
    tokenizer = encoder.processor.tokenizer
    im_end, endoftext = ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_token_ids(model.generation_config, tokenizer) == sorted(ends)
    for eos, expected in ((None, [im_end]), (endoftext, sorted(ends)), ([3, im_end], sorted([3, im_end]))):
        assert end_token_ids(SimpleNamespace(eos_token_id=eos), tokenizer) == expected
    how = {"max_new_tokens": 5, "temperature": 0.0, "with_logps": True}
    for end in ends:
        (ended,) = hf_generate(model, tokenizer, [prompt], token_bias={end: 1000.0}, **how)
        assert (ended.ids, ended.logps, ended.finished) == ([end], [0.0], True)
    cut = hf_generate(model, tokenizer, [prompt] * 2, token_bias=dict.fromkeys(ends, -1000.0), **how)
    assert [len(g.ids) for g in cut] == [len(g.logps) for g in cut] == [5, 5]
    assert not any(g.finished for g in cut)
    assert hf_generate(model, tokenizer, [prompt], max_new_tokens=5, temperature=0.0)[0].logps == []


@pytest.fixture(scope="module")
def engine_run(tiny_base, tiny_data):
    """What tests/engine.py has found out about the engine."""
    return json.loads(
        run_script("tests/engine.py", tiny_base, tiny_data / "val.parquet").stdout.splitlines()[-1]
    )


@pytest.mark.slow
def test_the_engine_gives_what_vllms_own_generate_gives(engine_run):
    """Equal tokens and log-probs to the last bit, n of each in order; another prompt is an error."""
    got = engine_run
    keys = [f"row {i}" for i in range(8)]  # the last two: text alone, two images within the text
    assert sorted(got["all"]) == sorted(got["two"]) == keys
    assert [got["all"][key] for key in keys] == got["plain"]
    assert all([index for *_, index in got["two"][key]] == [0, 1, 2] for key in keys)
    assert all(len({tuple(ids) for ids, *_ in group}) > 1 for group in got["plain"])  # a seed each
    assert all(len(ids) == len(logps) for group in got["plain"] for ids, logps, *_ in group)
    assert (got["most of all"], got["most of two"]) == (8, 2)
    assert re.fullmatch(
        r"request row 1, row \S+: vLLM's prompt .\d+ tokens. is not ours .\d+ tokens.", got["error"]
    )


@pytest.mark.slow
def test_the_tokens_of_a_lone_request_are_seen_step_by_step(engine_run):
    said = engine_run["steps"]["said"]
    assert engine_run["steps"]["seen"] == [said[: t + 1] for t in range(len(said))] and len(said) > 1


@pytest.mark.slow
def test_weights_of_the_engine_are_told_from_others(tiny_base, engine_run):
    """Of the whole model, its matrices apart, which vLLM packs on a CPU; one value, nudged, is noticed."""

    def doubles(sums):
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()}

    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_base, dtype=torch.float32)
    sent = {n: torch.stack([w.double().sum(), w.double().abs().sum()]) for n, w in model.state_dict().items()}
    check_weights(sent, held := doubles(engine_run["sums"]))
    assert {"visual.blocks.1.attn.qkv.bias", "language_model.model.layers.0.self_attn.qkv_proj.bias"} <= set(
        held
    )
    with pytest.raises(RuntimeError, match="vLLM holds another language_model.model.norm.weight than"):
        check_weights(sent, doubles(engine_run["nudged"]))
    for damage in (float("nan"), 1.0):
        sent["model.visual.blocks.0.attn.qkv.bias"][0] += damage
        with pytest.raises(RuntimeError, match="vLLM holds another visual.blocks.0.attn.qkv.bias than"):
            check_weights(sent, held)
    with pytest.raises(RuntimeError, match="expected weights of the names"):
        check_weights({}, held)


def test_every_part_of_a_fused_weight_counts():
    layer = "model.language_model.layers.0."
    parts = {"self_attn.q_proj": 1, "self_attn.k_proj": 2, "self_attn.v_proj": 4}
    parts |= {"mlp.gate_proj": 8, "mlp.up_proj": 16}
    sent = {f"{layer}{name}.weight": torch.tensor([-n, n], dtype=torch.float64) for name, n in parts.items()}
    held = {"self_attn.qkv_proj": [-7, 7], "mlp.gate_up_proj": [-24, 24]}
    held = {
        f"language_model.model.layers.0.{name}.weight": torch.tensor(sums, dtype=torch.float64)
        for name, sums in held.items()
    }
    check_weights(sent, held)
    for name in sent:
        with pytest.raises(RuntimeError, match="vLLM holds another language_model.model.layers.0."):
            check_weights(sent | {name: sent[name] * 1.5}, held)


@pytest.fixture(scope="module")
def greedy(tiny_start, tiny_data, tmp_path_factory):
    """Folder with vllm.jsonl, hf.jsonl: greedy replies of the trained tiny model."""
    out = tmp_path_factory.mktemp("greedy")
    engine = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # in a process of its own, as on a GPU
    for provider in ("vllm", "hf"):  # a process each: vLLM sets the threads of the whole process
        named = "--max_new_tokens", "192", "--provider", provider, "--custom_filename", provider
        run_script("evaluate.py", *flags(tiny_start, tiny_data, out, *named), **engine)
    return out


def said(path) -> list[tuple]:
    """What the records of a file say. It is the same on any machine: of the 1,542 tokens of these replies the
    closest call is one of 0.028 in the logits, where float32 errs by 1e-5."""
    keys = ("id", "prompt_hash", "prompt_tokens", "reply", "n_tokens", "correct")
    return [tuple(r[key] for key in keys) for r in read_records(path)[1]]


@pytest.mark.slow
def test_vllm_and_hf_give_the_same_greedy_replies(greedy):
    replies = said(greedy / "vllm.jsonl")
    assert replies == said(greedy / "hf.jsonl") and any(correct for *_, correct in replies)


def answers(url) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_vllms_own_server_gives_the_same_replies(greedy, tiny_start, tiny_data, tmp_path):
    from distributed import free_port

    port = free_port()
    arguments = ["--model", str(tiny_start), "--port", str(port), "--served-model-name", "tiny"]
    arguments += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    server = start_script(
        *("-m", "vllm.entrypoints.openai.api_server", *arguments),
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        stderr=None,  # pytest's, which shows it where the test fails
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), server, 240, every=1)
        main(
            flags(
                "tiny",
                tiny_data,
                tmp_path,
                *("--provider", "openai", "--base_url", f"http://127.0.0.1:{port}/v1"),
                *("--max_new_tokens", "192", "--custom_filename", "x"),
            )
        )
    finally:
        server.terminate()
        server.wait(60)
    assert said(tmp_path / "x.jsonl") == said(greedy / "vllm.jsonl")
