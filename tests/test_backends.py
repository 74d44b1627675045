"""backends.py: real engines on the tiny model, real clients against a server that misbehaves."""

import base64
import io
import json
import os
import re
import shutil
import urllib.request
from dataclasses import replace

import pytest
import torch
from bounds import logp_bound
from fixtures import flags
from PIL import Image
from programs import run_script, start_script, wait_until
from servers import KEY, anthropic_answer, openai_answer, serve, text_of

from backends import check_weights, end_token_ids, hf_generate
from data import PromptEncoder, load_samples
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
    keys = [f"row {i}" for i in range(7)]
    assert sorted(got["all"]) == sorted(got["two"]) == keys
    assert [got["all"][key] for key in keys] == got["plain"]
    assert all([index for *_, index in got["two"][key]] == [0, 1, 2] for key in keys)
    assert all(len({tuple(ids) for ids, *_ in group}) > 1 for group in got["plain"])  # a seed each
    assert all(len(ids) == len(logps) for group in got["plain"] for ids, logps, *_ in group)
    assert (got["most of all"], got["most of two"]) == (7, 2)
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
