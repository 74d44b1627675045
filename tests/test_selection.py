"""Quotas, even answers, splits and the order of options, on questions of any kind."""

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from selection import choose, order_options, quotas, split_of

REST = ("reach", "size", "orientation", "instance_location", "depth", "distance", "count", "existence")


@dataclass(frozen=True)
class Q:
    key: str
    image_id: str
    category: str
    form: str
    topic: str
    answer: str
    level: str = "easy"
    rating: int = 5
    text: str = ""
    objects: tuple = ()
    wrong: tuple = ()


def of(category, answers, images=None, form="f", topic="t", level="easy"):
    """A question for each answer, each about an image of its own unless `images` are given."""
    images = images or [f"{category}{form}{i}" for i in range(len(answers))]
    return [
        Q(f"{category}/{form}/{topic}/{i}", image, category, form, topic, answer, level,
          text=f"{category}{i}", objects=(f"{form}.{i}",),
          wrong=tuple(w for w in sorted({*answers}) if w != answer))
        for i, (image, answer) in enumerate(zip(images, answers, strict=True))
    ]  # fmt: skip


# ---- quotas ----
def test_half_are_relations_and_the_rest_is_even():
    supply = dict.fromkeys(("relation", *REST), 10**6)
    got = quotas(10_000, {"relation": 0.5}, supply)
    assert got == {"relation": 5000} | dict.fromkeys(REST, 625)


def test_what_a_rare_category_lacks_goes_to_the_others_but_not_to_relation():
    supply = dict.fromkeys(("relation", *REST), 10**6) | {"orientation": 20, "reach": 0}
    got = quotas(10_000, {"relation": 0.5}, supply)
    assert got["orientation"] == 20 and got["reach"] == 0 and got["relation"] == 5000
    rest = [got[c] for c in REST if c not in ("orientation", "reach")]
    assert sum(got.values()) == 10_000 and max(rest) - min(rest) <= 1  # 4,980 over six


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 999])
def test_quotas_add_up(n):
    assert sum(quotas(n, {"relation": 0.5}, dict.fromkeys(("relation", *REST), n)).values()) == n
    assert sum(quotas(n, {}, dict.fromkeys(("relation", *REST), n)).values()) == n
    assert quotas(n, {"relation": 1.0}, {"relation": n, "size": n})["relation"] == n


# ---- choice ----
def test_answers_are_even_where_there_is_enough_of_each():
    answers = ["left"] * 500 + ["right"] * 90 + ["above"] * 60 + ["below"] * 55
    chosen = choose(of("relation", answers), 200, {"relation": 1.0})
    assert Counter(q.answer for q in chosen) == dict.fromkeys(("left", "right", "above", "below"), 50)


def test_an_answer_without_rivals_does_not_fill_the_set():
    answers = ["left"] * 500 + ["right"] * 20
    two = [replace(q, wrong=("other",)) for q in of("relation", answers)]
    got = Counter(q.answer for q in choose(two, 300, {"relation": 1.0}))
    assert got == {"right": 20, "left": 22}  # 1.1 times the next
    many = ["left"] * 500 + [side for side in ("right", "above", "below", "inside") for _ in range(20)]
    five = [replace(q, wrong=("1", "2", "3")) for q in of("relation", many)]
    assert Counter(q.answer for q in choose(five, 300, {"relation": 1.0}))["left"] == 22  # of 102: below 27 %
    four = [replace(q, wrong=("other", "above", "below")) for q in of("relation", answers)]
    four = Counter(q.answer for q in choose(four, 300, {"relation": 1.0}))
    assert four == {"right": 3, "left": 3}  # of four options, two of which are never right


def test_forms_and_topics_are_even_within_a_category():
    rare, common = of("size", ["a", "b"] * 30, form="rare"), of("size", ["a", "b"] * 300, form="common")
    chosen = choose(rare + common, 100, {"size": 1.0})
    assert Counter(q.form for q in chosen) == {"rare": 50, "common": 50}
    topics = of("size", ["a", "b"] * 200, topic="x") + of("size", ["a", "b"] * 20, topic="y", form="f")
    assert Counter(q.topic for q in choose(topics, 40, {"size": 1.0})) == {"x": 20, "y": 20}


def test_yes_and_no_come_in_pairs_about_the_same_thing():
    questions = []
    for topic, yes, no in (("dog", 90, 10), ("cat", 5, 60), ("cow", 40, 0), ("pig", 30, 30)):
        questions += [
            Q(f"{topic}{i}{a}", f"{topic}{i}{a}", "existence", "label", topic, a, text=f"{topic}{i}{a}")
            for a, n in (("yes", yes), ("no", no))
            for i in range(n)
        ]
    chosen = choose(questions, 60, {"existence": 1.0})
    counts = Counter((q.topic, q.answer) for q in chosen)
    assert len(chosen) == 60 and not counts["cow", "yes"]
    assert all(counts[t, "yes"] == counts[t, "no"] for t in ("dog", "cat", "pig"))
    assert counts["cat", "yes"] == 5  # all there are


def test_levels_are_mixed_40_40_20_and_better_rated_questions_come_first():
    questions = [
        Q(f"{level}{i}", f"{level}{i}", "count", "f", "t", "abcd"[i % 4], level, rating=i, text=f"{level}{i}")
        for level in ("easy", "medium", "hard")
        for i in range(200)
    ]
    chosen = choose(questions, 100, {"count": 1.0})
    assert Counter(q.level for q in chosen) == {"easy": 40, "medium": 40, "hard": 20}
    for level in ("easy", "medium", "hard"):
        for answer in "abcd":
            ratings = [q.rating for q in chosen if (q.level, q.answer) == (level, answer)]
            best = sorted(
                (q.rating for q in questions if (q.level, q.answer) == (level, answer)), reverse=True
            )
            assert sorted(ratings, reverse=True) == best[: len(ratings)]


def test_an_image_is_asked_about_once_or_about_other_things():
    images = [f"i{i % 10}" for i in range(40)]
    questions = of("count", ["a", "b", "c", "d"] * 10, images=images)
    for per_image in (1, 3):
        chosen = choose(questions, 40, {"count": 1.0}, per_image=per_image)
        assert Counter(q.image_id for q in chosen) == {f"i{i}": per_image for i in range(10)}
    same = [Q(f"k{i}", "i", "count", "f", "t", "abcd"[i], text=str(i), objects=("cup.1",)) for i in range(4)]
    assert len(choose(same, 4, {"count": 1.0}, per_image=4)) == 1


def test_a_rare_category_gets_the_images_that_others_could_use_too():
    images = [f"i{i}" for i in range(100)]
    plenty = of("relation", ["a", "b"] * 50, images=images)
    rare = of("orientation", ["a", "b", "c", "d"], images=images[:4])
    counts = Counter(q.category for q in choose(plenty + rare, 80, {"relation": 0.5}))
    assert counts == {"relation": 40, "orientation": 4}  # no other category is there to fill up


def test_one_text_with_one_answer_does_not_fill_a_set():
    questions = [
        Q(f"k{i}", f"i{i}", "size", "f", "t", "ab"[i % 2], text="Which is largest?" if i % 4 else f"{i}")
        for i in range(4000)
    ]
    texts = Counter((q.text, q.answer) for q in choose(questions, 1500, {"size": 1.0}))
    assert max(texts.values()) == 15


def test_the_same_questions_in_any_order_give_the_same_set():
    questions = of("relation", ["a", "b", "c", "d"] * 50) + of("existence", ["yes", "no"] * 20)
    shuffled = random.Random(1).sample(questions, len(questions))
    a, b = (choose(qs, 60, {"relation": 0.5}, seed=3) for qs in (questions, shuffled))
    assert a == b and order_options(3, a) == order_options(3, b[::-1])
    assert a != choose(questions, 60, {"relation": 0.5}, seed=4)


# ---- letters, splits ----
def spread(order, questions) -> int:
    """Between the most and the least frequent of the four letters."""
    letters = [order[q.key].index(q.answer) for q in questions]
    counts = [letters.count(i) for i in range(4)]
    return max(counts) - min(counts)


def test_letters_are_even_to_one_item_over_all_and_within_an_answer():
    questions = of("relation", ["a"] * 101 + ["b"] * 63 + ["c"] * 7 + ["d"])
    order = order_options(0, questions)
    assert spread(order, questions) <= 1
    for answer in "abc":
        assert spread(order, [q for q in questions if q.answer == answer]) <= 1
    assert all(sorted(order[q.key]) == list("abcd") for q in questions)
    # The wrong ones are in no fixed order either.
    assert len({tuple(o for o in order[q.key] if o != "a") for q in questions if q.answer == "a"}) == 6


def test_groups_are_split_whole_and_by_share():
    groups = [split_of(f"g{i}", 0.1, 0) for i in range(10_000)]
    assert groups == [split_of(f"g{i}", 0.1, 0) for i in range(10_000)]
    assert abs(groups.count("val") - 1000) <= 5 * (10_000 * 0.1 * 0.9) ** 0.5  # five standard deviations
    assert {split_of(f"g{i}", 0, 0) for i in range(1000)} == {"train"}


def test_letters_are_even_over_both_splits_together_too():
    train, val = of("size", ["a", "b", "c"] * 7 + ["d"]), of("count", ["a", "b", "c", "d"] * 2 + ["a"] * 3)
    order = order_options(0, train, val)
    for questions in (train, val, train + val):
        assert spread(order, questions) <= 1
