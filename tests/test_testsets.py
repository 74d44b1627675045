"""testsets.py: every benchmark's rows read rightly, items drawn and reordered, the paper's figures."""

import json

import fixtures
import pytest
from hypothesis import given
from hypothesis import strategies as st

import testsets
from answers import LETTERS
from images import open_image, to_rgb
from results import grade
from testsets import (
    DATASETS,
    PAPER,
    Selection,
    benchmark_sample,
    find_options,
    gold_letter,
    kind_of,
    load_items,
    paper_figure,
    permuted,
    stratified,
)


def load(name, folder, **selection):
    return load_items(name, Selection(local_path=str(folder), **selection))


def by_name(name, folder):
    return list(load(name, folder).items)


# ---- rows ----
def test_all_names_of_the_paper_are_there():
    named = (
        "cv-bench, cv-bench-2D, cv-bench-3D, blink-spatial, blink-depth, blink-object, blink-counting, "
        "blink-multi-view, blink-jigsaw, realworld_qa, spatialbench, mmvp, 3dsrbench, 3dsrbench_full, lego, "
        "spatialreasoner, robospatial, robospatial_rgb, robospatial_home, stvqa, hallusionbench, "
        "vstarbench, mmstar"
    )
    assert list(DATASETS) == named.split(", ") == list(fixtures.TABLES)


@pytest.mark.parametrize("name", DATASETS)
def test_rows_become_items_and_right_replies_are_right(name, folder):
    items = by_name(name, folder)
    assert items and len({item.id for item in items}) == len(items)
    for item in items:
        assert item.encoded_images and all(open_image(e).size for e in item.encoded_images)
        assert item.size == open_image(item.encoded_images[0]).size
        assert grade(item, fixtures.right_reply(item))["correct"]
        assert not grade(item, "I cannot tell.")["correct"]
        if item.kind == "choice":
            shown = [item.question[start:end] for start, end in find_options(item.question)]
            assert testsets.same_texts(shown, item.options)
        assert "nothing else" not in item.question and "directly" not in item.question


KINDS = {
    "realworld_qa": ["choice", "number", "yes_no", "word"],
    "lego": ["choice", "choice", "sequence"],
    "hallusionbench": ["yes_no"] * 8,
    "robospatial": ["yes_no"] * 4,
    "spatialbench": ["yes_no"] * 12 + ["word", "choice", "number", "number"],
}


@pytest.mark.parametrize("name", KINDS)
def test_how_an_answer_is_graded_follows_from_the_row(name, folder):
    assert [item.kind for item in by_name(name, folder)] == KINDS[name]


def test_parts_images_and_gold(folder):
    assert [len(by_name(name, folder)) for name in ("cv-bench", "cv-bench-2D", "cv-bench-3D")] == [6, 4, 2]
    images = {
        name: len(by_name(name, folder)[0].encoded_images)
        for name in (
            "blink-depth",
            "blink-multi-view",
            "blink-jigsaw",
            "robospatial",
            "robospatial_rgb",
            "lego",
        )
    }
    assert list(images.values()) == [1, 2, 3, 2, 1, 2]
    jigsaw = by_name("blink-jigsaw", folder)[1]
    in_order = [fixtures.png(10 + k) for k in (1, 2, 3)]
    assert [e["bytes"] for e in jigsaw.encoded_images] == in_order
    assert jigsaw.question.startswith("Look at the picture.")  # the prompt, which says more than the question
    assert [item.answer for item in by_name("hallusionbench", folder)][:4] == ["yes", "yes", "no", "no"]
    assert by_name("mmvp", folder)[1].answer == "(B) Closed"
    assert by_name("spatialreasoner", folder)[1].answer == "(B) arm chair"  # gold written as text
    assert by_name("spatialbench", folder)[0].question.endswith("\nAnswer with yes or no.")
    assert by_name("mmstar", folder)[0].options == ("a cup", "a plate", "a lamp", "a chair")


def test_upstream_schemas_are_read_as_well(tmp_path):
    fixtures.write_3dsrbench_upstream(tmp_path / "3dsrbench.tsv")
    items = load("3dsrbench", tmp_path / "3dsrbench.tsv").items
    assert [item.answer for item in items][:2] == ["(A) lamp", "(B) lamp"]
    assert items[0].options == ("lamp", "chair")
    assert items[2].meta == {"qid": "AAAA-flip-0"} and items[0].category == "height"
    fixtures.write(tmp_path / "robospatial.parquet", *fixtures.robospatial_home())
    yes, point = load("robospatial", tmp_path).items
    assert (yes.kind, point.kind, point.meta["frame"]) == ("yes_no", "point", "unit")
    assert grade(point, "[(0.2, 0.3)]")["correct"] and not grade(point, "(0.9, 0.9)")["correct"]
    upstream = {
        "Question": fixtures.TEXT,
        "Options": fixtures.TEXT,
        "Correct Answer": fixtures.TEXT,
        "image": fixtures.IMAGE,
    }
    fixtures.write(
        tmp_path / "mmvp.parquet",
        upstream,
        [
            {
                "Question": "Is it open?",
                "Options": "(a) Open (b) Closed",
                "Correct Answer": "(b)",
                "image": fixtures.image(1),
            }
        ],
    )
    item = load("mmvp", tmp_path).items[0]
    assert (item.options, item.answer) == (("Open", "Closed"), "(B) Closed")


@pytest.mark.parametrize(
    "question, asked",
    [
        ("How many?\nPlease answer directly with a single word or number.", "How many?"),
        ("How many? Answer with the letter.", "How many?"),
        ("Answer with a single word: what colour is it?", "Answer with a single word: what colour is it?"),
        ("Please answer with one word. Left or right?", "Please answer with one word. Left or right?"),
        ("Answer with a number.", "Answer with a number."),
    ],
)
def test_only_a_closing_instruction_is_taken_off(question, asked):
    row = {"image": fixtures.image(1), "question": question, "answer": "3"}
    assert benchmark_sample(row, 0, DATASETS["realworld_qa"].sources[0]).question.startswith(asked)


def test_pairs_that_ask_different_things_have_no_score(tmp_path, capsys):
    features, rows = fixtures.mmvp()
    rows[1]["text"] = rows[1]["text"].replace("door", "window")
    fixtures.write(tmp_path / "mmvp.parquet", features, rows)
    records = fixtures.records_of("mmvp", tmp_path, lambda i, s: True)
    assert DATASETS["mmvp"].official(records) == {} and "ask different things" in capsys.readouterr().out


def test_bad_rows_can_be_left_out(tmp_path, capsys):
    features, rows = fixtures.mmstar()
    rows[2]["answer"] = "E"
    fixtures.write(tmp_path / "mmstar.parquet", features, rows)
    with pytest.raises(ValueError, match="--skip_bad_rows leaves it out"):
        load("mmstar", tmp_path)
    loaded = load("mmstar", tmp_path, skip_bad_rows=True)
    assert (len(loaded.items), loaded.skipped) == (3, 1) and "row #2" in capsys.readouterr().out


def test_a_folder_of_another_benchmark_is_not_read(tmp_path):
    (tmp_path / "cv-bench-data").mkdir()
    fixtures.write(tmp_path / "cv-bench-data" / "test-0.parquet", *fixtures.cv_bench())
    with pytest.raises(ValueError, match="realworld_qa cannot be read"):
        load("realworld_qa", tmp_path)
    (tmp_path / "Counting").mkdir()
    fixtures.write(tmp_path / "Counting" / "val-0.parquet", *fixtures.blink("Counting"))
    assert load("blink-counting", tmp_path).items[0].options == ("0", "3", "2", "1")


def test_split_unions_raw_bytes_and_numpys_lists(tmp_path):
    (tmp_path / "robospatial").mkdir()
    features, rows = fixtures.robospatial_home()
    parts = "compatibility", "configuration", "context"
    for name, row in zip(parts, [rows[0], *rows], strict=True):
        fixtures.write(tmp_path / "robospatial" / f"{name}-0.parquet", features, [row])
    assert [item.kind for item in load("robospatial", tmp_path).items] == ["yes_no", "yes_no", "point"]
    _, rows = fixtures.mmstar()
    raw = [{k: v for k, v in r.items() if k != "meta_info"} | {"image": r["image"]["bytes"]} for r in rows]
    fixtures.Dataset.from_list(raw).to_parquet(str(tmp_path / "mmstar.parquet"))
    assert load("mmstar", tmp_path).items[0].size == (84, 56)
    row = fixtures.spatialreasoner()[1][0] | {"choices": "['lamp' 'arm chair']"}
    assert benchmark_sample(row, 0, DATASETS["spatialreasoner"].sources[0]).options == ("lamp", "arm chair")


def test_depth_of_16_bits_is_seen():
    from PIL import Image

    depth = Image.fromarray(fixtures.np.linspace(500, 4000, 64, dtype=fixtures.np.uint16).reshape(8, 8))
    seen = fixtures.np.asarray(to_rgb(depth))
    assert seen.min() == 0 and seen.max() == 255 and len(fixtures.np.unique(seen)) > 40


# ---- schemas as they are published ----
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("none", ["", "nan", "NaN"])
def test_3dsrbench_plain_and_circular(plain, none, tmp_path, capsys):
    fixtures.write_3dsrbench_upstream(tmp_path / "3dsr.tsv", plain, none)
    items = load("3dsrbench", tmp_path / "3dsr.tsv").items
    assert [item.answer for item in items][:2] == ["(A) lamp", "(B) lamp"]
    assert {item.options for item in items} == {("lamp", "chair"), ("chair", "lamp")}
    assert items[0].question == "Which is higher?\n(A) lamp\n(B) chair"
    assert ("qid" in items[0].meta) is not plain
    assert ("left out of rows #0 CD, #1 CD" in capsys.readouterr().out) is bool(none)


@pytest.mark.parametrize(
    "question, answer, options, gold, gone",
    [
        ("Which? Options: A: cup, B: lamp, C: nan, D: nan", "B", ("cup", "lamp"), "(B) lamp", "CD"),
        ("Which?\nA: nan, B: cup, C: lamp, D: nan", "C", ("cup", "lamp"), "(B) lamp", "AD"),
        ("Which?\n(A) cup\n(B) nan\n(C) lamp\nTake one.", "C", ("cup", "lamp"), "(B) lamp", "B"),
        ("Which? A: cup, B: nanny, C: banana", "B", ("cup", "nanny", "banana"), "(B) nanny", None),
        ("Which? A: cup, B: nan, C: lamp", "B", None, "expected an answer, got 'nan'", None),
        ("Which? A: cup, B: nan, C: nan, D: nan", "A", None, "expected two options", None),
    ],
)
def test_options_that_are_nan(question, answer, options, gold, gone, tmp_path, capsys):
    """Left out and named; a row whose answer is one of them too, whatever else happens to bad rows."""
    features, rows = fixtures.mmstar()
    rows[1] |= {"question": question, "answer": answer}
    fixtures.write(tmp_path / "mmstar.parquet", features, rows)
    loaded = load("mmstar", tmp_path)
    assert (loaded.skipped, loaded.rows, len(loaded.items)) == (0, 4, 4 if options else 3)
    out = capsys.readouterr().out
    if options:
        item = loaded.items[1]
        assert (item.options, item.answer, item.meta.get("nan_options")) == (options, gold, gone)
        shown = [item.question[start:end] for start, end in find_options(item.question)]
        assert shown == list(options) and ("nan" in item.question.split()) is False
        assert (f"left out of rows #1 {gone}" in out) is bool(gone)
        assert item.question.endswith("Take one.") is question.endswith("Take one.")
    else:
        assert f"mmstar: left out: row #1, column answer: {gold}" in out


def test_nan_in_a_list_of_options():
    source = DATASETS["spatialreasoner"].sources[0]
    row = fixtures.spatialreasoner()[1][0]
    for choices in ("['lamp', nan, 'arm chair']", ["lamp", None, "arm chair"], ["lamp", "nan", "arm chair"]):
        item = benchmark_sample(row | {"choices": choices, "answer": "C"}, 0, source)
        assert (item.options, item.answer) == (("lamp", "arm chair"), "(B) arm chair")


@pytest.fixture(scope="module")
def mmvp_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmvp")
    fixtures.write_mmvp_upstream(folder)
    return folder


def test_mmvp_as_it_is_published(mmvp_folder, capsys):
    """Pictures by their number, which is not the order of their names; labels as they are, or right."""
    loaded = load("mmvp", mmvp_folder)
    items = loaded.items
    assert len(items) == 300 and "warning" not in capsys.readouterr().out
    assert [
        e["path"].rpartition("/")[2] for e in (items[1].encoded_images[0], items[9].encoded_images[0])
    ] == ["2.jpg", "10.jpg"]
    assert (items[1].options, items[1].answer) == (("Open", "Closed"), "(B) Closed")
    assert loaded.clusters[98] == loaded.clusters[99] == "pair 49"
    changed = load("mmvp", mmvp_folder, correct_labels=True)
    rows = [i for i in range(300) if changed.items[i].answer != items[i].answer]
    assert [changed.items[i].answer for i in rows] == ["(B) Short", "(A) Long", "(B) Sitting", "(A) Standing"]
    assert rows == [98, 99, 278, 279] and changed.fingerprint != loaded.fingerprint


def test_labels_are_corrected_only_where_the_row_is_meant(tmp_path):
    features, rows = fixtures.mmvp()
    fixtures.write(tmp_path / "mmvp.parquet", features, rows * 17)
    with pytest.raises(ValueError, match="#98, column text: expected 'short' in option B, to correct"):
        load("mmvp", tmp_path, correct_labels=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("Index,Question,Options\n1,a,b\n", r"missing \['Correct Answer'\]"),
        ("Index,Question,Options,Correct Answer\n2,a,b,c\n", "expected the indices 1, 2, ..., got '2'"),
        ("", "no rows"),
        ("Index,Question,Options,Correct Answer\n1,Is it open?,(a) Open (b) Closed,(a)\n", "row #0.*1.jpg"),
    ],
)
def test_a_folder_of_mmvp_that_is_not_whole(text, message, tmp_path):
    (tmp_path / "Questions.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load("mmvp", tmp_path)


def test_all_350_rows_of_robospatial(tmp_path, capsys):
    features, (yes, point) = fixtures.robospatial_home()
    parts = {"compatibility": [yes] * 105, "configuration": [yes] * 123, "context": [point] * 122}
    for name, rows in parts.items():
        rows = [row | {"category": name} for row in rows]
        fixtures.write(tmp_path / "robospatial_home" / f"{name}-0.parquet", features, rows)
    loaded = load("robospatial_home", tmp_path)
    assert len(loaded.items) == 350 and "warning" not in capsys.readouterr().out
    records = fixtures.records_of("robospatial_home", tmp_path, lambda i, s: s.kind == "point")
    assert DATASETS["robospatial_home"].official(records) == {"yes/no": 0.0, "points": 1.0}
    # The first of a list counts, by even-odd: the middle of a star drawn in one line is outside.
    star = "[(0.5, 0.1), (0.75, 0.9), (0.1, 0.4), (0.9, 0.4), (0.25, 0.9)]"
    source = DATASETS["robospatial_home"].sources[0]
    item = benchmark_sample(point | {"answer": star}, 0, source)
    assert grade(item, "[(0.5, 0.2), (0.5, 0.5)]")["correct"]
    assert not grade(item, "[(0.5, 0.5), (0.5, 0.2)]")["correct"]


def test_pairs_by_place(tmp_path):
    features, rows = fixtures.three_d_sr()
    rows[1]["prompt"] = "Which side of the car faces away?"
    fixtures.write(tmp_path / "3dsrbench_full.parquet", features, rows)
    records = fixtures.records_of("3dsrbench_full", tmp_path, lambda i, s: i != 2)
    assert DATASETS["3dsrbench_full"].official(records) == {"pairs": 1 / 2}


# ---- the prompts of the paper's evaluator ----
def test_the_released_prompt_to_the_letter(tmp_path):
    fixtures.write_all(tmp_path)

    def asked(name, i=0, template="released"):
        return load(name, tmp_path, template=template).items[i].problem

    first = (
        "You FIRST observe the image in <observe> </observe> tags, then visualise the relevant scene graph "
        "in <scene> </scene> tags, followed by thinking about the reasoning process as an internal monologue "
        "within <think> </think> tags and then provide the final answer. The final answer MUST BE put within "
        "<answer> </answer> tags, and only return the final choice including the correct option and answer "
        "within the answer tags, e.g., <answer> ({correct_option}) {correct_answer} </answer>.\n\n"
        "Image size: {Width} x {Height}\n(84 x 56)\n\nNow answer the following question:\n"
    )
    assert asked("mmvp") == first + (
        "Is the door open or closed?\n(a) Open\n(b) Closed. Please give the final answer within answer tags."
    )
    assert asked("spatialbench") == first + (
        "Is the cup there?. Please give the final answer within answer tags."
    )
    assert asked("realworld_qa") == first + "Which way is it?\n\nA. Left.\nB. Right.\nC. Straight.\n"
    assert asked("realworld_qa", 1).endswith("?\nPlease answer directly with a single word or number.")
    hallusion = load("hallusionbench", tmp_path, template="released").items[0]
    assert hallusion.problem == first + (
        "Is bar 0 higher? Answer with yes or no.\nOptions:\n(A) Yes \n(B) No"
    )
    assert (hallusion.kind, hallusion.answer) == ("choice", "(A) Yes")
    question = fixtures.stvqa()[1][0]["question_with_options"]
    assert asked("stvqa").endswith(f"Now answer the following question:\n{question}")
    reasoning = asked("realworld_qa", 0, "released_reasoning")
    assert reasoning.startswith("You FIRST think about") and "</answer>.\nQuestion: Which way" in reasoning
    assert reasoning.endswith("of the correct option and nothing else.")  # there it is not taken off
    released = load("mmvp", tmp_path, template="released")
    plain = load("mmvp", tmp_path)
    assert plain.items[0].problem == "" and plain.questions == released.questions


# ---- what is refused ----
@pytest.mark.parametrize("name", ["stvqa", "mmstar", "cv-bench"])
@pytest.mark.parametrize("value", [None, 3, [1, "b"]])
def test_a_category_may_be_anything(name, value, tmp_path):
    features, rows = fixtures.TABLES[name]()
    task = DATASETS[name].sources[0].task
    kind = {int: fixtures.WHOLE, list: fixtures.TEXTS}.get(type(value), fixtures.TEXT)
    value = list(map(str, value)) if isinstance(value, list) else value
    rows = [row | {task: value} for row in rows]
    fixtures.write(tmp_path / f"{name}.parquet", dict(features) | {task: kind}, rows)
    loaded = load(name, tmp_path, limit=3)
    named = "" if value is None else str(value)
    assert len(loaded.items) == 3 and {item.category for item in loaded.items} == {named}


@pytest.mark.parametrize("name", ["stvqa", "mmstar", "blink-jigsaw"])
def test_damaged_images_are_named_before_a_model_is_asked(name, tmp_path, capsys):
    """Of all the images of a row, however far behind its header the damage lies."""
    features, rows = fixtures.TABLES[name]()
    column = {"stvqa": "images", "blink-jigsaw": "image_3"}.get(name, "image")
    whole = rows[1][column]["bytes"]
    for damaged in (whole[: len(whole) // 2], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        rows[1] = rows[1] | {column: {"bytes": damaged, "path": None}}
        fixtures.write(tmp_path / f"{name}.parquet", features, rows)
        with pytest.raises(ValueError, match="row #1: expected a readable image.*--skip_bad_rows leaves"):
            load(name, tmp_path)
        loaded = load(name, tmp_path, skip_bad_rows=True)
        assert loaded.skipped == 1 and "left out: row #1" in capsys.readouterr().out


def test_an_image_too_slim_is_named(tmp_path):
    features, rows = fixtures.mmstar()
    rows[2]["image"] = {"bytes": fixtures.png(1, (603, 3)), "path": None}
    fixtures.write(tmp_path / "mmstar.parquet", features, rows)
    with pytest.raises(ValueError, match="row #2: expected an image of a ratio up to 200:1, got 603 x 3"):
        load("mmstar", tmp_path)


def test_missing_columns_are_named(tmp_path):
    features, rows = fixtures.mmstar()
    for row in rows:
        row["questions"] = row.pop("question")
    fixtures.write(tmp_path / "mmstar.parquet", features | {"questions": features.pop("question")}, rows)
    message = r"expected columns \['image', 'question', .* missing \['question'\], got"
    with pytest.raises(ValueError, match=message):
        load("mmstar", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": "E"}, r"row #1, column answer: expected one of the 4 options, got 'E'"),
        ({"answer": None}, "column answer: expected an answer"),
        ({"prompt": " "}, "column prompt: expected a question"),
        ({"image": None}, "column image: expected an image"),
        ({"image": {"bytes": b"no picture", "path": None}}, "column image: expected a readable image"),
        ({"choices": ["3", "4", "1", "0"]}, r"column prompt: expected the options \['3', '4'"),
        ({"choices": ["3"]}, "expected"),
        (
            {"prompt": "How many?", "choices": None, "answer": "B"},
            "lettered options, since the answer is 'B'",
        ),
    ],
)
def test_bad_rows_are_named(change, message):
    source = DATASETS["cv-bench"].sources[0]
    row = fixtures.cv_bench()[1][0] | change
    with pytest.raises(ValueError, match=message):
        benchmark_sample(row, 1, source)


@pytest.mark.parametrize("key", ["text", "answer", "category"])
def test_text_that_nothing_takes_is_found_at_once(key, tmp_path):
    row = {"image": "a.png", "text": "Which?", "answer": "red", "category": "x", "question_id": 1}
    (tmp_path / "a.png").write_bytes(fixtures.png(0))
    (tmp_path / "x.jsonl").write_text(json.dumps(row | {key: "Half \ud83d?"}))
    with pytest.raises(ValueError, match=r"row #0: expected no control token .*, got '\\ud83d'"):
        load_items("spatialbench", Selection(local_path=str(tmp_path / "x.jsonl")))


def test_a_gold_that_is_neither_0_nor_1_is_refused():
    row = fixtures.hallusionbench()[1][0] | {"gt_answer": "2"}
    with pytest.raises(ValueError, match=r"column gt_answer: expected one of \['0', '1'\], got '2'"):
        benchmark_sample(row, 0, DATASETS["hallusionbench"].sources[0])


def test_nothing_found_says_where_it_looked(tmp_path):
    with pytest.raises(ValueError, match=f"cannot be read\n  {tmp_path}: expected val"):
        load("blink-depth", tmp_path)


# ---- items ----
def test_stratified_keeps_the_shares_and_the_seed():
    categories = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    chosen = stratified(categories, 20, seed=1)
    assert [sum(categories[i] == c for i in chosen) for c in "abc"] == [12, 6, 2]
    assert chosen == sorted(set(chosen)) == stratified(categories, 20, seed=1)
    assert chosen != stratified(categories, 20, seed=2)
    chosen = stratified(categories, 7, seed=0)  # shares 4.2, 2.1, 0.7: the largest remainder gets the last
    assert [sum(categories[i] == c for i in chosen) for c in "abc"] == [4, 2, 1]
    chosen = stratified(list("aabbb"), 3, seed=0)  # shares 1.2, 1.8
    assert [sum("aabbb"[i] == c for i in chosen) for c in "ab"] == [1, 2]
    chosen = stratified(list("aaaaabbbbb"), 3, seed=0)  # 1.5 each: no more than asked for
    assert [sum("aaaaabbbbb"[i] == c for i in chosen) for c in "ab"] == [2, 1]


def test_fingerprint_and_questions_tell_data_apart(tmp_path):
    fixtures.write_all(tmp_path)
    selection = Selection(local_path=str(tmp_path))
    whole, part = load_items("cv-bench", selection), load_items("cv-bench-2D", selection)
    shared = set(whole.questions.values()) & set(part.questions.values())
    assert len(shared) == 4 and whole.fingerprint != part.fingerprint
    assert not shared & set(load_items("stvqa", selection).questions.values())
    assert load_items("cv-bench", selection).fingerprint == whole.fingerprint
    rgb, depth = load_items("robospatial_rgb", selection), load_items("robospatial", selection)
    assert rgb.questions == depth.questions and rgb.fingerprint != depth.fingerprint
    assert set(load_items("mmvp", selection).clusters.values()) == {"pair 0", "pair 1", "pair 2"}


def test_a_selection_of_older_results_is_read():
    """A header's config has the flags of its time: unknown ones are passed over, missing ones default."""
    config = {"dataset": "mmvp", "limit": 3, "seed": 5, "circular": True, "batch_size": 4, "flag_of_old": 1}
    assert Selection.of(config) == Selection(limit=3, seed=5, circular=True)
    assert Selection.of({}) == Selection()


def test_rotations_and_shuffles(folder):
    whole = load("mmstar", folder, circular=True)
    assert [whole.items.id_of(i) for i in range(5)] == ["0@0", "0@1", "0@2", "0@3", "1@0"]
    assert len(whole.items) == 16 and set(whole.items.turns.values()) == {4}
    orders = [item.options for item in whole.items][:4]
    assert orders[1] == ("a plate", "a lamp", "a chair", "a cup")  # turned by one to the front
    assert orders[3] == ("a chair", "a cup", "a plate", "a lamp")
    assert [item.answer for item in whole.items][4:8] == [
        "(B) a plate",
        "(A) a plate",
        "(D) a plate",
        "(C) a plate",
    ]
    plain = [item.options for item in load("mmstar", folder).items]
    shuffled = {seed: load("mmstar", folder, shuffle_options=True, seed=seed).items for seed in (1, 2)}
    orders = {seed: [item.options for item in items] for seed, items in shuffled.items()}
    assert orders[1] == [item.options for item in load("mmstar", folder, shuffle_options=True, seed=1).items]
    assert orders[1] != orders[2] and len(set(orders[1])) > 1 and orders[1] != plain
    assert all(
        item.answer[4:] == p.answer[4:]
        for item, p in zip(shuffled[1], load("mmstar", folder).items, strict=True)
    )


def test_blind_items_have_no_image_but_are_shown_with_it(folder):
    items = load("blink-jigsaw", folder, blind=True).items
    assert items[0].encoded_images == () and len(items.shown(0).encoded_images) == 3
    assert load("blink-jigsaw", folder, blind=True).fingerprint == load("blink-jigsaw", folder).fingerprint


def test_a_limit_draws_rows_not_rotations(folder):
    loaded = load("mmstar", folder, limit=2, circular=True)
    assert (loaded.rows, len(loaded.items), len({row for row, _ in loaded.items.keys})) == (4, 8, 2)
    assert len(loaded.clusters) == 4


# ---- options ----
@pytest.mark.parametrize(
    "text, options",
    [
        ("Which? (A) a cup (B) a plate", ["a cup", "a plate"]),
        ("Which?\nA. a cup\nB. a plate\nC. both", ["a cup", "a plate", "both"]),
        ("Which? Options: A: a cup, B: a plate", ["a cup", "a plate"]),
        ("(a) open (b) closed", ["open", "closed"]),
        ("Which?\n(A) 3\n(B) 13\nAnswer with a letter.", ["3", "13"]),
        (
            "Points A. and B. are marked. Which?\n(A) A is closer\n(B) B is closer",
            ["A is closer", "B is closer"],
        ),
        ("Is A: the cup left of B?", []),
        ("Vitamin A. is good", []),
        ("(A) only one", []),
        ("Which?\nA. Left\nB Right\nC. Straight", ["Left", "Right", "Straight"]),  # as one of RealWorldQA's
        ("Which?\nA. Left\nB. Right\nC Straight", ["Left", "Right", "Straight"]),
        ("Which?\nA.a cup\nB.a plate", ["a cup", "a plate"]),
        ("Which?\nOptions: A:10, B:15", ["10", "15"]),
        ("(a)Open (b)Closed", ["Open", "Closed"]),
        ("", []),
        ("(A) B: near (B) C: far", ["B: near", "C: far"]),  # the marks of a chain are of one dress
        (" ".join(f"({x}) no {x}" for x in "ABCDEFGHIJ"), [f"no {x}" for x in "ABCDEFGHIJ"]),
        ("(A) seen (B) seen\n" + "(D) " * 98, ["seen", "seen"]),  # among the last 100 marks
        ("(A) too far (B) away\n" + "(D) " * 99, []),
    ],
)
def test_options_in_a_question(text, options):
    assert [text[start:end] for start, end in find_options(text)] == options


@given(st.text(st.sampled_from("ABC().: \nx"), max_size=80))
def test_spans_lie_in_the_text_and_in_order(text):
    flat = [x for span in find_options(text) for x in span]
    assert flat == sorted(flat) and all(0 <= x <= len(text) for x in flat)


@pytest.mark.parametrize(
    "answer, options, letter",
    [
        ("(B)", ("x", "y"), "B"),
        ("b", ("x", "y"), "B"),
        ("B.", ("x", "y"), "B"),
        ("(b) y", ("x", "y"), "B"),
        ("y", ("x", "y"), "B"),
        ("(B) x", ("x", "y"), None),
        ("C", ("x", "y"), None),
        ("z", ("x", "y"), None),
        ("B is closer", ("B is closer", "A is closer"), "A"),
        ("x", ("x", "x"), None),
        ("(B) y.", ("x", "y"), "B"),
        ("y.", ("x", "y"), "B"),
    ],
)
def test_gold_letters(answer, options, letter):
    assert gold_letter(answer, options) == letter


@pytest.mark.parametrize(
    "answer, kind",
    [
        ("Yes", "yes_no"),
        ("3", "number"),
        ("three", "number"),
        ("2.5", "number"),
        ("BDAC", "word"),
        ("[(0.1, 0.2), (0.3, 0.4), (0.5, 0.1)]", "point"),
        ("left", "word"),
        ("A", "word"),
        ("three cups", "word"),
    ],
)
def test_kinds(answer, kind):
    assert kind_of(answer) == kind
    assert kind_of("BDAC", shown=True) == "sequence"


@given(st.permutations(range(4)))
def test_reordering_keeps_question_gold_and_scene_together(order):
    options = ("left of", "right of", "above", "below")
    question = "Where is it? " + " ".join(f"({x}) {o}" for x, o in zip("ABCD", options, strict=True))
    gold = "<scene>{}</scene>\n<answer>(C) above</answer>"
    sample = testsets.Sample("1", (), (9, 9), question, options, "(C) above", gold)
    other = permuted(sample, order)
    letter = LETTERS[order.index(2)]
    assert other.answer == f"({letter}) above" and other.options == tuple(options[i] for i in order)
    assert other.question == "Where is it? " + " ".join(
        f"({x}) {options[i]}" for x, i in zip("ABCD", order, strict=True)
    )
    assert other.ground_truth == f"<scene>{{}}</scene>\n<answer>({letter}) above</answer>"
    assert permuted(other, [list(order).index(i) for i in range(4)]) == sample


def test_options_that_are_not_shown_cannot_be_reordered():
    sample = testsets.Sample("7", (), (9, 9), "Where?", ("left", "right"), "(A) left", "(A) left")
    with pytest.raises(ValueError, match="row 7: options that the question does not show"):
        permuted(sample, [1, 0])


# ---- the paper ----
def test_figures_of_the_paper():
    """Some of the paper's table of results, copied out by hand, and a sum over each of its rows."""
    figures = {
        "gpt-4o": {"3dsrbench": 44.3, "mmvp": 70.7, "hallusionbench": 55.0},
        "qwen2.5-vl-3b-instruct": {"cv-bench": 60.0, "blink-spatial": 66.4, "hallusionbench": 46.3},
        "spatialthinker-3b": {"stvqa": 92.5, "spatialbench": 61.5, "robospatial": 70.6},
        "qwen2.5-vl-7b-instruct": {"cv-bench-3D": 68.0, "blink-depth": 52.4, "mmstar": 63.9},
        "spatialthinker-7b": {"cv-bench-2D": 77.7, "spatialreasoner": 82.7, "vstarbench": 81.7},
    }
    for model, row in figures.items():
        assert row.items() <= PAPER[model].items()
    # Each figure counts with its place, so that no two may have changed theirs.
    sums = {m: round(sum(k * x for k, x in enumerate(row.values(), 1)), 1) for m, row in PAPER.items()}
    assert sums == {
        "gpt-4o": 8465.0,
        "qwen2.5-vl-3b-instruct": 7232.1,
        "spatialthinker-3b": 8459.5,
        "qwen2.5-vl-7b-instruct": 8092.6,
        "spatialthinker-7b": 9028.6,
    }
    assert all(set(row) == set(PAPER["gpt-4o"]) <= set(DATASETS) for row in PAPER.values())
    # The paper's total is the mean of 2D and 3D, and every figure is rounded to 0.1: half of it each.
    for row in PAPER.values():
        assert row["cv-bench"] == pytest.approx((row["cv-bench-2D"] + row["cv-bench-3D"]) / 2, abs=0.1 + 1e-9)


def test_a_models_figures_are_found_by_its_name():
    assert paper_figure("OX-PIXL/SpatialThinker-7B", "cv-bench") == 78.2 / 100
    assert paper_figure("Qwen/Qwen2.5-VL-3B-Instruct/", "hallusionbench") == 46.3 / 100
    assert paper_figure("gpt-4o-2024-05-13", "stvqa") == 77.0 / 100
    assert paper_figure("gpt-4o-mini", "stvqa") is None
    assert paper_figure("OX-PIXL/SpatialThinker-7B", "lego") is None
    assert paper_figure("my/model", "cv-bench") is None
