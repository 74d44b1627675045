"""The second reader finds what is wrong, lets pass what is right, and has nothing against the rules."""

import random
from dataclasses import replace

import pytest
from truth import faults, set_faults

from questions import FORMS, Question, candidates
from scenes import RawGraph, RawObject, Relationship, SceneGraph, SceneObject, clean
from tiny import draw_graphs


def thing(label, box, n=1, **keys):
    return SceneObject(f"{label.replace(' ', '_')}.{n}", label, box, **keys)


OBJECTS = (
    thing("cat", (100, 500, 200, 600)),
    thing("box", (90, 480, 300, 650)),
    thing("ball", (700, 500, 780, 580)),
    thing("clock", (50, 50, 150, 150)),
    thing("vase", (880, 40, 960, 240)),
    thing("dog", (400, 600, 560, 760)),
    thing("cup", (330, 100, 400, 160), 1),
    thing("cup", (500, 100, 560, 150), 2),
    thing("man", (600, 300, 800, 790)),
    thing("crate", (20, 700, 90, 780), uncertain=True, kinds=("drawer",)),
)
TRIPLES = (("cat.1", "in", "box.1"), ("man.1", "holding", "ball.1"), ("man.1", "looking at", "vase.1"),
           ("dog.1", "in front of", "box.1"))  # fmt: skip
GRAPH = SceneGraph("1", "x.jpg", 1000, 800, OBJECTS, tuple(Relationship(*t) for t in TRIPLES),
                   frozenset({"cup", "zebra"}), source="coco")  # fmt: skip


def q(form, text, answer, wrong, objects, relationships=(), **keys):
    fields = {"level": "easy", "rating": 5, "fact": "", "topic": answer} | keys
    return Question("q1", "1", FORMS[form][0], form, text=text, answer=answer, wrong=wrong, objects=objects,
                    relationships=relationships, **fields)  # fmt: skip


RIGHT = {
    "in": q(
        "relation/triple",
        "Where is the cat with respect to the box?",
        "inside",
        ("on", "under", "next to"),
        ("cat.1", "box.1"),
        (TRIPLES[0],),
    ),
    "image": q(
        "relation/image",
        "In the image, where is the clock relative to the vase?",
        "left of",
        ("right of", "above", "below"),
        ("clock.1", "vase.1"),
        (("clock.1", "left of", "vase.1"),),
    ),
    "what": q(
        "reach/what",
        "What is the man holding?",
        "ball",
        ("clock", "dog"),
        ("man.1", "ball.1", "clock.1", "dog.1"),
        (TRIPLES[1],),
    ),
    "gaze": q(
        "orientation/gaze",
        "What is the man looking at?",
        "vase",
        ("dog", "box"),
        ("man.1", "vase.1", "dog.1", "box.1"),
        (TRIPLES[2],),
    ),
    "largest": q(
        "size/largest",
        "Which of these looks largest in the image?",
        "man",
        ("clock", "dog"),
        ("man.1", "clock.1", "dog.1"),
    ),
    "smallest": q(
        "size/smallest",
        "Which of these looks smallest in the image?",
        "ball",
        ("clock", "dog"),
        ("ball.1", "clock.1", "dog.1"),
    ),
    "tallest": q(
        "size/tallest",
        "Which of these looks tallest in the image?",
        "man",
        ("clock", "vase"),
        ("man.1", "clock.1", "vase.1"),
    ),
    "corner": q(
        "location/quadrant",
        "Where in the image is the clock?",
        "top left",
        ("top right", "bottom left", "bottom right"),
        ("clock.1",),
    ),
    "cell": q(
        "location/cell",
        "Where in the image, in three by three parts, is the clock?",
        "top left",
        ("top", "left", "center"),
        ("clock.1",),
    ),
    "nearer": q(
        "depth/nearer",
        "Which of these is closer to the camera?",
        "dog",
        ("box",),
        ("dog.1", "box.1"),
        (TRIPLES[3],),
    ),
    "farther": q(
        "depth/farther",
        "Which of these is farther from the viewer?",
        "box",
        ("dog",),
        ("box.1", "dog.1"),
        (TRIPLES[3],),
    ),
    "closest": q(
        "distance/image",
        "In the image, which of these is closest to the dog?",
        "man",
        ("ball", "box"),
        ("dog.1", "man.1", "ball.1", "box.1"),
        (("man.1", "closest to", "dog.1"),),
    ),
    "count": q(
        "count/label", "How many cups are there in the image?", "2", ("1", "3", "4"), ("cup.1", "cup.2")
    ),
    "yes": q("existence/label", "Is there a cup in the image?", "yes", ("no",), ("cup.1", "cup.2")),
    "no": q("existence/label", "Is there a zebra in the image?", "no", ("yes",), ("dog.1",)),
    "yes3": q(
        "existence/triple",
        "Is the cat inside the box in the image?",
        "yes",
        ("no",),
        ("cat.1", "box.1"),
        (TRIPLES[0],),
    ),
    "no3": q(
        "existence/triple",
        "Is the cat under the box in the image?",
        "no",
        ("yes",),
        ("cat.1", "box.1"),
        (TRIPLES[0],),
    ),
}


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_ones_pass(name):
    assert faults(GRAPH, RIGHT[name]) == []


# {what is wrong: (right question, what is changed, a word of the fault)}
WRONG = {
    "text of no form": ("in", {"text": "What colour is the cat?"}, "text"),
    "form unknown": ("in", {"form": "relation/none"}, "form"),
    "category of another form": ("in", {"category": "depth"}, "form"),
    "level": ("in", {"level": "harder"}, "level"),
    "rating too high": ("in", {"rating": 11}, "rating"),
    "rating no integer": ("in", {"rating": 5.0}, "rating"),
    "image of another": ("in", {"image_id": "2"}, "image_id"),
    "one option": ("yes", {"wrong": ()}, "options"),
    "five options": ("in", {"wrong": ("on", "under", "next to", "above")}, "options: 5"),
    "options repeated": ("largest", {"wrong": ("clock", "Clock")}, "repeated"),
    "answer among the wrong": ("count", {"wrong": ("2", "3", "4")}, "repeated"),
    "name of nothing": ("corner", {"text": "Where in the image is the horse?"}, "may mean nothing"),
    "name of two": ("corner", {"text": "Where in the image is the cup?"}, "may mean"),
    "wider name of two": ("corner", {"text": "Where in the image is the animal?"}, "may mean"),
    "name of an uncertain thing": ("corner", {"text": "Where in the image is the drawer?"}, "not one thing"),
    "option of nothing": ("largest", {"wrong": ("clock", "horse")}, "may mean nothing"),
    "option of two": ("largest", {"wrong": ("clock", "cup")}, "may mean"),
    "option is asked about": ("closest", {"wrong": ("dog", "box")}, "asked about"),
    "no gold objects": ("corner", {"objects": ()}, "objects"),
    "gold object too many": ("corner", {"objects": ("clock.1", "vase.1")}, "used are"),
    "gold object missing": ("largest", {"objects": ("man.1", "clock.1")}, "used are"),
    "gold object of no box": ("corner", {"objects": ("clock.9",)}, "objects"),
    "gold object twice": ("corner", {"objects": ("clock.1", "clock.1")}, "used are"),
    "relationship invented": ("in", {"relationships": (("cat.1", "on", "box.1"),)}, "relationships"),
    "relationship turned round": ("in", {"relationships": (("box.1", "in", "cat.1"),)}, "relationships"),
    "relationship missing": ("image", {"relationships": ()}, "relationships"),
    "relationship where none is": ("corner", {"relationships": (TRIPLES[0],)}, "relationships"),
    "no triple says so": ("in", {"answer": "on", "wrong": ("inside", "under", "next to")}, "no triple"),
    "synonym among the options": ("in", {"wrong": ("in", "under")}, "option: in may"),
    "option near may hold": ("in", {"wrong": ("near", "under")}, "option: near"),
    "option behind may hold": ("in", {"wrong": ("behind", "under")}, "option: behind"),
    "left for right": (
        "image",
        {"answer": "right of", "wrong": ("left of", "above", "below")},
        "not clearly",
    ),
    "a direction left out": ("image", {"wrong": ("right of", "above")}, "four directions"),
    "no triple of that verb": ("what", {"text": "What is the man kicking?"}, "no triple"),
    "verb of no contact": ("what", {"text": "What is the man behind?"}, "no contact"),
    "another thing is held": ("what", {"answer": "clock", "wrong": ("ball", "dog")}, "no triple"),
    "option that is looked at": ("what", {"wrong": ("vase", "dog")}, "has to do with"),
    "looks elsewhere": ("gaze", {"answer": "dog", "wrong": ("vase", "box")}, "no triple"),
    "not the largest": ("largest", {"answer": "clock", "wrong": ("man", "dog")}, "as good"),
    "not the smallest": ("smallest", {"answer": "dog", "wrong": ("clock", "ball")}, "as good"),
    "not the tallest": ("tallest", {"answer": "clock", "wrong": ("man", "vase")}, "as good"),
    "wrong corner": (
        "corner",
        {"answer": "top right", "wrong": ("top left", "bottom left", "bottom right")},
        "not clearly",
    ),
    "corner left out": ("corner", {"wrong": ("top right", "bottom left")}, "four corners"),
    "wrong cell": ("cell", {"answer": "top", "wrong": ("top left", "left", "center")}, "not in the cell"),
    "three cells": ("cell", {"wrong": ("top", "left")}, "not four"),
    "farther for nearer": ("nearer", {"answer": "box", "wrong": ("dog",)}, "nothing says"),
    "nothing says which is nearer": (
        "nearer",
        {"wrong": ("clock",), "objects": ("dog.1", "clock.1")},
        "nothing says",
    ),
    "not the closest": ("closest", {"answer": "ball", "wrong": ("man", "box")}, "as close"),
    "count wrong": ("count", {"answer": "3", "wrong": ("1", "2", "4")}, "there are 2"),
    "count of what is not counted": (
        "count",
        {"text": "How many dogs are there in the image?"},
        "not counted",
    ),
    "count's options tell": ("count", {"wrong": ("3", "4", "5")}, "options"),
    "count's objects": ("count", {"objects": ("cup.1",)}, "used are"),
    "is there": ("no", {"text": "Is there a cup in the image?"}, "may be one"),
    "is not there": ("yes", {"text": "Is there a zebra in the image?"}, "no zebra"),
    "no, but it may have no box": ("no", {"text": "Is there a horse in the image?"}, "may have no box"),
    "other options than yes and no": ("yes", {"wrong": ("maybe",)}, "yes and no"),
    "yes without a triple": ("yes3", {"text": "Is the cat on the box in the image?"}, "no triple"),
    "no where it is so": ("no3", {"text": "Is the cat inside the box in the image?"}, "may be true"),
    "no about others": ("no3", {"objects": ("dog.1", "box.1")}, "are not"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ones_are_found(name):
    right, change, says = WRONG[name]
    assert says in " | ".join(faults(GRAPH, replace(RIGHT[right], **change)))


def test_options_shown_are_those_of_the_question():
    assert faults(GRAPH, RIGHT["yes"], ["no", "yes"]) == []
    assert "shown" in faults(GRAPH, RIGHT["yes"], ["no", "maybe"])[0]


# ---- sets ----
def item(n, letter, answer, **keys):
    options = ["no", "yes"] if (letter == "A") == (answer == "no") else ["yes", "no"]
    return {"key": f"k{n}", "split": "train", "image_id": f"i{n}", "image_group": f"g{n}", "options": options,
            "answer": answer, "letter": letter, "objects": [{"id": "dog.1"}], "category": "existence",
            "form": "existence/label", "topic": "dog"} | keys  # fmt: skip


def even():
    return [item(i, "AB"[i % 2], ("yes", "no")[i // 2 % 2]) for i in range(40)]


@pytest.mark.parametrize(
    "says, change",
    [
        (None, lambda items: items),
        ("letters", lambda items: [item(i, "A", i_["answer"]) for i, i_ in enumerate(items)]),
        ("uneven", lambda items: items[:1] * 0 + [item(i, "AB"[i % 2], "yes") for i in range(40)]),
        ("uneven", lambda items: [i | {"topic": i["answer"]} for i in items]),
        ("is right in", lambda items: [item(i, "AB"[i % 2], "yes") for i in range(40)]),
        ("asked 2 times", lambda items: [*items[:-1], items[-1] | {"image_id": "i0"}]),
        ("two splits", lambda items: [i | {"image_group": "g"} for i in items[:20]]
         + [i | {"image_group": "g", "split": "val"} for i in items[20:]]),
        ("is not of", lambda items: [items[0] | {"options": items[0]["options"][::-1]}, *items[1:]]),
    ],
)  # fmt: skip
def test_faults_of_a_set(says, change):
    found = " | ".join(set_faults(change(even())))
    assert (says in found) if says else found == ""


# ---- the rules ----
LABELS = (
    "man woman person boy car truck bus dog cat bird horse tree "
    "chair bench table desk cup mug bottle box bag ball "
    "lamp clock vase building sign bike boat laptop keyboard phone book umbrella surfboard people trees "
    "street grass shirt hat head wheel cars"
).split()
SAID = (
    "on under above below in inside behind holding riding has "
    "wearing near watching carrying kicking eating of "
    "over"
).split() + ["in front of", "looking at", "next to", "sitting on", "standing on", "on top of"]


def random_graph(seed):
    """A graph as Visual Genome has them: doubles, plurals, free predicates that often fit no boxes."""
    rng = random.Random(seed)
    w, h = rng.choice([(800, 600), (640, 480), (500, 375)])
    objects = []
    for i in range(rng.randrange(6, 30)):
        bw, bh = w * rng.uniform(0.03, 0.5), h * rng.uniform(0.03, 0.6)
        x, y = rng.uniform(0, w - bw), rng.uniform(0, h - bh)
        names = (rng.choice(LABELS), *([rng.choice(LABELS)] if rng.random() < 0.1 else []))
        objects.append(RawObject(str(i), names, (x, y, x + bw, y + bh), group=rng.random() < 0.03,
                                 depth=rng.uniform(1, 9) if seed % 4 == 0 else None))  # fmt: skip
    near = [(a, b) for a in objects for b in objects
            if a is not b and a.box[0] < b.box[2] and b.box[0] < a.box[2]]  # fmt: skip
    relations = [(a.key, rng.choice(SAID), b.key) for a, b in rng.sample(near, min(len(near), 25))]
    exhaustive = tuple(rng.sample(LABELS, 10)) if seed % 3 == 0 else ()
    return clean(RawGraph(f"r{seed}", "", w, h, tuple(objects), tuple(relations), exhaustive, source="vg"))[0]


def test_the_rules_are_true_of_random_graphs():
    asked = {}
    for seed in range(300):
        graph = random_graph(seed)
        for question in candidates(graph, per_form=20, voted=True):
            asked[question.form] = asked.get(question.form, 0) + 1
            assert faults(graph, question) == [], (seed, question)
    assert set(asked) == set(FORMS), set(FORMS) - set(asked)


def test_the_rules_are_true_of_drawn_scenes():
    for raw in draw_graphs(2000, "truth"):
        graph, _ = clean(raw)
        for question in candidates(graph):
            assert faults(graph, question) == [], question
