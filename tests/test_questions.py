"""The rules by hand: each form's values just inside and just outside its margins, and what holds of all."""

from dataclasses import replace

import pytest
from test_truth import random_graph

from questions import CATEGORIES, FORMS, candidates
from scenes import Relationship, SceneGraph, SceneObject


def thing(label, *box, n=1, **keys):
    return SceneObject(f"{label.replace(' ', '_')}.{n}", label, tuple(map(float, box)), **keys)


def scene(*objects, said=(), **keys):
    fields = {"source": "coco"} | keys
    return SceneGraph("1", "", 1000, 800, objects, tuple(Relationship(*t) for t in said), **fields)


def asked(form, graph):
    return {(q.objects[0], q.answer) for q in candidates(graph, per_form=99) if q.form == form}


# ---- relation ----
@pytest.mark.parametrize(
    "box, where",
    [
        ((320, 100, 420, 200), "left of"),  # 20 px apart, 2 % of the width
        ((319, 100, 419, 200), None),
        ((400, 200, 500, 300), "left of"),  # 200 aside, 100 down: twice
        ((400, 201, 500, 301), None),
        ((200, 216, 300, 300), "above"),  # 16 px apart, 2 % of the height
        ((200, 215, 300, 300), None),
    ],
)
def test_four_directions(box, where):
    found = asked("relation/image", scene(thing("clock", 200, 100, 300, 200), thing("vase", *box)))
    back = {"left of": "right of", "above": "below"}
    assert found == ({("clock.1", where), ("vase.1", back[where])} if where else set())


def test_above_is_not_asked_of_what_stands_on_the_ground():
    for bottom, n in ((320, 2), (321, 0)):  # 40 % of the height
        graph = scene(thing("clock", 200, 200, 300, bottom), thing("vase", 200, 600, 300, 700))
        assert len(asked("relation/image", graph)) == n


def place_of(said, a=(100, 100, 200, 200), b=(80, 150, 300, 400), names=("cat", "box")):
    graph = scene(thing(names[0], *a), thing(names[1], *b), said=((f"{names[0]}.1", said, f"{names[1]}.1"),))
    return {(q.answer, frozenset(q.wrong)) for q in candidates(graph) if q.form == "relation/triple"}


@pytest.mark.parametrize(
    "keys, answer, wrong",
    [
        ({"said": "on"}, "on", {"under", "inside", "next to"}),
        ({"said": "on top of"}, "on", {"under", "inside", "next to"}),
        ({"said": "on", "a": (70, 100, 200, 200)}, "on", {"under", "inside"}),  # sticks out at the left
        ({"said": "on", "a": (100, 100, 200, 225)}, "on", {"under", "next to"}),  # 60 % inside
        ({"said": "sitting on"}, "sitting on", {"standing on", "lying on"}),
        (
            {"said": "sitting on", "names": ("vase", "box")},
            "on",
            {"under", "inside", "next to"},
        ),  # a posture of a living thing only
        ({"said": "on", "names": ("cat", "picture")}, None, None),  # it may be painted there
        ({"said": "behind", "a": (400, 100, 500, 360)}, "behind", {"in front of"}),  # 40 px higher: 5 %
        ({"said": "behind", "a": (400, 100, 500, 361)}, None, None),
        ({"said": "next to", "a": (301, 200, 400, 300)}, "next to", {"on", "under", "inside", "above"}),
        ({"said": "next to", "a": (300, 200, 400, 300)}, None, None),  # it touches
        ({"said": "near"}, None, None),
        ({"said": "on", "names": ("scissors", "box")}, None, None),
    ],
)
def test_words_for_a_place(keys, answer, wrong):
    found = place_of(**keys)
    if answer is None:
        assert not found
        return
    ((got, others),) = found
    assert got == answer and others <= wrong and len(others) == min(3, len(wrong))


# ---- size ----
@pytest.mark.parametrize("side, n", [(122, 0), (123, 1)])  # 1.5 times 100 x 100 px is 122.5 x 122.5
def test_largest(side, n):
    graph = scene(thing("clock", 100, 100, 100 + side, 100 + side), thing("vase", 500, 100, 600, 200),
                  thing("cup", 700, 100, 800, 200))  # fmt: skip
    assert len(asked("size/largest", graph)) == n


@pytest.mark.parametrize("height, n", [(129, 0), (130, 1)])
def test_tallest(height, n):
    graph = scene(thing("clock", 100, 100, 200, 100 + height), thing("vase", 500, 100, 600, 200),
                  thing("cup", 700, 100, 800, 200))  # fmt: skip
    assert len(asked("size/tallest", graph)) == n
    flat = replace(graph, objects=(replace(graph.objects[0], label="book", id="book.1"), *graph.objects[1:]))
    assert not asked("size/tallest", flat)


def test_what_the_edge_cuts_has_no_size():
    for x, n in ((10, 0), (11, 1)):
        graph = scene(thing("clock", x, 100, x + 300, 400), thing("vase", 500, 100, 600, 200),
                      thing("cup", 700, 100, 800, 200))  # fmt: skip
        assert len(asked("size/largest", graph)) == n


# ---- location ----
@pytest.mark.parametrize(
    "box, corner",
    [((300, 220, 500, 420), "top left"), ((302, 220, 502, 420), None), ((300, 221, 500, 421), None),
        ((200, 220, 550, 420), "top left"),  # 14 % of it lies on the other side
        ((190, 220, 560, 420), None),  # 16 %

     ((500, 480, 700, 680), "bottom right")],
)  # fmt: skip
def test_corners(box, corner):
    assert asked("location/quadrant", scene(thing("clock", *box))) == (
        {("clock.1", corner)} if corner else set()
    )


@pytest.mark.parametrize("box, cell", [((334, 267, 666, 533), "center"), ((333, 267, 666, 533), None)])
def test_cells(box, cell):
    assert asked("location/cell", scene(thing("clock", *box))) == ({("clock.1", cell)} if cell else set())


# ---- distance ----
@pytest.mark.parametrize("x, n", [(402, 0), (404, 1)])  # 0 px and 8 % of the diagonal of 1280.6 px: 102.4
def test_closest(x, n):
    graph = scene(thing("clock", 200, 100, 300, 200), thing("vase", 100, 100, 200, 200),
                  thing("cup", x, 100, x + 50, 200), thing("ball", x + 100, 100, x + 150, 200))  # fmt: skip
    assert len([i for i in asked("distance/image", graph) if i == ("clock.1", "vase")]) == n


# ---- reach and orientation ----
def test_reach_and_gaze():
    things = (
        thing("man", 100, 100, 200, 400),
        thing("ball", 200, 200, 270, 270),
        thing("vase", 600, 100, 700, 200),
        thing("clock", 100, 600, 200, 700),
        thing("car", 300, 550, 500, 750),
    )
    held = scene(*things, said=(("man.1", "holding", "ball.1"),))
    (q,) = [q for q in candidates(held) if q.form == "reach/what"]
    assert (q.answer, set(q.wrong)) == ("ball", {"vase", "clock"})  # nobody holds a car
    two = scene(
        *things,
        thing("cup", 600, 300, 700, 400),
        said=(("man.1", "holding", "ball.1"), ("man.1", "holding", "vase.1")),
    )
    assert not asked("reach/what", two)
    how = scene(*things, said=(("man.1", "carrying", "ball.1"),))
    (q,) = [q for q in candidates(how) if q.form == "reach/how"]
    assert (q.answer, set(q.wrong)) == ("carrying", {"riding", "kicking", "throwing"})
    seen = scene(*things, said=(("man.1", "looking at", "vase.1"),))
    (q,) = [q for q in candidates(seen) if q.form == "orientation/gaze"]
    assert (q.answer, set(q.wrong)) == ("vase", {"clock", "car"})  # the ball lies the same way


@pytest.mark.parametrize("y, n", [(606, 1), (594, 0)])  # 45 degrees below the line of sight is at 600
def test_gaze_rivals_lie_elsewhere(y, n):
    graph = scene(thing("man", 50, 200, 150, 400), thing("vase", 800, 250, 900, 350),
                  thing("clock", 350, y - 50, 450, y + 50), thing("ball", 50, 600, 150, 700),
                  said=(("man.1", "looking at", "vase.1"),))  # fmt: skip
    assert len(asked("orientation/gaze", graph)) == n


# ---- depth ----
@pytest.mark.parametrize("far, n", [(10.0, 1), (9.9, 0)])
def test_depth_by_numbers(far, n):
    graph = scene(thing("clock", 100, 100, 200, 200, depth=8.5), thing("vase", 500, 100, 600, 200, depth=far))
    assert len(asked("depth/nearer", graph)) == n == len(asked("depth/farther", graph))


@pytest.mark.parametrize(
    "bottom, depths, n", [(216, (None, None), 1), (215, (None, None), 0), (216, (5.0, 4.0), 0)]
)
def test_depth_by_triple_needs_the_boxes_and_no_measured_depth_against_it(bottom, depths, n):
    graph = scene(
        thing("clock", 100, 100, 200, bottom, depth=depths[0]),
        thing("vase", 500, 100, 600, 200, depth=depths[1]),
        said=(("clock.1", "in front of", "vase.1"),),
    )
    assert len([a for a in asked("depth/nearer", graph) if a == ("clock.1", "clock")]) == n


# ---- count and existence ----
def test_count_and_existence():
    cups = [thing("cup", 100 * i, 100, 100 * i + 80, 200, n=i) for i in range(1, 9)]
    for n in range(1, 9):
        (q,) = [
            q for q in candidates(scene(*cups[:n], exhaustive=frozenset({"cup"}))) if q.category == "count"
        ]
        assert q.answer == str(n) and {q.answer, *q.wrong} == set("1234" if n < 5 else "5678")
        assert q.objects == tuple(c.id for c in cups[:n])
    assert not asked("count/label", scene(*cups))  # some may have no box
    mug = thing("mug", 100, 400, 180, 500)
    assert not asked(
        "count/label", scene(*cups[:2], mug, exhaustive=frozenset({"cup"}))
    )  # a mug may be a cup
    found = [
        (q.topic, q.answer)
        for q in candidates(scene(*cups[:2], exhaustive=frozenset({"cup", "dog", "mug"})))
        if q.form == "existence/label"
    ]
    assert ("cup", "yes") in found and ("mug", "no") not in found


def test_yes_and_no_of_the_same_words():
    """What is "on" answers yes about "on" and no about "under"; what is "under" the other way round."""
    answers = set()
    for said in ("on", "under"):
        graph = scene(
            thing("cat", 100, 100, 200, 200),
            thing("chair", 80, 150, 300, 400),
            said=(("cat.1", said, "chair.1"),),
        )
        answers |= {(q.topic, q.answer) for q in candidates(graph) if q.form == "existence/triple"}
    assert {("on", "yes"), ("under", "no"), ("under", "yes")} <= answers


# ---- all of them ----
def test_same_every_time_keys_unique_and_no_more_than_asked_for():
    keys = set()
    for seed in range(60):
        graph = random_graph(seed)
        questions = candidates(graph, per_form=3)
        assert questions == candidates(graph, per_form=3)
        for form in FORMS:
            assert sum(q.form == form for q in questions) <= 3
        assert not keys & {q.key for q in questions} and len({q.key for q in questions}) == len(questions)
        keys |= {q.key for q in questions}
        assert all(q.category in CATEGORIES and q.objects for q in questions)


def test_in_the_mirror_left_is_right_and_nothing_else_changes():
    swap = {"left of": "right of", "right of": "left of"}
    for seed in range(40):
        graph = replace(random_graph(seed), relationships=())
        flip = tuple(replace(o, box=(graph.width - o.box[2], o.box[1], graph.width - o.box[0], o.box[3]))
                     for o in graph.objects)  # fmt: skip
        sides = [{(q.objects, q.answer) for q in candidates(g, per_form=10**6) if q.form == "relation/image"}
                 for g in (graph, replace(graph, objects=flip))]  # fmt: skip
        assert {(o, swap.get(a, a)) for o, a in sides[0]} == sides[1]
