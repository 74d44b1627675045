"""Rows that are not one image and a multiple choice: several images at their marks, text alone, open answers.

Through loading, prompt, processor, what vLLM is sent, packing, reading, an API's request and the page.
"""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bounds import logp_bound
from models import load_plain, plain_logits
from pictures import noise
from transformers import AutoModelForImageTextToText, AutoProcessor

from answers import KINDS, read_box
from apis import Request
from data import NO_IMAGE, PromptEncoder, build_prompt, lay_out, load_samples, report_rows
from packing import pack, token_logps, use_logprob_head, use_packed_attention
from report import draw_scene, show_item
from results import grade, judge
from rewards import score_completion
from testsets import Selection, Source, benchmark_sample, load_items

CHOICE = {"question_with_options": "Which?\n(A) cup\n(B) plate", "options": ["cup", "plate"],
          "answer_option_text_only": "(B) plate"}  # fmt: skip
OPEN = {"question_with_options": "Where?", "options": None}


@pytest.fixture
def load(tmp_path):
    """load(row, ..., **how): the rows, which may name the files 0.png (100 x 50), 1.png and 2.png."""
    for i, size in enumerate([(100, 50), (60, 90), (140, 56)]):
        (tmp_path / f"{i}.png").write_bytes(noise(*size, seed=i)["bytes"])

    def load(*rows, evaluate=False, **how):
        rows = [{"image_id": f"row-{i}", "category": "", "kind": None} | row for i, row in enumerate(rows)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if evaluate:
            return load_items(str(tmp_path / "rows.jsonl"), Selection()).items
        return load_samples(str(tmp_path / "rows.jsonl"), need_scene=False, **how)

    return load


# ---- open answers ----
ANSWERED = [  # kind, answer in the row, the sample's, a right reply, a wrong one
    ("number", 3, "3", "There are three cups.", "4"),
    ("number", "1,200", "1200", "<answer>1200 cm</answer>", "<answer>120</answer>"),
    ("number", 0.5, "0.5", "0.50", "5"),
    ("yes_no", "Yes.", "Yes", "Yes, it is.", "No."),
    ("word", "traffic light", "traffic light", "<answer>a traffic-light</answer>", "<answer>a lamp</answer>"),
    ("sequence", "B, A, C", "BAC", "B, A, C", "A, B, C"),
    ("point", [10, 10, 50, 40], "[[0.1, 0.2], [0.5, 0.2], [0.5, 0.8], [0.1, 0.8]]", "(49, 39)", "(51, 39)"),
    ("point", "[(0, 0), (100, 0), (100, 50)]", "[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]", "(9, 2)", "(2, 4)"),
    ("box", "[10, 10, 50, 40]", "[0.1, 0.2, 0.5, 0.8]", "[10, 10, 30, 40]", "[10, 10, 29, 40]"),  # IoU 0.5
    ("box", [10, 10, 50, 40], "[0.1, 0.2, 0.5, 0.8]", '{"bbox_2d": [12, 10, 50, 38]}', "[1, 2, 5, 8]"),
]  # fmt: skip


@pytest.mark.parametrize("evaluate", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind, answer, gold, right, wrong", ANSWERED)
def test_every_kind_of_answer_has_its_reader(kind, answer, gold, right, wrong, evaluate, load):
    written = json.dumps(answer) if evaluate and not isinstance(answer, str) else answer
    row = OPEN | {"images": "0.png", "kind": kind, "answer_option_text_only": written}
    (sample,) = load(row, evaluate=evaluate)
    assert (sample.kind, sample.answer, sample.options) == (kind, gold, ())
    assert judge(sample, right)["correct"] and not judge(sample, wrong)["correct"]
    assert grade(sample, f"<answer>{wrong}</answer>")["correct"] is False
    assert kind in KINDS and not judge(sample, "")["correct"]


@pytest.mark.parametrize("kind, right", [("point", "(400, 500)"), ("box", "[100, 200, 500, 800]")])
def test_points_and_boxes_are_read_in_the_frame_that_the_prompt_states(kind, right, load):
    row = OPEN | {"images": "0.png", "kind": kind, "answer_option_text_only": [10, 10, 50, 40]}
    plain, own = load(row, row | {"frame": "unit"})
    assert judge(plain, right, box_frame="per_mille")["correct"] and not judge(plain, right)["correct"]
    unit = f"{[c / 1000 for c in json.loads(right.translate(str.maketrans('()', '[]')))]}"
    for box_frame, words in (
        ("pixel", "in pixels of the image"),
        ("per_mille", "in thousandths of the image"),
    ):
        assert judge(own, unit, box_frame=box_frame)["correct"]  # its question says so, whatever the model's
        text = build_prompt(plain, "reasoning", box_frame)[0]["content"][1]["text"]
        assert text.count("\nAnswer with one ") == 1 and words in text
        assert "Answer with" not in build_prompt(own, "reasoning", box_frame)[0]["content"][1]["text"]


@pytest.mark.parametrize("box_format, answer", [
    ("xyxy", [-1, 10, 50, 51]), ("xywh", [-1, 10, 51, 41]), ("norm1", [-0.01, 0.2, 0.5, 1.02]),
    ("norm1000", [-10, 200, 500, 1020]),
])  # fmt: skip
def test_gold_boxes_are_in_the_format_of_the_rows_and_clipped(box_format, answer, load):
    row = OPEN | {"images": "0.png", "kind": "box", "answer_option_text_only": answer}
    sample = load(row, box_format=box_format)[0]
    assert json.loads(sample.answer) == [0, 0.2, 0.5, 1] and json.loads(sample.ground_truth) == [
        0,
        10,
        50,
        50,
    ]


@pytest.mark.parametrize("reply, box", [
    ("[10, 20, 30, 40]", (10, 20, 30, 40)),
    ("The box is (10.5, 20), (30, 40).", (10.5, 20, 30, 40)),
    ("<|box_start|>(10,20),(30,40)<|box_end|>", (10, 20, 30, 40)),
    ("<think>[1, 2, 3, 4]</think><answer>[[10, 20, 30, 40]]</answer>", (10, 20, 30, 40)),
    ("[10, 20, 30, 40] or [1, 2, 3, 4]", "conflict"),
    ("[1, 2, 3, 4, 5]", "none"), ("(1,2),(3,4),(5,6)", "none"), ("[1, 2, 3]", "none"), ("", "empty"),
    ("[30, 20, 10, 40]", "outside"), ("[10, 20, 30, 101]", "outside"), ("[-1, 2, 3, 4]", "outside"),
    ("[" * 65536, "none"), ("1," * 32768, "none"), (None, "empty"),
])  # fmt: skip
def test_a_box_is_four_numbers_and_no_more(reply, box):
    got, method = read_box(reply, "pixel", (100, 100))
    assert method == box if got is None else got == tuple(c / 100 for c in box)


# ---- rows that cannot be used ----
NUMBER = OPEN | {"images": "0.png", "kind": "number", "answer_option_text_only": 3}
ONE = CHOICE | {"images": "0.png"}
BAD = {
    "an image more than marks": (
        ONE | {"images": ["0.png", "1.png"], "question_with_options": "<image>?\n(A) cup\n(B) plate"},
        "column question_with_options: expected 2 <image> marks, one for each image, or none, got 1",
    ),
    "a mark more than images": (
        ONE | {"problem": "<image><image>?"},
        "marks: row row-0 (#0), column problem: expected 1 <image> marks, one for each image, or none, got 2",
    ),
    "a mark without an image": (ONE | {"images": [], "problem": "<image>?"}, "expected an image, of which"),
    "a size without an image": (
        ONE | {"images": None, "problem": "Image size: (9 x 9)"},
        "column images: expected an image, of which column problem speaks, got nothing",
    ),
    "a scene without an image": (
        ONE | {"images": None, "answer_option_text": '<scene>{"objects":[{"id":"a.1","bbox":[0,0,1,1]}]}'},
        "expected an image for the gold scene",
    ),
    "a box without an image": (
        NUMBER | {"images": None, "kind": "box", "answer_option_text_only": [0, 0, 1, 1]},
        "expected an image for an answer of kind box",
    ),
    "an image that is null": (ONE | {"images": ["0.png", None]}, "image: row row-0 (#0), column images"),
    "a video's column": (
        ONE | {"videos": ["a.mp4"]},
        "no video is taken, its frames can be, got one in videos",
    ),
    "a video's mark": (ONE | {"problem": "<video>?"}, "got one in problem"),
    "a video's file": (
        ONE | {"images": "a.MP4"},
        "video: row row-0 (#0), column images: expected images: no v",
    ),
    "a file that is no picture": (
        ONE | {"images": "file:///etc/passwd"},
        "image: row row-0 (#0), column images: expected a readable image, got cannot identify image file",
    ),
    "no kind": (
        NUMBER | {"kind": None},
        "column options: expected a list of 2 to 10 texts, or an open answer",
    ),
    "another kind": (
        NUMBER | {"kind": "colour"},
        "kind: row row-0 (#0), column kind: expected one of ('choice'",
    ),
    "a kind that is a list": (NUMBER | {"kind": ["box"]}, "column kind: expected a text, got"),
    "another frame": (
        NUMBER | {"frame": "metres"},
        "column frame: expected one of ['pixel', 'unit', 'per_mi",
    ),
    "options": (NUMBER | {"options": ["3", "4"]}, "options: expected none, as the answer is a number, got ["),
    "no number": (NUMBER | {"answer_option_text_only": "some"}, "expected a number, got 'some'"),
    "two numbers": (NUMBER | {"answer_option_text_only": "3 or 4"}, "expected a number, got '3 or 4'"),
    "nothing": (NUMBER | {"answer_option_text_only": None}, "expected a number, got None"),
    "true": (NUMBER | {"kind": "word", "answer_option_text_only": True}, "expected a word, got True"),
    "maybe": (NUMBER | {"kind": "yes_no", "answer_option_text_only": "maybe"}, "expected a yes_no"),
    "a token": (NUMBER | {"kind": "word", "answer_option_text_only": "<|im_end|>"}, "no control token"),
    "a lone point": (
        NUMBER | {"kind": "point", "answer_option_text_only": "(3, 4)"},
        "expected [x1, y1, x2, y2] o",
    ),
    "a flat box": (
        NUMBER | {"kind": "box", "answer_option_text_only": [3, 4, 3, 9]},
        "expected [x1, y1, x2, y2], ",
    ),
    "a turned box": (
        NUMBER | {"kind": "box", "answer_option_text_only": [9, 4, 3, 9]},
        "expected x1 < x2 and y1",
    ),
    "a polygon": (NUMBER | {"kind": "box", "answer_option_text_only": [[0, 0], [9, 0], [9, 9]]}, "y2], got"),
    "not a number": (NUMBER | {"kind": "box", "answer_option_text_only": "[0, 0, NaN, 9]"}, "y2], got"),
    "of 1000": (
        NUMBER | {"kind": "box", "answer_option_text_only": [0, 0, 900, 900]},
        "fits the image (100, 50)",
    ),
    "of 1": (NUMBER | {"kind": "box", "answer_option_text_only": [0, 0, 0.5, 1]}, "box_frame: row row-0"),
}
UNFIT = {  # text that no tokeniser or file takes, wherever a row has it
    "question_with_options": ("Where\ud83d?\n(A) cup\n(B) plate", "\\ud83d"),
    "options": (["cup", "plate\udfff"], "\\udfff"),
    "answer_option_text_only": ("(A) cup\ud83d", "\\ud83d"),
    "answer_option_text": ("<scene>{}</scene><|vision_start|>", "<|vision_start|>"),
    "problem": ("\ud83d", "\\ud83d"),
    "category": ("\ud83d", "\\ud83d"),
    "level": ("<|x|>", "<|x|>"),
    "completion": ("<|im_end|>", "<|im_end|>"),
}


@pytest.mark.parametrize("key", UNFIT)
def test_text_that_nothing_takes_is_found_at_once(key, load):
    value, token = UNFIT[key]
    says = f"column {key}: expected no control token of a model and no half of a surrogate pair, got {token}"
    samples = load(ONE | {key: value}, ONE, max_bad_rows=0.5)
    assert len(samples) == 1 and samples.reasons == {"text": 1} and samples.skipped[0].endswith(says)
    with pytest.raises(ValueError) as refused:
        load(ONE | {key: value}, evaluate=True)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_one_line(name, load):
    row, words = BAD[name]
    samples = load(row, ONE, max_bad_rows=0.5)
    assert [s.id for s in samples] == ["row-1"]
    (message,) = samples.skipped
    assert words in message and "\n" not in message and len(message) < 500


def test_a_table_of_videos_says_that_none_is_taken(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHOICE | {"video": "a.mp4"}))
    for read in (partial(load_samples, need_scene=False), partial(load_items, selection=Selection())):
        with pytest.raises(ValueError, match="missing \\['images'.*; no video is taken"):
            read(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("template", ["", "released"])
def test_benchmarks_show_images_first_as_the_papers_evaluator_does(template):
    row = {
        "image": [noise(84, 56), noise(56, 84)],
        "prompt": "Is <image> wider than <image>?",
        "answer": "yes",
    }
    sample = benchmark_sample(row, 0, Source("x/y", "test"), template)
    content = build_prompt(sample, "problem" if template else "reasoning")[0]["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]
    assert "Is  wider than ?" in content[2]["text"]


def test_the_first_line_of_a_run_counts_what_is_unusual(load):
    samples = load(ONE, ONE | {"images": None}, ONE | {"images": ["0.png", "1.png", "2.png"]})
    assert (
        report_rows({"train": samples})
        .splitlines()[0]
        .endswith("3 of 3 rows of " + samples.name + ", 1 without an image, up to 3 images in one")
    )
    assert samples[1].size == NO_IMAGE and samples.max_images == 3


def test_a_kind_and_a_frame_are_part_of_what_a_run_was_trained_on(load):
    row = OPEN | {"images": "0.png", "answer_option_text_only": "3"}
    kinds = [load(row | {"kind": kind}).fingerprint()["fingerprint"] for kind in ("word", "number")]
    point = row | {"kind": "box", "answer_option_text_only": [0, 0, 9, 9]}
    frames = [load(point | {"frame": frame}).fingerprint()["fingerprint"] for frame in (None, "unit")]
    assert len({*kinds, *frames}) == 4


# ---- prompts ----
@pytest.mark.parametrize("text, n, want", [
    ("Which?", 2, [0, 0, "Which?"]),
    ("Which?", 0, ["Which?"]),
    ("<image>Is <image>\n<image>", 3, [0, "Is ", 0, "\n", 0]),
    ("It is <image>", 1, ["It is ", 0]),
    ("It is <image>", 0, ["It is "]),  # --blind
    ("Is <image> or <image>?", 1, "expected 1 <image> marks in the prompt, one for each image, got 2"),
])  # fmt: skip
def test_images_stand_at_their_marks(text, n, want):
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            lay_out(text, n)
        return
    assert [part.get("text", 0) for part in lay_out(text, n)] == want


MIXED = [  # a question and its images, as the text and images stand in the prompt
    ("Is <image> left of <image>?", ["1.png", "0.png"], ["Is ", 0, " left of ", 0, "?"]),
    ("Compare: <image><image>", ["2.png", "1.png"], ["Compare: ", 0, 0, "\nAnswer with"]),  # behind the text
    ("<image>\n<image> Which?", ["0.png", "2.png"], [0, 0, "Which?"]),
    ("Which?", ["0.png", "1.png", "2.png"], [0, 0, 0, "Which?"]),
    ("How many <b>?", None, ["How many <b>?"]),
]  # fmt: skip


def mixed(load):
    """MIXED's rows, with open answers and a choice among them."""
    kinds = [
        ("yes_no", "no"),
        ("word", "cup"),
        ("box", [1, 1, 50, 40]),
        ("point", [1, 1, 9, 9]),
        ("number", 3),
    ]
    rows = [
        OPEN | {"question_with_options": q, "images": i, "kind": kind, "answer_option_text_only": answer}
        for (q, i, _), (kind, answer) in zip(MIXED, kinds, strict=True)
    ]
    return load(*rows, ONE | {"question_with_options": "This:\n<image>\nWhich?\n(A) cup\n(B) plate"})


def test_open_answers_are_counted(load):
    samples = mixed(load)
    assert (len(samples), samples.open_answers, samples.without_image) == (6, 5, 1)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_prompts_are_those_of_the_processors_own_chat_template(model_type, load, family):
    """The ids, and the pixels in their order; what vLLM is sent expands to them at the images' places."""
    processor = AutoProcessor.from_pretrained(family(model_type))
    encoder = PromptEncoder(processor, "spatial_thinker", 1024, 802816)
    samples = mixed(load)
    for sample, (*_, want) in zip(samples, [*MIXED, ("", "", None)], strict=True):
        messages, images = encoder.messages(sample), encoder.images(sample)
        content, at = messages[0]["content"], iter(images)
        if want:  # the instructions come before the first text, the hint behind the last
            assert [0 if part["type"] == "image" else 1 for part in content] == [int(bool(p)) for p in want]
            assert all(p in part["text"] for p, part in zip(want, content, strict=True) if p)
        assert ("Image size:" in str(content)) == bool(images)
        given = [part | {"image": next(at)} if part["type"] == "image" else part for part in content]
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": given}], tokenize=True, return_dict=True, return_tensors="pt",
            add_generation_prompt=True,
        )  # fmt: skip
        prompt, engine = encoder(sample), encoder.for_engine(sample)
        assert theirs["input_ids"][0].tolist() == prompt.ids == engine.ids
        assert len(prompt.ids) == encoder.length(sample)
        assert engine.vllm_ids.count(processor.image_token_id) == len(images) == len(engine.images)
        tokens = iter([i.width * i.height // encoder.cell**2 for i in engine.images])
        image = processor.image_token_id
        assert prompt.ids == [i for t in engine.vllm_ids for i in [t] * (next(tokens) if t == image else 1)]
        if images:
            assert torch.equal(theirs["pixel_values"], prompt.pixel_values)
            assert torch.equal(theirs["image_grid_thw"], prompt.image_grid_thw)
        else:
            assert "pixel_values" not in theirs and prompt.pixel_values is None


def test_an_api_is_sent_images_at_their_places(load):
    sample = mixed(load)[0]
    content = PromptEncoder(None, "no_reasoning", 784, 802816).messages(sample)[0]["content"]
    request = Request(content, "", sample.load_images(), {}, 1e9)
    request.encode(1e9)
    shown = request.parts(lambda media, data: {"type": "image", "data": data})
    assert [part["type"] for part in shown] == ["text", "image", "text", "image", "text"]
    assert [shown[i]["data"] for i in (1, 3)] == [data for _, data in request.encoded]
    assert shown[1] != shown[3] and shown[2] == {"type": "text", "text": " left of "}


# ---- packing ----
def test_log_probs_of_a_mixed_batch_are_those_of_each_row_alone(load, tiny_base):
    encoder = PromptEncoder(AutoProcessor.from_pretrained(tiny_base), "no_reasoning", 784, 802816)
    model = AutoModelForImageTextToText.from_pretrained(tiny_base, dtype=torch.float32)
    use_packed_attention(model)
    use_logprob_head(model, [], 1.0, 64)
    prompts = [encoder(sample) for sample in mixed(load)]
    rng = np.random.default_rng(0)
    batch = [(p, [rng.integers(300, 600, n).tolist() for n in (3, 7)]) for p in prompts]
    with torch.no_grad():
        got, _ = token_logps(model, pack(batch, model))
        plain, want = load_plain(tiny_base), []
        for prompt, completions in batch:
            for completion in completions:
                logps = plain_logits(plain, prompt, completion).log_softmax(-1)
                want.append(logps.gather(1, torch.tensor(completion)[:, None])[:, 0])
    longest = max(len(p.ids) for p in prompts) + 7
    np.testing.assert_allclose(got, torch.cat(want), atol=logp_bound(model.config, longest), rtol=0)
    # the places of the images count: the same tokens and pixels, the image moved, are another prompt
    swapped = replace(mixed(load)[0], question="Is  left of ?<image><image>")
    with torch.no_grad():
        moved, _ = token_logps(model, pack([(encoder(swapped), batch[0][1])], model))
    assert (moved - got[:10]).abs().max() > 10 * logp_bound(model.config, longest)


# ---- reward and page ----
def test_text_alone_has_an_empty_gold_scene_under_the_dense_reward(load, tmp_path):
    load(
        ONE | {"images": None, "answer_option_text": None},
        NUMBER | {"images": [], "answer_option_text": None},
    )
    for sample, answer in zip(load_samples(str(tmp_path / "rows.jsonl")), ("(B) plate", "3"), strict=True):
        scene = '<scene>{"objects": [%s], "relationships": []}</scene>'
        for objects, spatial in (("", 1), ('{"id": "cup.1", "bbox": [0, 0, 1, 1]}', 0)):
            text = f"<observe>.</observe>{scene % objects}<think>.</think><answer>{answer}</answer>"
            score = score_completion(text, sample.ground_truth, sample.size)
            assert (score.format, score.accuracy, score.spatial) == (1, 1, spatial)
        assert grade(sample, text)["terms"]["accuracy"] == 1


def test_the_page_shows_all_images_none_and_places(load):
    samples = mixed(load)
    replies = ["no", "a cup", "[2, 1, 50, 40]", "[2, 2]", "3", "(B) plate"]
    for sample, reply in zip(samples, replies, strict=True):
        record = {"reply": reply, "kind": sample.kind, "box_frame": "pixel"} | grade(sample, reply)
        assert record["correct"]
        shown, article = draw_scene(sample, "data:", [], record), show_item(sample, record, record)
        n = len(sample.encoded_images)
        assert article.count("<svg") == shown.count("<svg") * 2 == 2 * (n > 0)
        assert article.count("<img src=") == max(0, n - 1)
    answered = (2, (0, 0, 1, 1)), (3, (0.5, 0.5))
    gold, said = (draw_scene(samples[i], "", [], {"reply": "", "parsed": p}) for i, p in answered)
    assert '<rect class="gold" x="1" y="1" width="49" height="39"/>' in gold
    assert '<rect class="guess" x="0" y="0" width="100" height="50"/>' in gold
    assert 'points="1,1 9,1 9,9 1,9"' in said and 'cx="50" cy="25"' in said


def test_a_point_is_not_imitated_in_a_frame_that_the_prompt_does_not_state():
    import train_sft

    sample = SimpleNamespace(kind="box", answer="[0.1, 0.2, 0.3, 0.4]", completion="see", ground_truth="")
    with pytest.raises(ValueError, match="expected target=completion where the answer is a box, got answer"):
        train_sft.target_of(sample, SimpleNamespace(target="answer", columns={}, box_frame="pixel"))
