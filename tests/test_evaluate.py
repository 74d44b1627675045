"""evaluate.py: reading replies, grading, figures by hand, and both back ends on the tiny model."""

import doctest
import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from data import load_samples
from evaluate import grade, main, parse_choice, read_choice, read_records, stratified, summarise, wilson

SIDES = ("left of", "right of", "above", "below")
CHAIRS = ("chair", "arm chair", "table", "bed")
NUMBERS = ("3", "13", "4", "1")
YES_NO = ("yes", "no")
CLOSER = ("B is closer", "A is closer")

REPLIES = [
    # letters in every dress
    ("B", SIDES, "B"),
    ("b", SIDES, "B"),
    ("a", SIDES, "A"),
    (" B\n", SIDES, "B"),
    ("B.", SIDES, "B"),
    ("B)", SIDES, "B"),
    ("B:", SIDES, "B"),
    ("(B)", SIDES, "B"),
    ("(b)", SIDES, "B"),
    ("( B )", SIDES, "B"),
    ("[B]", SIDES, "B"),
    ("{B}", SIDES, "B"),
    ("（B）", SIDES, "B"),
    ("**B**", SIDES, "B"),
    ("`B`", SIDES, "B"),
    ('"B"', SIDES, "B"),
    ("$B$", SIDES, "B"),
    ("Option B", SIDES, "B"),
    ("option (b)", SIDES, "B"),
    ("It's (B).", SIDES, "B"),
    # letter and text
    ("(B) right of", SIDES, "B"),
    ("B. right of", SIDES, "B"),
    ("B: right of", SIDES, "B"),
    ("B) right of.", SIDES, "B"),
    ("B right of", SIDES, "B"),
    ("B - right of", SIDES, "B"),
    ("(B) RIGHT OF", SIDES, "B"),
    ("B because it is on the right", SIDES, "B"),
    ("(B) right of, not left of", SIDES, "B"),
    ("B. right of\n\nThe cup is on the far side, well to the right of the plate that we are asked about. "
     "It cannot be anything else in this picture.", SIDES, "B"),
    ("Let me look at it. The cup stands on the far side of the plate. The plate is round and lies in the "
     "middle of a big table.\n\n**(B) right of**", SIDES, "B"),
    # text alone
    ("right of", SIDES, "B"),
    ("Right of.", SIDES, "B"),
    ("It is right of the cup.", SIDES, "B"),
    ("arm chair", CHAIRS, "B"),
    ("The arm chair.", CHAIRS, "B"),
    ("the chair", CHAIRS, "A"),
    ("It is at the top left.", ("top", "top left"), "B"),
    ("armchair", CHAIRS, None),
    ("chairs", CHAIRS, None),
    ("13", NUMBERS, "B"),
    ("There are 13 cups", NUMBERS, "B"),
    ("three", NUMBERS, "A"),
    ("There are three cups.", NUMBERS, "A"),
    ("3.5", NUMBERS, None),
    ("-3", NUMBERS, None),
    ("103", NUMBERS, None),
    ("yes", YES_NO, "A"),
    ("No.", YES_NO, "B"),
    ("No, there is no cup.", YES_NO, "B"),
    ("Yes, there is no doubt.", YES_NO, "A"),
    ("No cup is there.", YES_NO, "B"),
    ("yes or no", YES_NO, None),
    ("No idea.", YES_NO, None),
    ("I have no idea.", YES_NO, None),
    ("There is no cup.", YES_NO, "B"),
    ("A is closer", CLOSER, "B"),
    ("B is closer.", CLOSER, "A"),
    ("(B) A is closer", CLOSER, "B"),
    # answer blocks
    ("<answer>B</answer>", SIDES, "B"),
    ("<answer> (B) right of </answer>", SIDES, "B"),
    ("<think>left of?</think> <answer>\n(B) right of\n</answer>", SIDES, "B"),
    ("<answer>(A) left of</answer> No: <answer>(B) right of</answer>", SIDES, "B"),
    ("<think>maybe <answer>A</answer></think><answer>B</answer>", SIDES, "B"),
    ("<think>never closed <answer>(B)</answer>", SIDES, "B"),
    ("<answer>(B) right of", SIDES, "B"),
    ("<answer>right of</answer>", SIDES, "B"),
    ("<answer>The answer is B.</answer>", SIDES, "B"),
    ("<answer>\\boxed{B}</answer>", SIDES, "B"),
    ("<answer>(B) right of</answer>\nFinal Answer: (B)", SIDES, "B"),
    ("<answer>(B) right of</answer>\nFinal Answer: (C)", SIDES, None),
    ("<answer>(B) left of</answer>", SIDES, None),
    ("<answer>(A) or (B)</answer>", SIDES, None),
    ("<answer>(E) beside</answer>", SIDES, None),
    ("<answer>I do not know</answer> (B)", SIDES, None),
    # boxes and phrases
    ("\\boxed{B}", SIDES, "B"),
    ("So it is $\\boxed{\\text{B}}$.", SIDES, "B"),
    ("\\boxed{(B) right of}", SIDES, "B"),
    ("\\boxed{A}? No, \\boxed{B}", SIDES, "B"),
    ("The answer is B", SIDES, "B"),
    ("The answer is (B) right of.", SIDES, "B"),
    ("The answer is: B.", SIDES, "B"),
    ("the correct answer is option B", SIDES, "B"),
    ("Answer: b", SIDES, "B"),
    ("**Answer:** B", SIDES, "B"),
    ("### Answer\n(B)", SIDES, "B"),
    ("The answer is right of.", SIDES, "B"),
    ("The answer is arm chair", CHAIRS, "B"),
    ("The answer is a chair", CHAIRS, "A"),
    ("The correct option is B", SIDES, "B"),
    ("I would choose (C).", SIDES, "C"),
    ("I'd go with B", SIDES, "B"),
    ("Option B is correct.", SIDES, "B"),
    ("(B) is the right answer", SIDES, "B"),
    ("答案是B", SIDES, "B"),
    ("Final answer: B. At first I thought the answer is A.", SIDES, "B"),
    ("The answer is not B.", SIDES, None),
    ("The answer is either A or B.", SIDES, None),
    ("The answer is A. No, wait: the answer is B.", SIDES, None),
    ("Option B is not correct.", SIDES, None),
    # nothing to read
    ("", SIDES, None),
    ("   ", SIDES, None),
    ("I cannot tell.", SIDES, None),
    ("A cup is on the table.", SIDES, None),
    ("A red cup", CHAIRS, None),
    ("It is not right of the cup.", SIDES, None),
    ("It is left of the cup and above the plate", SIDES, None),
    ("A and B", SIDES, None),
    ("A, B", SIDES, None),
    ("A/B", SIDES, None),
    ("(A) left of (B) right of", SIDES, None),
    ("A. left of\nB. right of\nC. above\nD. below", SIDES, None),
    ("E", SIDES, None),
    ("(A) right of", SIDES, None),
    ("B. above", SIDES, None),
    ("<think>The answer is B, since", SIDES, None),
    ("<observe>a cup</observe><scene>{}</scene><think>The cup is right of", SIDES, None),
    ("<think>The answer is B.</think>", SIDES, None),
    ("To see where the cup is we look at the plate first, which lies in the middle of the table. The cup "
     "stands on its far side, so that we may say that it is right of", SIDES, None),
    ("Error: rate limit", SIDES, None),
]  # fmt: skip


# ---- reading ----
@pytest.mark.parametrize("reply, choices, letter", REPLIES, ids=[repr(r[0][:40]) for r in REPLIES])
def test_reply(reply, choices, letter):
    assert parse_choice(reply, choices) == letter


@pytest.mark.parametrize(
    "reply, how",
    [
        ("<answer>B</answer>", ("B", "answer_tag")),
        ("\\boxed{B}", ("B", "boxed")),
        ("answer: B", ("B", "phrase")),
        ("B", ("B", "letter")),
        ("right of", ("B", "text")),
        ("", (None, "empty")),
        ("hm", (None, "none")),
        ("A or B", (None, "conflict")),
        ("E", (None, "outside")),
    ],
)
def test_the_method_is_told(reply, how):
    assert read_choice(reply, SIDES) == how


STYLES = (
    "{x}", "({x})", "{x}.", "**{x}**", "({x}) {t}", "{x}. {t}", "{t}", "The answer is ({x}) {t}.",
    "Answer: {x}", "<think>so {w}</think><answer>({x}) {t}</answer>", "\\boxed{{{x}}}",
)  # fmt: skip


@settings(deadline=None)
@given(st.permutations(SIDES), st.integers(0, 3), st.integers(0, 3), st.sampled_from(STYLES))
def test_style_and_order_do_not_change_the_grade(choices, right, other, style):
    reply = style.format(x="ABCD"[right], t=choices[right], w=choices[other])
    assert parse_choice(reply, choices) == "ABCD"[right]


@settings(deadline=None)
@given(st.text(st.sampled_from("AB()[]{}<>/\\. \nanswerboxedthink是"), max_size=300))
def test_any_text_reads_as_a_letter_of_the_options_or_none(text):
    assert parse_choice(text, SIDES) in (None, "A", "B", "C", "D")


LONG = ("final ", "\\boxed{", "answer is ", "(", "<answer>", "no ", "B ", " ", "\n", "(B) or ", "answer: B\n")


@pytest.mark.parametrize("text", [piece * (100_000 // len(piece)) for piece in LONG], ids=map(repr, LONG))
def test_long_replies_cost_bounded_time(text):
    started = time.process_time()
    parse_choice(text, SIDES)
    assert time.process_time() - started < 1.0


def test_repeated_options_are_no_answer_by_text():
    assert parse_choice("cup", ["cup", "cup"]) is None
    assert parse_choice("B", ["cup", "cup"]) == "B"


def test_choices_are_checked():
    with pytest.raises(ValueError, match="expected 2 to 10 options, got 1"):
        parse_choice("A", ["cup"])


def test_doctests():
    assert doctest.testmod(evaluate).failed == 0


# ---- grading ----
@pytest.fixture(scope="module")
def sample(tiny_data):
    """Two gold objects; one relationship; the answer is (B) right."""
    drawn = load_samples(str(tiny_data / "val.parquet"), "val")[0]
    objects = [{"id": "cup.1", "bbox": [0, 0, 20, 20]}, {"id": "plate.1", "bbox": [40, 40, 80, 80]}]
    relationships = [{"subject": "cup.1", "predicate": "on", "object": "plate.1"}]
    scene = {"objects": objects, "relationships": relationships}
    gold = f"<scene>{json.dumps(scene)}</scene>\n<answer>(B) right</answer>"
    return replace(drawn, size=(100, 100), options=("left", "right"), answer="(B) right", ground_truth=gold)


def reply_of(boxes, answer="(B) right"):
    objects = [{"id": label, "bbox": box} for label, box in boxes.items()]
    scene = json.dumps({"objects": objects, "relationships": []})
    return f"<observe>o</observe><scene>{scene}</scene><think>t</think><answer>{answer}</answer>"


def test_grade_by_hand(sample):
    # The cup is exact (IoU 1), the plate shifted by half its width: 20 * 40 / (2 * 1600 - 800) = 1/3.
    got = grade(sample, reply_of({"cup.1": [0, 0, 20, 20], "plate.1": [60, 40, 100, 80]}))
    assert (got["parsed"], got["method"], got["correct"], got["reason"]) == ("B", "answer_tag", True, None)
    assert got["terms"]["format"] == 1 and got["terms"]["accuracy"] == 1
    assert got["terms"]["count"] == pytest.approx(0.7)  # no relationship predicted
    assert [m[:2] for m in got["matches"]] == [[0, 0], [1, 1]]
    assert got["mean_iou"] == pytest.approx((1 + 1 / 3) / 2, abs=1e-4)
    # CIoU of the plate: 1/3 less centre distance^2 20^2 over hull diagonal^2 60^2 + 40^2; equal aspects
    assert got["mean_ciou"] == pytest.approx((1 + 1 / 3 - 400 / 5200) / 2, abs=1e-4)
    assert (got["recall50"], got["gold_objects"]) == (0.5, 2)


def test_grade_of_a_refused_reply(sample):
    got = grade(sample, "(B) right")
    assert got["correct"] and got["terms"] == dict.fromkeys(got["terms"], 0.0)
    assert (got["reason"], got["matches"], got["mean_iou"], got["recall50"]) == ("missing_tag", [], None, 0.0)


def test_grade_without_a_scene(sample):
    got = grade(replace(sample, ground_truth="(B) right"), "A")
    assert got == {"parsed": "A", "method": "letter", "correct": False}


def test_wilson_equals_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 10), (8, 10), (10, 10), (357, 692)):
        interval = binomtest(k, n).proportion_ci(0.95, "wilson")
        assert wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert wilson(0, 0) == (0, 1)


def test_summary_by_hand(sample):
    exact = {"cup.1": [0, 0, 20, 20], "plate.1": [40, 40, 80, 80]}
    replies = [
        ("x", reply_of(exact), "stop"),
        ("x", reply_of({"cup.1": [0, 0, 20, 20]}, "(A) left"), "stop"),
        ("y", "(B) right", "stop"),
        ("y", reply_of(exact)[:-26], "length"),
        ("y", "", "failed"),
    ]
    records = [{"category": c, "finish_reason": why, **grade(sample, reply)} for c, reply, why in replies]
    got = summarise(records)
    assert (got["n"], got["correct"], got["accuracy"]) == (5, 2, 0.4)
    assert (got["unparsed"], got["truncated"], got["failed"]) == (2, 1, 1)
    assert got["ci95"] == list(wilson(2, 5))
    assert {c: (t["n"], t["correct"]) for c, t in got["categories"].items()} == {"x": (2, 1), "y": (3, 1)}
    assert (got["scenes"], got["format"], got["exact"]) == (5, 0.4, 0.2)
    # count: 0.7 for the first; 0.7 * (1 - 1/2) for the second
    assert got["count"] == pytest.approx((0.7 + 0.35) / 5)
    assert got["reward"] == pytest.approx((0.1 + 0.2 * 0.7 + 0.5 + 0.2 + 0.1 + 0.2 * 0.35) / 5, abs=1e-5)
    assert got["mean_iou"] == pytest.approx(1, abs=1e-4)  # three pairs, all exact
    assert got["recall50"] == 3 / 10  # of all gold objects, those of refused replies too
    assert got["reasons"] == {"missing_tag": 3}
    assert got["methods"] == {"answer_tag": 2, "letter": 1, "none": 1, "empty": 1}
    floats = [value for value in got.values() if isinstance(value, float)]
    assert all(map(math.isfinite, floats))


def test_summary_of_nothing_matched(sample):
    got = summarise([grade(sample, "B")])
    assert (got["mean_iou"], got["recall50"], got["accuracy"]) == (0.0, 0.0, 1.0)
    assert "scenes" not in summarise([grade(replace(sample, ground_truth="(B) right"), "B")])


# ---- items ----
def test_stratified_keeps_the_shares_and_the_seed():
    categories = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    chosen = stratified(categories, 20, seed=1)
    assert [sum(categories[i] == c for i in chosen) for c in "abc"] == [12, 6, 2]
    assert chosen == sorted(set(chosen)) == stratified(categories, 20, seed=1)
    assert chosen != stratified(categories, 20, seed=2)
    assert len(stratified(categories, 7, seed=0)) == 7  # shares 4.2, 2.1, 0.7


def test_import_is_light():
    code = "import sys, evaluate; print({'torch', 'vllm', 'transformers', 'datasets'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- the whole program ----
def flags(tiny_base, tiny_data, out):
    data, pixels = str(tiny_data / "val.parquet"), ["--min_pixels", "784", "--max_pixels", "802816"]
    return ["--dataset", data, "--model_path", str(tiny_base), *pixels, "--out", str(out)]


def run_main(tiny_base, tiny_data, out, *extra):
    main([*flags(tiny_base, tiny_data, out), "--provider", "hf", "--max_new_tokens", "12", *extra])


def test_records_and_summary_on_disk(tiny_base, tiny_data, tmp_path, capsys):
    run_main(tiny_base, tiny_data, tmp_path, "--custom_filename", "mine", "--limit", "9")
    header, records = read_records(tmp_path / "mine.jsonl")
    assert header["config"]["provider"] == "hf" and header["config"]["limit"] == 9
    assert header["data"]["n"] == len(records) == 9 and len(header["data"]["fingerprint"]) == 16
    assert "transformers" in header["versions"]
    samples = load_samples(str(tiny_data / "val.parquet"), "val")
    for r in records:
        assert (r["id"], r["gold"]) == (samples[r["row"]].id, samples[r["row"]].answer)
        assert r["finish_reason"] in ("stop", "length") and 1 <= r["n_tokens"] <= 12
        graded = json.loads(json.dumps(grade(samples[r["row"]], r["reply"])))
        assert graded == {key: r[key] for key in graded}
    summary = json.loads((tmp_path / "mine.summary.json").read_text())
    assert summary == json.loads(json.dumps(summarise(records)))
    assert "95 % interval" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "mine.summary.json"]


def test_batch_size_does_not_change_replies(tiny_base, tiny_data, tmp_path):
    for size in ("1", "7"):
        options = ["--limit", "8", "--batch_size", size, "--custom_filename", size]
        run_main(tiny_base, tiny_data, tmp_path, *options)
    one, seven = (read_records(tmp_path / f"{size}.jsonl")[1] for size in ("1", "7"))
    assert [r["reply"] for r in one] == [r["reply"] for r in seven]
    assert [r["n_tokens"] for r in one] == [r["n_tokens"] for r in seven]


def test_batches_mark_padding_and_image_tokens(tiny_base, tiny_data, tmp_path, monkeypatch):
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    seen, generate = [], Qwen2_5_VLForConditionalGeneration.generate
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate",
                        lambda self, **batch: seen.append(batch) or generate(self, **batch))  # fmt: skip
    run_main(tiny_base, tiny_data, tmp_path, "--batch_size", "24")
    tokenizer = AutoProcessor.from_pretrained(tiny_base).tokenizer
    ids, mask = seen[0]["input_ids"], seen[0]["attention_mask"]
    assert (mask == (ids != tokenizer.pad_token_id)).all() and (mask == 0).any() and mask[:, -1].all()
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (seen[0]["mm_token_type_ids"] == (ids == image_token)).all()
    assert (ids == image_token).sum() == 24 * 9


def test_a_prompt_beyond_the_context_fails_and_is_counted(tiny_base, tiny_data, tmp_path):
    with pytest.raises(SystemExit, match="2 items failed"):
        options = ["--min_pixels", "802816", "--limit", "2", "--custom_filename", "x"]
        run_main(tiny_base, tiny_data, tmp_path, *options)
    records = read_records(tmp_path / "x.jsonl")[1]
    assert {r["finish_reason"] for r in records} == {"failed"} and summarise(records)["failed"] == 2


@pytest.mark.slow
def test_vllm_and_hf_give_the_same_greedy_replies(tiny_base, tiny_data, tmp_path):
    pytest.importorskip("vllm")
    script = [sys.executable, evaluate.__file__]
    command = [*script, *flags(tiny_base, tiny_data, tmp_path), "--max_new_tokens", "40"]
    for provider in ("vllm", "hf"):  # a process each: vLLM sets the threads of the whole process
        subprocess.run([*command, "--provider", provider, "--custom_filename", provider], check=True)
    ours, theirs = (read_records(tmp_path / f"{p}.jsonl")[1] for p in ("vllm", "hf"))
    assert [r["reply"] for r in ours] == [r["reply"] for r in theirs]
    assert [r["n_tokens"] for r in ours] == [r["n_tokens"] for r in theirs]


@pytest.mark.slow
def test_vllm_samples_more_than_one_prefill_holds(tiny_base, tiny_data, tmp_path):
    """24 prompts of 280 tokens: more than one prefill takes, where a CPU generator once had to be rewound."""
    pytest.importorskip("vllm")
    script = [sys.executable, evaluate.__file__]
    command = [*script, *flags(tiny_base, tiny_data, tmp_path), "--max_new_tokens", "6", "--temperature", "1",
               "--provider", "vllm", "--min_pixels", str(250 * 28 * 28)]  # fmt: skip
    subprocess.run([*command, "--seed", "1", "--custom_filename", "sampled"], check=True)
    replies = [r["reply"] for r in read_records(tmp_path / "sampled.jsonl")[1]]
    assert len(replies) == 24 and len(set(replies)) > 12
