"""evaluate.py: whole runs on every benchmark's schema, runs that are killed, scores, tables and pages."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser

import fixtures
import pytest
from fixtures import flags, served, write_results
from programs import run_script, start_script, wait_until
from servers import openai_answer, serve, text_of

from apis import png
from data import PER_MILLE, PromptEncoder, load_samples
from evaluate import dataset_names, main, parse_args
from results import Record, compare, grade, locked, read_records, regrade, write_tables
from rewards import in_per_mille
from testsets import DATASETS, Selection, load_items

HF = ("--provider", "hf", "--max_new_tokens", "12")


def right(data):
    """respond() of a server whose replies are right for the even rows of a file and A for the others."""
    items = load_items(str(data), Selection()).items
    gold = {item.question: item.answer for i, item in enumerate(items) if i % 2 == 0}
    return lambda body, nth: (200, openai_answer(gold.get(text_of(body).split("\n\n")[-1], "A")), {})


# ---- the command ----
def test_import_is_light():
    heavy = "{'torch', 'vllm', 'transformers', 'datasets', 'openai', 'matplotlib'}"
    code = f"import sys, evaluate; print({heavy} & sys.modules.keys())"
    assert run_script("-c", code).stdout == "set()\n"


def test_names():
    assert set(dataset_names(["all"])) == set(DATASETS) - {
        "cv-bench-2D",
        "cv-bench-3D",
        "3dsrbench_full",
        "robospatial_home",
    }
    assert dataset_names(["mmvp", "mmvp", "stvqa"]) == ["mmvp", "stvqa"]
    with pytest.raises(ValueError, match="expected cv-bench, .* or a file, got 'cvbench'"):
        dataset_names(["cvbench"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--min_pixels", "9", "--max_pixels", "8"], "--min_pixels: expected at most max_pixels 8, got 9"),
        (["--template", "problem", "--circular"], "cannot be reordered"),
    ],
)
def test_impossible_flags(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(options)
    assert message in capsys.readouterr().err


def test_paths_are_written_out_on_every_command_line(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SETS", "/sets")
    ours = "--dataset ~/a.parquet stvqa --local_path $SETS/b --model_path ~/m --processor_name ~/p --out ~/r "
    ours += "--rescore ~/r/a --compare ~/r/a $SETS/b --reader vllm:~/q --report ~/r/a"
    got = vars(parse_args(ours.split()))
    assert got["dataset"] == ["/home/me/a.parquet", "stvqa"] and got["compare"] == ["/home/me/r/a", "/sets/b"]
    assert (got["local_path"], got["reader"], got["report"]) == (
        "/sets/b",
        "vllm:/home/me/q",
        ["/home/me/r/a"],
    )
    rest = ("model_path", "processor_name", "out", "rescore")
    assert [got[key] for key in rest] == ["/home/me/m", "/home/me/p", "/home/me/r", "/home/me/r/a"]
    with pytest.raises(SystemExit):
        parse_args(["--out", "$NOT_SET/r"])
    assert "--out: expected a path, got $NOT_SET/r, but $NOT_SET is not set" in capsys.readouterr().err


# ---- the whole program ----
def test_records_and_summary_on_disk(tiny_base, tiny_data, tmp_path, capsys):
    main(flags(tiny_base, tiny_data, tmp_path, *HF, "--custom_filename", "mine", "--limit", "9"))
    header, records = read_records(tmp_path / "mine.jsonl")
    assert header["config"]["provider"] == "hf" and header["config"]["limit"] == 9
    assert header["data"]["n"] == len(records) == 9 and len(header["data"]["fingerprint"]) == 16
    assert "transformers" in header["versions"] and "git" in header
    samples = load_samples(str(tiny_data / "val.parquet"), "val")
    for r in records:
        sample = samples[r["row"]]
        assert (r["meta"]["item"], r["gold"], r["id"]) == (sample.id, sample.answer, str(r["row"]))
        assert r["finish_reason"] in ("stop", "length") and 1 <= r["n_tokens"] <= 12 < r["prompt_tokens"]
        graded = json.loads(json.dumps(grade(sample, r["reply"], finish_reason=r["finish_reason"])))
        assert graded == {key: r[key] for key in graded}
        assert regrade(r) == r
    summary = json.loads((tmp_path / "mine.summary.json").read_text())
    assert (summary["n"], summary["dataset"]) == (9, str(tiny_data / "val.parquet"))
    assert summary["truncated"] == sum(r["finish_reason"] == "length" for r in records)
    assert json.loads((tmp_path / "summary.json").read_text()) == [summary]
    assert "95 % interval" in capsys.readouterr().out
    assert "| dataset | n |" in (tmp_path / "summary.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "mine.jsonl",
        "mine.summary.json",
        "summary.json",
        "summary.md",
    ]


def test_boxes_in_per_mille_are_asked_for_graded_and_graded_again(tiny_data, tmp_path):
    """A server that answers every other row with the gold scene in thousandths, the rest in pixels."""
    samples = load_samples(str(tiny_data / "val.parquet"), "val")
    gold, order = {s.question: s for s in samples}, [s.question for s in samples]
    prompts = []

    def respond(body, nth):
        prompts.append(text_of(body))
        s = gold[prompts[-1].split("\n\n")[-1]]
        text = in_per_mille(s.ground_truth, s.size) if order.index(s.question) % 2 else s.ground_truth
        scene, answer = text.split("\n")
        return 200, openai_answer(f"<observe>o</observe>{scene}<think>t</think>{answer}"), {}

    with serve(respond) as (url, _):
        main(served(url, tiny_data, tmp_path, "--box_frame", "per_mille"))
    assert all(PER_MILLE in prompt and "Image size" not in prompt for prompt in prompts)
    _, records = read_records(tmp_path / "x.jsonl")
    for r in records:
        asked = samples[r["row"]].question
        right = order.index(asked) % 2 == 1
        # Half a thousandth of 84 pixels on each side of a box of 12 or more leaves an IoU above 0.97.
        assert (r["recall50"] == 1 and r["mean_iou"] > 0.97) == right and r["box_frame"] == "per_mille"
        assert regrade(r) == r


def test_records_have_the_keys_that_are_declared(tiny_data, tmp_path):
    """All of them, and each absent only where it may be: scenes, open answers, a failure."""
    fixtures.write(tmp_path / "robospatial.parquet", *fixtures.robospatial_home())

    def respond(body, nth):
        if "Pinpoint" in text_of(body):
            return 400, {"error": {"type": "x", "message": "no"}}, {}
        return 200, openai_answer("<answer>(A)</answer>"), {}

    with serve(respond) as (url, _):
        main(served(url, tiny_data, tmp_path / "scenes", "--box_frame", "per_mille"))
        own = ["--dataset", "robospatial", "--local_path", str(tmp_path), "--max_failures", "1"]
        main([*served(url, tiny_data, tmp_path / "open"), *own])
    scenes, others = (read_records(tmp_path / name / "x.jsonl")[1] for name in ("scenes", "open"))
    seen = set()
    for record in [*scenes, *others]:
        assert Record.__required_keys__ <= record.keys() <= Record.__annotations__.keys()
        seen |= record.keys()
    # Of servers that end or take a request in their own way (test_backends.py), of --reader (test_reader.py).
    rare = {"stop_reason", "note"} | {key for key in Record.__annotations__ if key.startswith("read")}
    assert seen == Record.__annotations__.keys() - rare
    in_scenes = Record.__annotations__.keys() - rare - {"error"}
    assert all(record.keys() == in_scenes for record in scenes)
    read, failed = others
    assert read.keys() == Record.__required_keys__ and failed.keys() == Record.__required_keys__ | {"error"}
    assert (failed["kind"], failed["finish_reason"], failed["parsed"]) == ("point", "failed", None)


@pytest.mark.slow
def test_every_benchmark_runs_from_its_rows_to_its_table(tiny_base, tmp_path, capsys):
    """All names, the real model class, one load of it."""
    fixtures.write_all(tmp_path / "data")
    main(
        [
            *("--dataset", *DATASETS, "--local_path", str(tmp_path / "data")),
            *("--model_path", str(tiny_base), "--min_pixels", "784", "--provider", "hf"),
            *("--max_new_tokens", "8", "--out", str(tmp_path / "out")),
        ]
    )
    printed = capsys.readouterr().out
    summaries = {s["dataset"]: s for s in json.loads((tmp_path / "out" / "summary.json").read_text())}
    assert set(summaries) == set(DATASETS)
    for name, s in summaries.items():
        n = len(fixtures.TABLES[name]()[1])
        n = {"cv-bench-2D": 4, "cv-bench-3D": 2}.get(name, n)
        assert (s["n"], s["failed"], s["missing"]) == (n, 0, 0) and s["tokens"] > 0
        assert re.search(rf"^{name} +{n} ", printed, re.M)
    assert "warning: cv-bench and cv-bench-2D share 4 questions about the same images" in printed
    assert "warning: spatialreasoner and cv-bench" in printed.replace(
        "cv-bench and spatialreasoner", "spatialreasoner and cv-bench"
    )


def test_right_replies_score_1_on_every_benchmark(tmp_path):
    """Through the client, the grader and the official scores."""
    fixtures.write_all(tmp_path / "data")
    encoder, answers = PromptEncoder(None, "spatial_thinker", 784, 784), {}
    for name in DATASETS:
        for item in load_items(name, Selection(local_path=str(tmp_path / "data"))).items:
            text = encoder.messages(item)[0]["content"][-1]["text"]
            answers[text, *map(png, encoder.images(item))] = fixtures.right_reply(item)

    def respond(body, nth):
        *images, text = body["messages"][0]["content"]
        images = [image["image_url"]["url"].partition(",")[2] for image in images]
        return 200, openai_answer(answers[text["text"], *images]), {}

    with serve(respond) as (url, _):
        main(
            [
                *("--dataset", *DATASETS, "--local_path", str(tmp_path / "data"), "--model_path", "m"),
                *("--provider", "openai", "--base_url", url, "--out", str(tmp_path)),
                *("--min_pixels", "784", "--max_pixels", "784"),
            ]
        )
    for s in json.loads((tmp_path / "summary.json").read_text()):
        assert s["accuracy"] == 1 and s["unparsed"] == 0
        assert set(s["official"].values()) <= {1.0}
        has_one = DATASETS[s["dataset"]].official is not None and s["dataset"] != "3dsrbench"
        assert bool(s["official"]) == has_one


def test_dry_run_and_list_load_no_model(tiny_data, tmp_path, capsys):
    main(["--list"])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)} ", listed, re.M) for name in DATASETS)
    main(
        [
            *("--dataset", str(tiny_data / "val.parquet"), "--model_path", "no/model"),
            *("--provider", "openai", "--dry_run", "--out", str(tmp_path / "none")),
        ]
    )
    assert "first prompt" in capsys.readouterr().out and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "provider, asked", [("hf", "OX-PIXL/SpatialThinker-7B"), ("openai", "SpatialThinker-7b")]
)
def test_short_names_of_models_but_not_of_servers(provider, asked, tiny_data, monkeypatch, capsys):
    monkeypatch.setattr("evaluate.load_processor", lambda args: None)
    main(["--dataset", str(tiny_data / "val.parquet"), "--model_path", "SpatialThinker-7b",
          "--provider", provider, "--dry_run"])  # fmt: skip
    assert f"| {asked} through {provider}" in capsys.readouterr().out


def test_the_released_prompt_is_what_is_asked(tmp_path, capsys):
    fixtures.write_all(tmp_path / "data")
    with serve(lambda body, nth: (200, openai_answer("<answer> (A) Yes </answer>"), {})) as (url, api):
        main([*("--dataset", "hallusionbench", "--local_path", str(tmp_path / "data"), "--model_path", "m"),
              *("--provider", "openai", "--base_url", url, "--out", str(tmp_path), "--template", "released"),
              *("--min_pixels", "784", "--report")])  # fmt: skip
    texts = {text_of(body) for body in api.bodies}
    assert len(texts) == 2 and all(text.endswith("\nOptions:\n(A) Yes \n(B) No") for text in texts)
    assert all("\n\nImage size: {Width} x {Height}\n(84 x 56)\n\nNow answer the" in text for text in texts)
    summary = json.loads((tmp_path / "summary.json").read_text())[0]
    assert (summary["accuracy"], summary["template"], summary["unparsed"]) == (0.5, "released", 0)
    assert next(iter(summary["official"])) == "mean of aAcc, qAcc, fAcc"
    with pytest.raises(SystemExit):
        parse_args(["--template", "released", "--shuffle_options"])


# ---- runs that survive ----
def lines_of(path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_at_any_time_and_continued(tiny_data, tmp_path):
    """kill -9 three times; nothing is lost, nothing that has an answer is asked again."""

    def respond(body, nth):
        time.sleep(0.05)
        return 200, openai_answer("A"), {}

    path = tmp_path / "x.jsonl"
    with serve(respond) as (url, api):
        arguments = ["evaluate.py", *served(url, tiny_data, tmp_path)]
        for kill in range(3):
            process = start_script(*arguments)
            before = len(read_records(path)[1]) if path.exists() else 0
            wait_until(lambda n=before + 3 + kill: lines_of(path) >= n, process)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        with open(path, "a") as f:
            f.write('{"id": "5", "reply": "half a li')  # as a kill in the middle of a write leaves it
        known = read_records(path)[1]
        counts = dict(api.counts)
        run_script(*arguments)
    records = read_records(path)[1]
    assert len(known) < len(records) == 24
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 24 and all(json.loads(line) for line in lines)
    kept = {r["id"]: r for r in known}
    assert all(kept[r["id"]] == r for r in records if r["id"] in kept)
    assert sum(api.counts.values()) - sum(counts.values()) == 24 - len(known)  # only what was missing
    assert json.loads((tmp_path / "x.summary.json").read_text())["n"] == 24


def test_another_configuration_refuses_to_append(tiny_data, tmp_path):
    with serve(right(tiny_data / "val.parquet")) as (url, api):
        main(served(url, tiny_data, tmp_path))
        before = (tmp_path / "x.jsonl").read_text()
        for change in (
            ["--seed", "1"],
            ["--template", "reasoning"],
            ["--max_new_tokens", "9"],
            ["--blind"],
            ["--limit", "3"],
            ["--temperature", "1"],
        ):
            with pytest.raises(SystemExit, match=f"another configuration.*{change[0][2:]}: "):
                main(served(url, tiny_data, tmp_path, *change))
        assert (tmp_path / "x.jsonl").read_text() == before
        main(served(url, tiny_data, tmp_path, "--concurrency", "7", "--timeout", "9"))  # of no meaning
        assert (tmp_path / "x.jsonl").read_text() == before
    assert sum(api.counts.values()) == 24


def test_other_data_refuses_to_append(tiny_data, tmp_path):
    shutil.copy(tiny_data / "val.parquet", tmp_path / "val.parquet")
    with serve(lambda body, nth: (200, openai_answer("A"), {})) as (url, _):
        main(served(url, tmp_path, tmp_path))
        shutil.copy(tiny_data / "train.parquet", tmp_path / "val.parquet")
        with pytest.raises(SystemExit, match="another configuration.*fingerprint: "):
            main(served(url, tmp_path, tmp_path))


def test_two_processes_do_not_write_one_file(tiny_data, tmp_path):
    path = tmp_path / "x.jsonl"
    with locked(path, "a+b"):
        with serve(lambda body, nth: (200, openai_answer("A"), {})) as (url, api):
            with pytest.raises(SystemExit, match="another process is writing it"):
                main(served(url, tiny_data, tmp_path))
    assert not api.bodies


def test_another_server_or_other_weights_are_another_run(tiny_base, tiny_data, tmp_path):
    answer = right(tiny_data / "val.parquet")
    with serve(answer) as (url, _), serve(answer) as (other, api):
        main(served(url, tiny_data, tmp_path, "--limit", "2"))
        with pytest.raises(SystemExit, match="another configuration.*base_url: "):
            main(served(other, tiny_data, tmp_path, "--limit", "2"))
    assert not api.bodies
    model = shutil.copytree(tiny_base, tmp_path / "model")
    run = flags(model, tiny_data, tmp_path, *HF, "--limit", "1", "--custom_filename", "y")
    main(run)
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(SystemExit, match="another configuration.*weights: "):
        main(run)


def test_a_file_that_is_not_ours_stays_as_it_is(tiny_data, tmp_path):
    for text in ('{"my": "only copy"}', '{"my": "first"}\n{"my": "half', "notes\n"):
        (tmp_path / "x.jsonl").write_text(text)
        with serve(lambda body, nth: (200, openai_answer("A"), {})) as (url, _):
            with pytest.raises(SystemExit, match="expected results of evaluate.py"):
                main(served(url, tiny_data, tmp_path))
        assert (tmp_path / "x.jsonl").read_text() == text
    for command in (["--rescore", str(tmp_path / "x.jsonl")], ["--report", str(tmp_path / "x.jsonl")]):
        with pytest.raises(SystemExit, match="x.jsonl: expected results of evaluate.py"):
            main(command)


def test_rescoring_waits_for_no_run(tiny_data, tmp_path):
    with serve(lambda body, nth: (200, openai_answer("A"), {})) as (url, _):
        main(served(url, tiny_data, tmp_path, "--limit", "2"))
    with locked(tmp_path / "x.jsonl", "rb"):
        with pytest.raises(SystemExit, match="another process is writing it"):
            main(["--rescore", str(tmp_path / "x.jsonl")])


# ---- scores ----
def test_rescoring_grades_what_was_said(tiny_data, tmp_path, capsys):
    with serve(right(tiny_data / "val.parquet")) as (url, api):
        main(served(url, tiny_data, tmp_path))
    path = tmp_path / "x.jsonl"
    honest = path.read_text()
    lines = [json.loads(line) for line in honest.splitlines()]
    for line in lines[1:]:
        line |= {"correct": not line["correct"], "parsed": "D", "method": "luck"}
    strange, half = ["no record\n", "[1]\n"], '{"id": "7", "row": 7, "finish'
    written = [json.dumps(line) + "\n" for line in lines]
    path.write_text("".join([*written[:3], strange[0], *written[3:], strange[1], half]))
    main(["--rescore", str(path), "--scoring", "released"])
    out = capsys.readouterr().out
    assert "24 replies graded, 24 grades changed" in out and "released scoring" in out
    assert path.read_text() == "".join(
        json.dumps(r) + "\n"
        for r in sorted(map(json.loads, honest.splitlines()), key=lambda r: r.get("row", -1))
    ) + "".join([*strange, half])
    summary = json.loads((tmp_path / "x.summary.json").read_text())
    assert summary["accuracy"] >= 0.5 and len(api.bodies) == 24
    assert 0 < summary["released"] <= summary["accuracy"]


def test_circular_needs_every_rotation_right(tiny_data, tmp_path):
    """A model that always says A is right in one rotation of each item, hence in none."""
    with serve(lambda body, nth: (200, openai_answer("A"), {})) as (url, api):
        main(served(url, tiny_data, tmp_path, "--circular", "--limit", "6"))
    header, records = read_records(tmp_path / "x.jsonl")
    summary = json.loads((tmp_path / "x.summary.json").read_text())
    assert summary["n"] == 6 and summary["correct"] == 0
    assert header["data"]["n"] == len(records) == len(api.counts)
    assert summary["each_rotation"]["correct"] == 6 and summary["each_rotation"]["n"] == len(records)
    by_row = {}
    for r in records:
        by_row.setdefault(r["row"], []).append(r)
    for turns in by_row.values():
        assert [r["gold"][1] for r in turns].count("A") == 1 and len(turns) == len(turns[0]["choices"])
        assert len({tuple(sorted(r["choices"])) for r in turns}) == 1


def test_rotations_that_are_missing_are_no_right_item(tiny_data, tmp_path):
    with serve(right(tiny_data / "val.parquet")) as (url, api):
        main(served(url, tiny_data, tmp_path, "--circular", "--limit", "4"))
    path = tmp_path / "x.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '@1"' not in line) + "\n")
    with pytest.raises(SystemExit, match="4 items failed or are missing"):
        main(["--rescore", str(path)])
    summary = json.loads((tmp_path / "x.summary.json").read_text())
    assert (summary["n"], summary["missing"], summary["variant"]) == (0, 4, "circular, limit 4")
    with pytest.raises(ValueError, match="expected --circular in both or in none"):
        compare(path, write_results(tmp_path / "y", [1, 0]))


def test_shuffled_and_blind(tiny_data, tmp_path):
    with serve(lambda body, nth: (200, openai_answer("A"), {})) as (url, api):
        main(served(url, tiny_data, tmp_path / "s", "--shuffle_options"))
        main(served(url, tiny_data, tmp_path / "b", "--blind"))
        main(served(url, tiny_data, tmp_path / "p"))
    shuffled, plain = (read_records(tmp_path / d / "x.jsonl")[1] for d in "sp")
    assert any(a["choices"] != b["choices"] for a, b in zip(shuffled, plain, strict=True))
    assert all(a["gold"][4:] == b["gold"][4:] for a, b in zip(shuffled, plain, strict=True))
    images = [len(b["messages"][0]["content"]) - 1 for b in api.bodies]
    assert images == [1] * 24 + [0] * 24 + [1] * 24


# ---- tables and pages ----
def test_compare_prints(tmp_path, capsys):
    main(
        [
            "--compare",
            str(write_results(tmp_path / "a", [1, 0, 1])),
            str(write_results(tmp_path / "b", [1, 1, 1])),
        ]
    )
    assert "only_b: 1" in capsys.readouterr().out


def test_a_folder_of_results_has_one_table(tiny_data, tmp_path):
    with serve(right(tiny_data / "val.parquet")) as (url, _):
        main(served(url, tiny_data, tmp_path))
        main([*served(url, tiny_data, tmp_path), "--custom_filename", "y", "--template", "reasoning"])
    write_tables(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "tiny, spatial_thinker" in text and "tiny, reasoning" in text
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 2


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.articles = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag == "article":
            self.articles.append(dict(attrs))


def test_report_is_one_page_and_one_picture(tmp_path, capsys):
    fixtures.write_all(tmp_path / "data")
    evil = "<script>alert(1)</script>\ud800<answer>(A)</answer>"
    with serve(lambda body, nth: (200, openai_answer(evil), {})) as (url, _):
        main(
            [
                *("--dataset", "stvqa", "blink-jigsaw", "hallusionbench"),
                *("--local_path", str(tmp_path / "data"), "--model_path", "SpatialThinker-7B"),
                *("--provider", "openai", "--base_url", url, "--max_pixels", "524288"),
                *("--out", str(tmp_path / "out"), "--report"),
            ]
        )
    html = (tmp_path / "out" / "results.html").read_text()
    page = Page()
    page.feed(html)
    assert page.seen.count("script") == 1 and "http" not in html.replace("http-equiv", "")
    assert len(page.articles) == 6 + 4 + 8
    assert {a["data-dataset"] for a in page.articles} == {"stvqa", "blink-jigsaw", "hallusionbench"}
    assert {a["data-outcome"] for a in page.articles} >= {"right", "wrong"}
    assert page.seen.count("img") == 4 * 2  # the further images of blink-jigsaw
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [s["paper"] for s in summary] == [None] * 3  # not on 6 of 692 rows
    again = tmp_path / "out" / "stvqa_SpatialThinker-7B_spatial_thinker.jsonl"
    capsys.readouterr()
    main(["--report", str(again)])
    assert "results.html" in capsys.readouterr().out
    features, rows = fixtures.stvqa()
    fixtures.write(tmp_path / "data" / "stvqa.parquet", features, rows[::-1])
    with pytest.raises(SystemExit, match="its data set has changed since"):
        main(["--report", str(again)])


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tiny_data, tmp_path):
    def respond(body, nth):
        time.sleep(0.1 if len(api.bodies) < 8 else 20)
        return 200, openai_answer("A"), {}

    with serve(respond) as (url, api):
        process = start_script(
            "evaluate.py",
            *served(url, tiny_data, tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        wait_until(lambda: lines_of(tmp_path / "x.jsonl") >= 4, process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=15)  # without waiting for the slow server, which takes 20 s
    assert process.returncode == 1 and "stopped; go on with: " in out and "Traceback" not in out


def test_paths_are_written_out(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse_args(["--dataset", "~/a.parquet", "cv-bench", "--out", "$HOME/r", "--compare", "~/a", "b"])
    assert (args.dataset, args.out) == (["/home/me/a.parquet", "cv-bench"], "/home/me/r")
    assert args.compare == ["/home/me/a", "b"]
    with pytest.raises(SystemExit):
        parse_args(["--out", "$NOT_SET_ANYWHERE/r"])
    assert (
        "expected a path, got $NOT_SET_ANYWHERE/r, but $NOT_SET_ANYWHERE is not set"
        in capsys.readouterr().err
    )
