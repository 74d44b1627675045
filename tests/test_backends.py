"""backends.py: real engines on the tiny model, real clients against a server that misbehaves."""

import base64
import io
import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image
from servers import KEY, anthropic_answer, openai_answer, serve, text_of

import evaluate
from evaluate import main, read_records

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
            "--dataset",
            str(data / "val.parquet"),
            "--model_path",
            "tiny",
            "--provider",
            provider,
            "--base_url",
            url,
            "--min_pixels",
            "784",
            "--limit",
            str(limit),
            "--out",
            str(out),
            "--custom_filename",
            "x",
            "--timeout",
            "0.6",
            "--concurrency",
            "4",
            *extra,
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
    assert summary["usd"] == pytest.approx((450 * 2 + 27 * 10) / 1e6)
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
                "--dataset",
                str(tiny_data / "val.parquet"),
                "--provider",
                provider,
                "--model_path",
                "m",
                "--out",
                str(tmp_path),
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


# ---- engines ----
HF = ("--provider", "hf", "--max_new_tokens", "12")


def flags(model, data, out, *extra):
    return [
        "--dataset",
        str(data / "val.parquet"),
        "--model_path",
        str(model),
        "--min_pixels",
        "784",
        "--max_pixels",
        "802816",
        "--out",
        str(out),
        *extra,
    ]


def test_batch_size_does_not_change_replies(tiny_base, tiny_data, tmp_path):
    for size in ("1", "7"):
        main(
            flags(
                tiny_base,
                tiny_data,
                tmp_path,
                *HF,
                "--limit",
                "8",
                "--batch_size",
                size,
                "--custom_filename",
                size,
            )
        )
    one, seven = (read_records(tmp_path / f"{size}.jsonl")[1] for size in ("1", "7"))
    assert [r["reply"] for r in one] == [r["reply"] for r in seven]
    assert [r["n_tokens"] for r in one] == [r["n_tokens"] for r in seven]


def test_the_models_own_sampling_settings_are_not_used(tiny_start, tiny_data, tmp_path):
    """Qwen2.5-VL ships a penalty for repetition, which vLLM is not given either."""
    import shutil

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
                "--provider",
                "hf",
                "--max_new_tokens",
                "64",
                "--limit",
                "4",
                "--custom_filename",
                name,
            )
        )
    own, plain = (read_records(tmp_path / f"{name}.jsonl")[1] for name in ("own", "plain"))
    assert [r["reply"] for r in own] == [r["reply"] for r in plain]


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
                "--min_pixels",
                "802816",
                "--limit",
                "2",
                "--custom_filename",
                "x",
            )
        )
    records = read_records(tmp_path / "x.jsonl")[1]
    assert {r["finish_reason"] for r in records} == {"failed"}
    assert all(re.search(r"prompt of \d+ tokens, context of", r["error"]) for r in records)


def test_the_engines_prompt_is_the_models(tiny_base, tiny_data):
    """for_engine counts image tokens from sizes; the processor expands them."""
    from transformers import AutoProcessor

    from data import PromptEncoder, load_samples

    samples = load_samples(str(tiny_data / "val.parquet"), "val")
    for budget in ((784, 802816), (112 * 112, 802816), (784, 2000)):
        encode = PromptEncoder(AutoProcessor.from_pretrained(tiny_base), "spatial_thinker", *budget)
        for sample in samples[:3]:
            assert encode.for_engine(sample).ids == encode(sample).ids
            assert encode.length(sample) == len(encode(sample).ids)


def run(command):
    done = subprocess.run([sys.executable, evaluate.__file__, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def greedy(tiny_start, tiny_data, tmp_path_factory):
    """Folder with vllm.jsonl, hf.jsonl: greedy replies of the trained tiny model."""
    pytest.importorskip("vllm")
    out = tmp_path_factory.mktemp("greedy")
    for provider in ("vllm", "hf"):  # a process each: vLLM sets the threads of the whole process
        run(
            flags(
                tiny_start,
                tiny_data,
                out,
                "--max_new_tokens",
                "192",
                "--provider",
                provider,
                "--custom_filename",
                provider,
            )
        )
    return out


def same_share(a, b) -> float:
    return sum(x["reply"] == y["reply"] for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.slow
def test_vllm_and_hf_give_the_same_greedy_replies(greedy):
    ours, theirs = (read_records(greedy / f"{p}.jsonl")[1] for p in ("vllm", "hf"))
    assert same_share(ours, theirs) >= 0.99
    assert sum(r["correct"] for r in ours) == sum(r["correct"] for r in theirs) > 0
    assert [r["prompt_hash"] for r in ours] == [r["prompt_hash"] for r in theirs]
    assert [r["prompt_tokens"] for r in ours] == [r["prompt_tokens"] for r in theirs]


@pytest.mark.slow
def test_vllms_own_server_gives_the_same_replies(greedy, tiny_start, tiny_data, tmp_path):
    from train_grpo import free_port

    port = free_port()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(tiny_start),
            "--port",
            str(port),
            "--served-model-name",
            "tiny",
            "--dtype",
            "float32",
            "--max-model-len",
            "512",
        ],
        env=evaluate.os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=open(tmp_path / "server.log", "w"),
    )
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(1)
        main(
            flags(
                "tiny",
                tiny_data,
                tmp_path,
                "--provider",
                "openai",
                "--base_url",
                f"http://127.0.0.1:{port}/v1",
                "--max_new_tokens",
                "192",
                "--custom_filename",
                "x",
            )
        )
    finally:
        server.terminate()
        server.wait(60)
    served, offline = read_records(tmp_path / "x.jsonl")[1], read_records(greedy / "vllm.jsonl")[1]
    assert same_share(served, offline) >= 0.99
    assert sum(r["correct"] for r in served) == sum(r["correct"] for r in offline)
    assert [r["prompt_tokens"] for r in served] == [r["prompt_tokens"] for r in offline]


@pytest.mark.slow
def test_vllm_samples_more_than_one_prefill_holds(tiny_base, tiny_data, tmp_path):
    """24 prompts of 280 tokens: more than one prefill takes, where a CPU generator once had to be rewound."""
    pytest.importorskip("vllm")
    run(
        flags(
            tiny_base,
            tiny_data,
            tmp_path,
            "--max_new_tokens",
            "6",
            "--temperature",
            "1",
            "--provider",
            "vllm",
            "--min_pixels",
            str(250 * 28 * 28),
            "--seed",
            "1",
            "--custom_filename",
            "sampled",
        )
    )
    replies = [r["reply"] for r in read_records(tmp_path / "sampled.jsonl")[1]]
    assert len(replies) == 24 and len(set(replies)) > 12
