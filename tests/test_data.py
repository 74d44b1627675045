"""Loading, checking, prompting, resizing, packing and ordering, on rows in STVQA-7K's own format."""

import dataclasses
import io
import itertools
import json
import re
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import lookalike
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import bomb, noise
from PIL import Image

from config import write_run_record
from data import (
    COLUMNS,
    PER_MILLE,
    REASONS,
    BadRow,
    PromptCache,
    PromptEncoder,
    batch_at,
    build_prompt,
    build_prompt_text,
    load_samples,
    report_rows,
    resize,
    row_to_sample,
    smart_size,
)
from packing import micro_batches
from results import judge
from rewards import score_completion
from stvqa import stvqa_features


@pytest.fixture(scope="module")
def rows():
    import tiny

    return [row | {"image_id": f"row-{i}"} for i, row in enumerate(tiny.rows(6, 0, "row", set()))]


def write(rows, path):
    Dataset.from_list(rows, features=stvqa_features()).to_parquet(path)
    return str(path)


def with_scene(row, box, answer=None):
    """The row with its first gold box replaced."""
    scene = json.loads(row["answer_option_text"].split("<scene>")[1].split("</scene>")[0])
    scene["objects"][0]["bbox"] = box
    return row | {
        "answer_option_text": f"<scene>{json.dumps(scene)}</scene>\n<answer>"
        f"{answer or row['answer_option_text_only']}</answer>"
    }


# ---- sources ----
def test_every_source_gives_the_same_samples(rows, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    parquet = write(rows, folder / "train.parquet")
    table = Dataset.from_list(rows, features=stvqa_features())
    table.save_to_disk(tmp_path / "disk")
    (tmp_path / "img").mkdir()
    with open(tmp_path / "rows.jsonl", "w") as f:
        for row in rows:
            (tmp_path / "img" / f"{row['image_id']}.png").write_bytes(row["images"]["bytes"])
            f.write(json.dumps(row | {"images": f"img/{row['image_id']}.png"}) + "\n")
    sources = [parquet, str(folder), str(tmp_path / "disk"), str(tmp_path / "rows.jsonl")]
    for source in sources:
        samples = load_samples(source)
        assert len(samples) == 6
        assert [s.id for s in samples] == [r["image_id"] for r in rows]
        assert samples[2].ground_truth == rows[2]["answer_option_text"]
        assert samples[2].size == (84, 84)
        want = np.array(Image.open(io.BytesIO(rows[2]["images"]["bytes"])))
        assert np.array_equal(np.array(samples[2].load_images()[0]), want)


def test_renamed_columns_are_mapped(rows, tmp_path):
    renamed = [{("frage" if k == "question_with_options" else k): v for k, v in row.items()} for row in rows]
    features = stvqa_features()
    features["frage"] = features.pop("question_with_options")
    Dataset.from_list(renamed, features=features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="missing \\['question_with_options'\\]"):
        load_samples(str(tmp_path / "x.parquet"))
    samples = load_samples(str(tmp_path / "x.parquet"), columns={"question": "frage"})
    assert samples[0].question == rows[0]["question_with_options"]


@pytest.mark.parametrize("source, message", [
    ("no/such/folder/x.parquet", "no such file"),
    ("no-such-thing", "expected a Hub id"),
    ("", "expected a Hub id, a file or a folder, got nothing"),
])  # fmt: skip
def test_a_missing_source_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_samples(source)


# ---- checks ----
def with_image(row, data):
    return row | {"images": {"bytes": data, "path": None}}


def with_options(row, *options):
    answer = f"(A) {options[0]}"
    scene = row["answer_option_text"].partition("\n")[0]
    question = " ".join(["Where?", *(f"({x}) {o}" for x, o in zip("ABCD", options, strict=False))])
    return row | {
        "options": list(options),
        "question_with_options": question,
        "answer_option_text_only": answer,
        "answer_option_text": f"{scene}\n<answer>{answer}</answer>",
    }


PHOTO = lookalike.photo((200, 100), 0)
EMPTY = '<scene>{"objects": [], "relationships": []}</scene>\n<answer>%s</answer>'
BAD = {  # what is wrong: (row -> row, reason, words of the message)
    "scene": (
        lambda r: r | {"answer_option_text": "<scene>{</scene>\n<answer>(A) x</answer>"},
        "scene",
        "column answer_option_text",
    ),
    "no scene": (lambda r: r | {"answer_option_text": None}, "scene", "expected text, got NoneType"),
    "swapped": (lambda r: with_scene(r, [20, 0, 0, 20]), "scene", "expected finite x1 < x2"),
    "nan": (lambda r: with_scene(r, [0, 0, float("nan"), 20]), "scene", "expected JSON, got NaN"),
    "empty": (
        lambda r: r | {"answer_option_text": EMPTY % r["answer_option_text_only"]},
        "empty_scene",
        "a gold scene with objects, got none",
    ),
    "right of it": (lambda r: with_scene(r, [84, 10, 85, 60]), "box_frame", r"fit the image \(84, 84\)"),
    "above it": (lambda r: with_scene(r, [10, -9, 60, 0]), "box_frame", r"got \w+.1 \[10, -9, 60, 0\]"),
    "of 1000": (lambda r: with_scene(r, [1, 70, 20, 93]), "box_frame", "box_format=norm1000\\?"),
    "of 1": (lambda r: with_scene(r, [0.1, 0, 0.5, 1.0]), "box_frame", "box_format=norm1\\?"),
    "other answer": (lambda r: with_scene(r, [0, 0, 9, 9], "(A) nonsense"), "answer", "answer_option_text"),
    "answer": (
        lambda r: r | {"answer_option_text_only": "(D) a cat"},
        "answer",
        "answer_option_text_only: expected one of",
    ),
    "no letter": (
        lambda r: r | {"answer_option_text_only": r["answer_text_only"]},
        "answer",
        "answer_option_text_only: expected one of",
    ),
    "options": (lambda r: r | {"options": []}, "options", "expected a list of 2 to 10 texts"),
    "many options": (lambda r: r | {"options": list("abcdefghijk")}, "options", "a list of 2 to 10 texts"),
    "no text in options": (lambda r: r | {"options": ["a", None]}, "options", "a list of 2 to 10 texts"),
    "empty option": (lambda r: with_options(r, "left", " "), "options", "a list of 2 to 10 texts"),
    "two right": (lambda r: with_options(r, "left", "right", "Left."), "options", "each option to differ"),
    "question": (lambda r: r | {"question_with_options": "  "}, "text", "column question_with_options"),
    "token": (
        lambda r: r | {"question_with_options": "Is <|image_pad|> left? (A) yes (B) no"},
        "text",
        r"no control token of a model.*, got <\|image_pad\|>",
    ),
    "no image": (lambda r: with_image(r, b"not an image"), "image", "column images"),
    "empty image": (lambda r: with_image(r, b""), "image", "neither bytes nor a path"),
    "half a JPEG": (
        lambda r: with_image(r, PHOTO[: len(PHOTO) // 2]) | {"problem": ""},
        "image",
        "truncated",
    ),
    "half a PNG": (lambda r: with_image(r, r["images"]["bytes"][:-40]), "image", "column images"),
    "bomb": (lambda r: with_image(r, bomb(20_000, 20_000)), "image", "400000000 pixels"),
    "size": (
        lambda r: r | {"problem": r["problem"].replace("84 x 84", "48 x 84")},
        "size",
        r"column problem: expected the image's size \(84, 84\), got 'Image size: \(48 x 84\)'",
    ),
}


WRONG = {  # column: values of the wrong kind
    "question_with_options": (7, [], {"a": 1}, None, "<|im_end|>"),
    "problem": (7, ["a"], "<|vision_start|>"),
    "options": ("a, b", {"a": 1}, [["a"], ["b"]], [1, 2], ["a", "<|im_end|>"], ["a", None]),
    "answer_option_text": (7, [], "", "<scene>[1]</scene>\n<answer>(A) x</answer>"),
    "answer_option_text_only": (7, ["(A) left"], None),
    "category": ([], {"a": 1}),
    "image_id": ([], {"a": 1}),
    "completion": (7, "<|im_end|>"),
    "images": (
        7,
        True,
        None,
        [],
        [None],
        {},
        "",
        [["a.png"]],
        {"bytes": [137, 80]},
        "missing.png",
        "data:,x",
    ),
}


@pytest.mark.parametrize("column, value", [(c, v) for c, values in WRONG.items() for v in values])
def test_a_wrong_type_is_one_short_line(column, value, rows, tmp_path):
    good = rows[0] | {"images": "a.png"}
    (tmp_path / "a.png").write_bytes(rows[0]["images"]["bytes"])
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good | {column: value})))
    samples = load_samples(str(path), skip_bad_rows=True)
    assert len(samples) == 1 and len(samples.skipped) == 1
    (message,) = samples.skipped
    assert re.match(rf"\w+: row .*\(#1\), column {column}: expected .*, got ", message), message
    assert len(message) < 500 and "\n" not in message


def test_a_broken_line_is_a_bad_row(rows, tmp_path):
    (tmp_path / "a.png").write_bytes(rows[0]["images"]["bytes"])
    path, good = tmp_path / "x.jsonl", json.dumps(rows[0] | {"images": "a.png"})
    path.write_text(f"\ufeff{good}\n\n{good[:-9]}\n[1]\n{'[' * 99_999}\n")
    samples = load_samples(str(path), max_bad_rows=0.75)
    assert len(samples) == 1 and samples.reasons == {"record": 3}
    for line, expected, message in zip(
        (3, 4, 5), ("JSON", "a JSON object", "JSON"), samples.skipped, strict=True
    ):
        assert f"{path}, line {line}: expected {expected}, got" in message
    path.write_text(good[:-9])
    with pytest.raises(ValueError, match="x.jsonl, line 1: expected JSON"):
        load_samples(str(path))


def test_every_image_of_a_row_is_decoded(rows, tmp_path):
    (tmp_path / "a.png").write_bytes(rows[0]["images"]["bytes"])
    (tmp_path / "half.jpg").write_bytes(PHOTO[: len(PHOTO) // 2])
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(rows[0] | {"images": ["a.png", "half.jpg"]}))
    with pytest.raises(ValueError, match="column images: expected a readable image, got .*truncated"):
        load_samples(str(path))


def test_a_picture_that_goes_bad_later_names_its_row(rows, tmp_path):
    (tmp_path / "a.png").write_bytes(rows[0]["images"]["bytes"])
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(rows[0] | {"images": "a.png"}))
    sample = load_samples(str(path))[0]
    (tmp_path / "a.png").write_bytes(rows[0]["images"]["bytes"][:-40])
    with pytest.raises(OSError, match="row row-0: expected readable images, got "):
        sample.load_images()


def gold(row, objects, relations=()):
    """The row with that scene."""
    scene = objects if relations is None else {"objects": objects, "relationships": list(relations)}
    return row | {"answer_option_text": f"<scene>{json.dumps(scene)}</scene>\n<answer>"
                  f"{row['answer_option_text_only']}</answer>"}  # fmt: skip


@pytest.mark.parametrize("box_format, box, pixels", [
    ("xyxy", [21, 42, 63, 84], [21, 42, 63, 84]),
    ("xywh", [21, 42, 42, 42], [21, 42, 63, 84]),
    ("norm1", [0.25, 0.5, 0.75, 1], [21, 42, 63, 84]),
    ("norm1000", [250, 500, 750, 1000], [21, 42, 63, 84]),
    ("xyxy", [250, 500, 750, 1000], None),
    ("xyxy", [10, 10, 60, 93], None),  # more than a tenth of 84 over
    ("xyxy", [0.25, 0.5, 0.75, 1], None),
    ("xyxy", [0, 0, 1, 1], None),
    ("norm1", [21, 42, 63, 84], None),
    ("norm1000", [2500, 0, 2600, 10], None),
])  # fmt: skip
def test_boxes_are_read_in_their_format_or_refused(box_format, box, pixels, rows, tmp_path):
    path = write([gold(rows[0], [{"id": "cup.1", "bbox": box}])], tmp_path / "x.parquet")
    if pixels is None:
        with pytest.raises(ValueError, match=rf"\(84, 84\) as {box_format}.*, got cup.1 \["):
            load_samples(path, box_format=box_format)
        return
    scene = json.loads(load_samples(path, box_format=box_format)[0].ground_truth[7:].partition("</scene>")[0])
    assert scene["objects"] == [{"id": "cup.1", "bbox": pixels}]


def test_scenes_in_qwens_keys_are_read(rows, tmp_path):
    box = [1, 2, 30, 40]
    objects = [{"bbox_2d": box, "label": label} for label in ("red cup", "dog", "red cup")]
    relations = [{"subject": "red cup", "predicate": "on", "object": "dog"}]
    for i, scene in enumerate([(objects, relations), (objects, None)]):
        sample = load_samples(write([gold(rows[0], *scene)], tmp_path / f"{i}.parquet"))[0]
        read = json.loads(sample.ground_truth[7:].partition("</scene>")[0])
        assert read["objects"] == [{"id": i, "bbox": box} for i in ("red_cup.1", "dog.1", "red_cup.2")]
        assert read.get("relationships", []) == [
            {"subject": "red_cup.1", "predicate": "on", "object": "dog.1"}
        ] * (i == 0)


def test_held_out_rows_are_never_training_rows(rows, tmp_path):
    train = load_samples(write(rows[:4], tmp_path / "train.parquet"))
    with pytest.raises(
        ValueError, match=r"4 of 4 .*4 trained_on\n.* a row apart from .*val_data names other"
    ):
        load_samples(str(tmp_path / "train.parquet"), "val", apart_from=train)
    renamed = [rows[0] | {"image_id": "another"}, *rows[4:]]
    path = write(renamed, tmp_path / "val.parquet")
    val = load_samples(path, "val", apart_from=train, max_bad_rows=0.5)
    assert [s.id for s in val] == ["row-4", "row-5"] and val.reasons == {"trained_on": 1}


def test_a_fingerprint_is_of_the_rows_and_their_order(rows, tmp_path):
    def mark(rows, name):
        return load_samples(write(rows, tmp_path / f"{name}.parquet")).fingerprint()

    first = mark(rows, "a")
    assert first["rows"] == 6 and first == mark(rows, "b")
    other = [with_scene(rows[0], [0, 0, 9, 9]), *rows[1:]]
    assert len({mark(r, f"c{i}")["fingerprint"] for i, r in enumerate([rows, rows[::-1], other])}) == 3


def test_a_run_continues_on_its_own_rows_only(tmp_path):
    from checkpoint import CheckpointError, refuse_other_rows
    from train_grpo import GRPOConfig

    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    mine, other = {"rows": 6, "fingerprint": "ab"}, {"rows": 5, "fingerprint": "cd"}
    for rows in (other, mine):  # without a checkpoint nothing is continued
        write_run_record(GRPOConfig(), tmp_path)
        refuse_other_rows(alone, tmp_path, rows)
    (tmp_path / "checkpoint-5").mkdir()
    write_run_record(GRPOConfig(), tmp_path)
    refuse_other_rows(alone, tmp_path, mine)
    with pytest.raises(CheckpointError, match="expected 6 with fingerprint ab, got 5 with fingerprint cd"):
        refuse_other_rows(alone, tmp_path, other)
    assert json.loads((tmp_path / "run.json").read_text())["trained_on"] == mine


def test_a_prompt_that_is_a_chat_is_named(rows):
    chat = [{"role": "user", "content": "Where is it?"}]
    with pytest.raises(BadRow, match=r"row row-0 \(#0\), column problem: expected a text, got"):
        row_to_sample(rows[0] | {"problem": chat}, COLUMNS, 0, True)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_left_out_and_counted(name, rows, tmp_path):
    break_row, reason, message = BAD[name]
    path = write([rows[0], break_row(rows[1]), *rows[2:]], tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message) as error:
        load_samples(path, max_bad_rows=0.16)  # of 6 rows: not one
    assert "row row-1 (#1)" in str(error.value)
    share = "16.67% where max_bad_rows=0.16 allows 16.00%"
    first = f"{path} (train): 1 of 6 rows cannot be used, {share}: 1 {reason}"
    assert str(error.value).splitlines()[0] == first
    samples = load_samples(path, max_bad_rows=0.17)
    assert [s.id for s in samples] == [f"row-{i}" for i in (0, 2, 3, 4, 5)]
    assert samples.reasons == {reason: 1} and reason in REASONS
    assert len(samples.skipped) == 1 and samples.skipped[0].startswith(f"{reason}: row row-1 (#1)")


@pytest.mark.parametrize("box, inside, overhang", [
    ([-1, 2, 20, 85], [0, 2, 20, 84], 1),
    ([1, -2, 20, 30], [1, 0, 20, 30], 2),
    ([1, 70, 20, 89], [1, 70, 20, 84], 5),
    ([83, 10, 92.25, 60], [83, 10, 84, 60], 8.25),  # a pixel of it shows
])  # fmt: skip
def test_a_box_over_the_edge_is_clipped_and_counted(box, inside, overhang, rows, tmp_path):
    path = write([with_scene(rows[0], box), *rows[1:]], tmp_path / "x.parquet")
    samples = load_samples(path)
    assert (samples.clipped, samples.overhang) == (1, overhang)
    assert f'"bbox": {inside}' in samples[0].ground_truth
    assert samples[1].ground_truth == rows[1]["answer_option_text"]


@pytest.mark.parametrize("listed, shown, gold, rewarded", [
    ("on top", "(A) on top", "(A) on top", "(A) on top"),
    ("on top", "(A) on top", " (A) On Top ", " (A) On Top "),  # equal for the reward: left as it is
    ("on top", "(A) on top", "(a)on  top.", "(A) on top"),
    ("on top.", "(A) on top.", "(A) on top", "(A) on top."),
    (" on top", "(A)  on top", "(A) on top", "(A) on top"),
    ("on top", "(A) on top.", "(A) on top", "(A) on top."),  # the question's line is what can be copied
    ("on top.", "(A) on top", "(A) on top.", "(A) on top"),
    ("on top", "(A) on  top", "( A ) on top", "(A) on top"),
    ("on top ", "(A)on top ", "(A)  on  top", "(A) on top"),
    ("on top", "(A) on top (B) below.", "(A) on top.", "(A) on top"),
    ("on top", "(A) on top", "(B) on top", None),
    ("on top", "(A) on top", "(A) on", None),
    ("on top", "(A) on top", "(A)", None),
])  # fmt: skip
def test_the_gold_answer_is_the_option_that_can_be_copied(listed, shown, gold, rewarded, rows, tmp_path):
    row = with_scene(with_options(rows[0], listed, "below"), [0, 0, 9, 9], gold)
    row |= {"answer_option_text_only": gold, "question_with_options": f"Where?\nOptions:\n{shown}\n(B) below"}
    path = write([row, rows[1]], tmp_path / "x.parquet")
    if rewarded is None:
        assert load_samples(path, max_bad_rows=0.5).reasons == {"answer": 1}
        return
    sample = load_samples(path)[0]
    assert sample.answer == rewarded
    line = next(line for line in sample.question.split("\n") if line.startswith("(A)"))
    for answer in (rewarded, line.partition(" (B)")[0]):
        scene = '<scene>{"objects": []}</scene>'
        text = f"<observe>.</observe>{scene}<think>.</think><answer>{answer}</answer>"
        assert score_completion(text, sample.ground_truth, sample.size).accuracy == 1
        assert judge(sample, text)["correct"]


def test_an_unknown_size_is_filled_in(rows, tmp_path):
    problem = rows[0]["problem"].replace("(84 x 84)", "(Unknown)")
    assert problem != rows[0]["problem"]
    sample = load_samples(write([rows[0] | {"problem": problem}], tmp_path / "x.parquet"))[0]
    assert sample.problem == rows[0]["problem"]


def test_bad_rows_in_the_words_of_older_configs(rows, tmp_path):
    path = write([rows[0] | {"options": []}, *rows[1:3]], tmp_path / "x.parquet")
    long = dict(prompt_length=lambda s: 5 + (s.id == "row-1"), max_prompt_length=5)
    for old in ({"skip_bad_rows": True}, {"skip_long_prompts": True}):
        samples = load_samples(path, **long, **old)
        assert len(samples) == 1 and samples.reasons == {"options": 1, "long_prompt": 1}
    with pytest.raises(ValueError, match="2 of 3 rows .*66.67% where max_bad_rows=0.5 allows 50.00%"):
        load_samples(path, **long, max_bad_rows=0.5)


def test_only_bad_rows_is_an_error(rows, tmp_path):
    path = write([rows[0] | {"options": []}], tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no usable rows"):
        load_samples(path, max_bad_rows=1)


def test_the_scene_is_not_asked_for_where_it_is_not_needed(rows, tmp_path):
    path = write([r | {"answer_option_text": None} for r in rows], tmp_path / "x.parquet")
    samples = load_samples(path, need_scene=False)
    assert samples[0].ground_truth == rows[0]["answer_option_text_only"]


# ---- prompts ----
def test_prompt_text():
    text = build_prompt_text("spatial_thinker", "Where? (A) here (B) there", (640, 480))
    assert text.startswith("You FIRST observe the image in <observe> </observe> tags")
    assert text.endswith(
        "e.g., <answer> (A) cat </answer>.\n\nImage size: (640 x 480)\n\nWhere? (A) here (B) there"
    )
    assert "Image size" not in build_prompt_text("reasoning", "Where?", (640, 480))
    with pytest.raises(ValueError, match="template: expected one of"):
        build_prompt_text("spatial", "Where?", (640, 480))


def test_the_rows_own_prompt_equals_the_built_one(rows, tmp_path):
    sample = load_samples(write(rows, tmp_path / "x.parquet"))[0]
    assert build_prompt(sample, "problem") == build_prompt(sample, "spatial_thinker")
    assert [c["type"] for c in build_prompt(sample, "problem")[0]["content"]] == ["image", "text"]


def test_prompt_length_needs_no_pixels_and_is_exact(rows, tmp_path, tiny_base):
    from transformers import AutoProcessor

    encode = PromptEncoder(AutoProcessor.from_pretrained(tiny_base), "spatial_thinker", 784, 802816)
    path = write(rows, tmp_path / "x.parquet")
    samples = load_samples(path)
    lengths = [encode.length(s) for s in samples]
    assert lengths == [len(encode(s).ids) for s in samples]
    limit = sorted(lengths)[2]
    with pytest.raises(ValueError, match=f"tokens long, expected at most {limit}"):
        load_samples(path, prompt_length=encode.length, max_prompt_length=limit)
    kept = load_samples(path, prompt_length=encode.length, max_prompt_length=limit, max_bad_rows=0.5)
    assert len(kept) == sum(n <= limit for n in lengths)
    assert kept.reasons == {"long_prompt": 6 - len(kept)}


def test_an_image_that_no_prompt_can_hold_is_a_bad_row(rows, tmp_path, tiny_base):
    from transformers import AutoProcessor

    encode = PromptEncoder(AutoProcessor.from_pretrained(tiny_base), "reasoning", 784, 802816)
    slim = io.BytesIO()
    Image.new("RGB", (900, 3)).save(slim, "PNG")  # Qwen2.5-VL takes proportions below 200
    row = with_image(rows[0], slim.getvalue()) | {"problem": ""}
    path = write([row, *rows[1:]], tmp_path / "x.parquet")
    length = dict(prompt_length=encode.length, max_prompt_length=2000)
    assert load_samples(path, need_scene=False, max_bad_rows=0.2, **length).reasons == {"image": 1}


# ---- rows as they are likely to be ----
LIKELY = {  # flaw: (rows of 300 that have it, what becomes of them)
    "one pixel over": (7, "clipped"),
    "two pixels over": (5, "clipped"),
    "ten pixels over": (2, "clipped"),
    "outside": (3, "box_frame"),
    "flat box": (2, "scene"),
    "whole graph": (6, "used"),
    "empty scene": (4, "empty_scene"),
    "name of two words": (1, "scene"),
    "wrong options repeat": (3, "options"),
    "right option repeats": (2, "options"),
    "blanks everywhere": (4, "used"),
    "stops everywhere": (4, "used"),
    "blank in the answer": (3, "used"),
    "stop in the answer": (3, "used"),
    "capital in the answer": (3, "used"),
    "stop in the options": (3, "used"),
    "no such answer": (2, "answer"),
    "size unknown": (5, "used"),
    "size of another file": (4, "size"),
    "on its side": (2, "used"),
    "half a file": (1, "image"),
}


@pytest.fixture(scope="module")
def likely(tmp_path_factory):
    """A file of 300 rows with LIKELY's flaws: 14 to clip, 22 to leave out."""
    path = tmp_path_factory.mktemp("likely") / "rows.parquet"
    return lookalike.write(path, lookalike.rows(300, {flaw: count for flaw, (count, _) in LIKELY.items()}))


def test_likely_rows_are_clipped_used_or_left_out_by_reason(likely, tmp_path):
    assert set(LIKELY) == set(lookalike.FLAWS)
    samples = load_samples(likely, max_bad_rows=0.08)
    assert (len(samples), samples.total) == (278, 300)
    assert (samples.clipped, samples.overhang) == (14, 10)
    assert samples.reasons == {
        "box_frame": 3, "scene": 3, "empty_scene": 4, "options": 5, "answer": 2, "size": 4,
        "image": 1,
    }  # fmt: skip
    for message in samples.skipped:  # "reason: row FLAW NUMBER (#NUMBER), column ..."
        reason, rest = message.split(": row ", 1)
        assert LIKELY[rest.rpartition(" (#")[0].rpartition(" ")[0]][1] == reason
    left = Counter(s.id.rpartition(" ")[0] for s in samples)
    assert left == {f: n for f, (n, what) in LIKELY.items() if what in ("used", "clipped")} | {"fine": 231}
    assert load_samples(likely, need_scene=False, max_bad_rows=0.04).reasons == {
        "options": 5, "answer": 2, "size": 4, "image": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="22 of 300 rows cannot be used, 7.33% .* allows 6.00%: 5 ") as error:
        load_samples(likely, max_bad_rows=0.06)
    assert len(str(error.value).splitlines()) == 8  # one row of each of the 7 reasons


def test_every_likely_row_that_is_used_can_be_earned_in_full(likely):
    samples = load_samples(likely, max_bad_rows=0.08)
    for sample, row in zip(samples, samples.rows, strict=True):
        gold = samples.table[row]
        scene = sample.ground_truth.partition("\n")[0]
        line = next(o for o in sample.question.split("\n") if o.startswith(f"({gold['answer_only']})"))
        text = f"<observe>.</observe>{scene}<think>.</think><answer>{line}</answer>"
        # CIoU's denominators hold 1e-7 more than areas of (40 / 1024)^2 and up
        assert score_completion(text, sample.ground_truth, sample.size).reward == pytest.approx(1, abs=1e-4)
        assert judge(sample, text)["correct"]
        w, h = sample.size
        assert sample.load_images()[0].size == (w, h) and f"Image size: ({w} x {h})" in sample.problem


@pytest.mark.parametrize("name, reasons", [
    ("3b", "3 options, 2 empty_scene, 1 size"),
    ("3b_vanilla", "3 options, 1 size"),
])  # fmt: skip
def test_the_shipped_configs_start_on_likely_rows(name, reasons, tmp_path, tiny_base, capsys):
    from transformers import AutoProcessor

    from train_grpo import GRPOConfig, load_rows

    # 15 boxes one pixel over, 9 two, 2 ten
    counts = {flaw: round(300 * share) for flaw, (share, _) in lookalike.FLAWS.items()}
    path = lookalike.write(tmp_path / "rows.parquet", lookalike.rows(300, counts))
    other = lookalike.write(tmp_path / "held_out.parquet", lookalike.rows(1, {}, seed=1))
    paths = f"data={path}", f"val_data={other}", f"out={tmp_path}"
    cfg = GRPOConfig.load([f"configs/{name}.yaml", *paths])
    encode = PromptEncoder(
        AutoProcessor.from_pretrained(tiny_base), cfg.template, cfg.min_pixels, cfg.max_pixels
    )
    n = 300 - sum(int(part.split()[0]) for part in reasons.split(", "))
    train, val = load_rows(cfg, encode, SimpleNamespace(is_main_process=True))
    assert (len(train), len(val)) == (n, 1)
    clipped = ", 26 with a gold box clipped to the image by at most 10 px" if name == "3b" else ""
    assert capsys.readouterr().out.splitlines() == [
        f"train: {n} of 300 rows of {path} (train){clipped}",
        f"held out: 1 of 1 rows of {other} (val)",
        f"left out: {reasons}; {tmp_path}/bad_rows.txt names them",
    ]
    listed = (tmp_path / "bad_rows.txt").read_text().splitlines()
    assert listed == [f"train: {message}" for message in train.skipped] and len(listed) == 300 - n


def test_rows_without_flaws_say_so(rows, tmp_path):
    path = write(rows, tmp_path / "x.parquet")
    said = report_rows({"train": load_samples(path)}, tmp_path / "bad_rows.txt")
    assert said == f"train: 6 of 6 rows of {path} (train)\nleft out: none"
    assert not (tmp_path / "bad_rows.txt").exists()


def test_a_run_of_an_older_config_continues(tmp_path):
    from checkpoint import refuse_another_run
    from train_grpo import FREE_TO_CHANGE, GRPOConfig

    old = GRPOConfig(skip_bad_rows=True, skip_long_prompts=True)
    assert old.source("x", "train")["skip_bad_rows"] and old.source("x", "train")["skip_long_prompts"]
    write_run_record(old, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["config"]["max_bad_rows"]  # which it did not know
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "checkpoint-1").mkdir()
    refuse_another_run(GRPOConfig(max_bad_rows=0.02), tmp_path, FREE_TO_CHANGE)
    with pytest.raises(ValueError, match="group_size: 8 there, 4 here"):
        refuse_another_run(GRPOConfig(group_size=4), tmp_path, FREE_TO_CHANGE)


# ---- prompts ----
def test_a_prompt_is_what_the_processor_makes_of_text_and_images(rows, tmp_path, tiny_base):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    encoder = PromptEncoder(processor, "spatial_thinker", 784, 802816)
    sample = load_samples(write(rows, tmp_path / "x.parquet"))[0]
    for images in ((), (noise(140, 56),), (noise(28, 84), noise(90, 61))):
        sample = dataclasses.replace(sample, encoded_images=images)
        shown = encoder.images(sample) or None
        want = processor(text=[encoder.text(sample)], images=shown, return_tensors="pt")
        got = encoder(sample)
        assert got.ids == want["input_ids"][0].tolist()
        if images:
            assert torch.equal(got.pixel_values, want["pixel_values"])
            assert torch.equal(got.image_grid_thw, want["image_grid_thw"])
            pixels = sum(w * h for w, h in (image.size for image in shown))
            assert got.nbytes == pixels * (3 + 3 * 2 * 4)  # RGB; RGB in two frames of float32
        else:
            assert got.pixel_values is None and got.nbytes == 0


class Made:
    """A prompt of ten bytes."""

    nbytes = 10


def test_prompts_are_made_once_ahead_and_kept_up_to_the_limit():
    made = []

    def make(row):
        made.append(row)
        if row == 9:
            raise ValueError("row 9")
        return Made()

    prompts = PromptCache(make, 1, 25)
    prompts.ahead([1, 2, 1])
    prompts.ahead([2, 9])
    first = prompts(1)
    assert [prompts(1), prompts(1)] == [first, first] and prompts(2) is prompts(2)
    assert prompts(3) is not prompts(3)  # 30 bytes would be above the limit
    with pytest.raises(ValueError, match="row 9"):  # when it is asked for, not before
        prompts(9)
    assert made == [1, 2, 9, 3, 3] and prompts.made == 4 and prompts.bytes == 20
    prompts.clear()
    assert prompts(1) is not first and prompts.bytes == 10


def test_prompts_are_made_side_by_side():
    together = threading.Barrier(3)  # broken, with an error, unless three threads meet in it

    def make(row):
        together.wait(timeout=60)
        return Made()

    prompts = PromptCache(make, 3)
    prompts.ahead(range(3))
    for row in range(3):
        prompts(row)


# ---- images ----
@settings(max_examples=60, deadline=None)
@given(st.integers(20, 3000), st.integers(20, 3000))
def test_resized_once_means_never_again(width, height):
    budget = (512 * 512, 2048 * 2048)
    w, h = smart_size(width, height, *budget)
    assert w % 28 == 0 and h % 28 == 0
    assert smart_size(w, h, *budget) == (w, h)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(784, 90_000), st.floats(1, 8))
def test_a_size_is_a_fixed_point_of_the_processor_or_refused(width, height, low, wide):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    budget = low, int(low * wide)
    try:
        w, h = smart_size(width, height, *budget)
    except ValueError:
        # A square has its place in a budget of factor 4, where rounding to a cell fits twice.
        assert wide < 4 or max(width, height) / min(width, height) > 4
        return
    assert smart_resize(h, w, 28, *budget) == (h, w) and budget[0] <= w * h <= budget[1]


def test_a_budget_without_a_size_is_refused_at_the_start():
    for narrow in ((785, 1567), (1568, 1567)):
        with pytest.raises(ValueError, match="a multiple of 28 x 28 = 784 pixels between"):
            PromptEncoder(None, "reasoning", *narrow)
    with pytest.raises(ValueError, match="room for an image of 100 x 100 .* widen them"):
        smart_size(100, 100, 784 * 7, 784 * 7)


@pytest.mark.parametrize("size", [(84, 84), (100, 60), (500, 333), (1000, 700), (90, 400)])
def test_the_processor_agrees_on_the_grid(size, tiny_base):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    budget = (56 * 56, 500 * 784)
    PromptEncoder(processor, "spatial_thinker", *budget)  # hands the budget to the processor
    image = Image.effect_noise(size, 90).convert("RGB")
    small = resize(image, *budget)
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    ours = processor.image_processor(images=[small], return_tensors="pt")
    assert ours["image_grid_thw"][0].tolist() == grid == [1, small.size[1] // 14, small.size[0] // 14]


@pytest.mark.parametrize("model_type, cell", [("qwen2_vl", 28), ("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_image_tokens_are_those_of_the_processor(family, model_type, cell, rows, tmp_path):
    """Counted from sizes alone, expanded, and as the processor itself makes them of image and text."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(family(model_type))
    encode = PromptEncoder(processor, "spatial_thinker", 4 * cell**2, 40 * cell**2)
    # 101 x 333 is 3 x 10 cells of 32 (3.2 x 10.4), 4 x 12 of 28 (3.6 x 11.9), of which 40 are too many
    sample = replace(load_samples(write(rows, tmp_path / "x.parquet"))[0], encoded_images=(noise(101, 333),))
    prompt, (w, h) = encode(sample), smart_size(101, 333, 4 * cell**2, 40 * cell**2, cell)
    assert w % cell == h % cell == 0 and (w, h) == prompt.images[0].size
    theirs = processor(text=[encode.text(sample)], images=prompt.images, return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == prompt.ids and len(prompt.ids) == encode.length(sample)
    assert prompt.ids.count(processor.image_token_id) == w * h // cell**2
    assert (
        theirs["pixel_values"].equal(prompt.pixel_values) and prompt.pixel_values.shape[1] == cell**2 * 3 / 2
    )


@pytest.mark.parametrize("template", ["spatial_thinker", "problem"])
def test_the_prompt_states_the_frame_of_boxes_once(template, rows, tmp_path):
    sample = replace(load_samples(write(rows, tmp_path / "x.parquet"))[0], problem="<image>Q.")
    shown = {f: build_prompt(sample, template, f)[0]["content"][1]["text"] for f in ("pixel", "per_mille")}
    assert "1000" not in shown["pixel"]
    assert build_prompt(sample, template) == build_prompt(sample, template, "pixel")
    assert shown["per_mille"].count(PER_MILLE) == 1 and "Image size" not in shown["per_mille"]
    assert (
        PER_MILLE not in build_prompt(sample, "reasoning", "per_mille")[0]["content"][1]["text"]
    )  # no boxes


def test_a_processor_without_images_is_refused(tiny_base):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    with pytest.raises(ValueError, match="Tokenizer.*got none of that kind"):
        PromptEncoder(processor.tokenizer, "spatial_thinker", 784, 784)


# ---- batches ----
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 40))
def test_every_epoch_is_a_permutation(seed, batch_size, n):
    stream = [i for step in range(3 * n) for i in batch_at(seed, step, batch_size, n)]
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_are_a_function_of_seed_and_step():
    assert batch_at(1, 7, 16, 100) == batch_at(1, 7, 16, 100)
    assert batch_at(1, 7, 16, 100) != batch_at(2, 7, 16, 100)
    assert batch_at(1, 0, 100, 100) != batch_at(1, 1, 100, 100)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), max_size=40), st.integers(1, 60))
def test_micro_batches_keep_order_and_budget(sequences, budget):
    prompts = [7, 1, 20, 5]  # tokens of the four prompts
    groups = micro_batches([(key, prompts[key], n) for key, n in sequences], budget)
    assert [i for g in groups for i in g] == list(range(len(sequences)))
    for g in groups:
        runs = [key for key, _ in itertools.groupby(sequences[i][0] for i in g)]  # each pays its prompt once
        assert len(g) == 1 or sum(prompts[k] for k in runs) + sum(sequences[i][1] for i in g) <= budget
