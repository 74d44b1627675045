"""Loading, checking, prompting, resizing, packing and ordering, on rows in STVQA-7K's own format."""

import dataclasses
import io
import itertools
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image

from data import (
    PromptCache,
    PromptEncoder,
    batch_at,
    build_prompt,
    build_prompt_text,
    load_samples,
    resize,
    smart_size,
)
from packing import micro_batches
from synthesize import answer_slots, draw_question, render, stvqa_features, stvqa_row


@pytest.fixture(scope="module")
def rows():
    import random

    rng, slots = random.Random(0), answer_slots()
    made = []
    for i in range(6):
        shapes, question = draw_question(rng, slots)
        made.append(stvqa_row(f"row-{i}", render(shapes), question))
    return made


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
BAD = {
    "scene": (
        lambda r: r | {"answer_option_text": "<scene>{</scene>\n<answer>(A) x</answer>"},
        "column answer_option_text",
    ),
    "outside": (lambda r: with_scene(r, [0, 0, 90, 20]), "boxes inside the image"),
    "other answer": (lambda r: with_scene(r, [0, 0, 9, 9], "(A) nonsense"), "answer_option_text"),
    "answer": (
        lambda r: r | {"answer_option_text_only": "(D) a cat"},
        "answer_option_text_only: expected one of",
    ),
    "options": (lambda r: r | {"options": []}, "column options: expected a list of 2 to 10 options"),
    "many options": (lambda r: r | {"options": list("abcdefghijk")}, "a list of 2 to 10 options"),
    "no text in options": (lambda r: r | {"options": ["a", None]}, "a list of 2 to 10 options"),
    "question": (lambda r: r | {"question_with_options": "  "}, "column question_with_options"),
    "image": (lambda r: r | {"images": {"bytes": b"not an image", "path": None}}, "column images"),
    "size": (lambda r: r | {"problem": r["problem"].replace("84 x 84", "48 x 84")}, "column problem"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_skipped_and_listed(name, rows, tmp_path):
    break_row, message = BAD[name]
    path = write([rows[0], break_row(rows[1]), *rows[2:]], tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message) as error:
        load_samples(path)
    assert "row row-1 (#1)" in str(error.value)
    samples = load_samples(path, skip_bad_rows=True)
    assert [s.id for s in samples] == [f"row-{i}" for i in (0, 2, 3, 4, 5)]
    assert len(samples.skipped) == 1 and "row-1" in samples.skipped[0]


def test_a_pixel_of_overhang_is_clipped_and_counted(rows, tmp_path):
    path = write([with_scene(rows[0], [-1, 2, 20, 85]), *rows[1:]], tmp_path / "x.parquet")
    samples = load_samples(path)
    assert samples.clipped == 1
    assert '"bbox": [0, 2, 20, 84]' in samples[0].ground_truth
    assert samples[1].ground_truth == rows[1]["answer_option_text"]


def test_only_bad_rows_is_an_error(rows, tmp_path):
    path = write([rows[0] | {"options": []}], tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no usable rows"):
        load_samples(path, skip_bad_rows=True)


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
    kept = load_samples(path, prompt_length=encode.length, max_prompt_length=limit, skip_long_prompts=True)
    assert len(kept) == sum(n <= limit for n in lengths) and len(kept.skipped) == 6 - len(kept)


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


def test_a_processor_of_another_lattice_is_refused(tiny_base):
    from transformers import AutoProcessor, Qwen2VLImageProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    processor.image_processor = Qwen2VLImageProcessor(patch_size=16)
    with pytest.raises(ValueError, match="with image tokens of 28 x 28 pixels, got 32 x 32"):
        PromptEncoder(processor, "spatial_thinker", 784, 784)
    with pytest.raises(ValueError, match="Tokenizer.*got none of that kind"):  # of a model without images
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


# ---- the tiny set ----
def test_tiny_set_is_balanced_exact_and_deterministic():
    from synthesize import CATEGORY_SHARE, COLUMNS
    from synthesize import rows as make_rows

    taken = set()
    val = make_rows(64, 0, "val", taken)
    train = make_rows(600, 0, "train", taken)
    assert val == make_rows(64, 0, "val", set())
    assert len(taken) == 664
    assert not {r["images"]["bytes"] for r in val} & {r["images"]["bytes"] for r in train}
    assert set(train[0]) == set(COLUMNS)
    assert set(Counter(r["category"] for r in train)) == set(CATEGORY_SHARE)
    for n in (2, 3, 4):  # exactly balanced over the letters
        letters = Counter(r["answer_only"] for r in train if len(r["options"]) == n)
        assert len(letters) == n and max(letters.values()) - min(letters.values()) <= 1
    for r in train:
        assert r["options"]["ABCD".index(r["answer_only"])] == r["answer_text_only"]
        assert len(set(r["options"])) == len(r["options"])


def test_worked_examples_are_well_formed_and_careful_ones_perfect():
    import random

    from rewards import spatial_reward
    from synthesize import POSITIONS, worked_example

    rng, slots, right = random.Random(5), answer_slots(), []
    for _ in range(400):
        shapes, q = draw_question(rng, slots)
        truth = stvqa_row("x", render(shapes), q)["answer_option_text"]
        careful, hasty = worked_example(q), worked_example(q, hasty=True)
        # CIoU's denominators hold 1e-7 more than areas of (12 / 84)^2 and up
        assert spatial_reward(careful, truth, (84, 84))["reward"] == pytest.approx(1, abs=1e-5)
        score = spatial_reward(hasty, truth, (84, 84))
        assert score["format"] == 1 and score["count"] == 1 and score["spatial"] < 0.95
        assert f"{POSITIONS[q.shapes[0].cell]} {q.shapes[0].name}" in careful.split("</observe>")[0]
        assert all(f"(A) {q.options[0]}" in text for text in (careful, hasty))
        right.append(score["accuracy"])
    # 2 to 4 options; three standard deviations of a mean of 400 (and the seed is fixed)
    assert np.mean(right) == pytest.approx(np.mean([1 / 3, 1 / 2, 1 / 4]), abs=3 * 0.5 / 20)


def test_gold_boxes_are_where_the_paint_is():
    import random

    from synthesize import COLORS

    rng = random.Random(3)
    for _ in range(20):
        shapes, _ = draw_question(rng, answer_slots())
        pixels = np.array(render(shapes)).astype(int)
        for s in shapes:
            x1, y1, x2, y2 = s.box
            painted = (pixels == COLORS[s.color]).all(-1)
            mine = painted[y1:y2, x1:x2]
            sides = (mine[0], mine[-1], mine[:, 0], mine[:, -1])
            assert all(side.any() for side in sides)
