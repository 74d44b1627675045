"""Votes: which orders, what counts as one, who decides, what is paid."""

import io
from itertools import product

import pytest
from models_behind import lot
from PIL import Image
from servers import KEY, openai_answer, serve, text_of

from votes import BLIND_VOTES, accepted, blind, is_blind, missing, order_of, validate
from writer import Purse

STATES = ("right", "wrong", "unreadable", "error")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def votes(*states):
    return [{"vote": i, "state": state} for i, state in enumerate(states)]


def items(n, options=("cup", "plate", "lamp", "vase")):
    return [
        {"key": f"q{i}", "text": f"Which is it, {i}?", "options": list(options), "answer": options[i % 4]}
        for i in range(n)
    ]


# ---- the rules ----
@pytest.mark.parametrize(
    "states, verdict",
    [
        ("", None),
        ("r", None),
        ("rr", True),
        ("ww", False),
        ("rw", None),
        ("rwr", True),
        ("wrw", False),
        ("rur", True),
        ("rewu", None),
        ("rrww", True),  # the first to two
        ("wrrw", True),
        ("eeee", None),
    ],
)
def test_the_side_that_comes_to_two_first_decides(states, verdict):
    names = {"r": "right", "w": "wrong", "u": "unreadable", "e": "error"}
    records = votes(*(names[s] for s in states))
    assert accepted(records) is verdict
    assert accepted(records[::-1]) is verdict  # whatever the order of arrival


def test_any_of_four_is_the_papers_rule():
    for states in product(("right", "wrong"), repeat=4):
        assert accepted(votes(*states), "any_of_4") is ("right" in states)
    assert accepted(votes("wrong", "wrong", "wrong"), "any_of_4") is None
    assert accepted(votes("wrong", "unreadable", "wrong", "error", "wrong"), "any_of_4") is None


def test_blind_is_right_in_every_order():
    assert is_blind(votes("right", "right", "right"))
    assert is_blind(votes("right", "error", "right", "right"))
    for states in (("right", "right"), ("right", "right", "wrong"), (), ("unreadable",) * 3):
        assert not is_blind(votes(*states))


def test_an_undecided_item_is_asked_for_as_few_votes_as_can_decide_it():
    assert missing(votes(*["error"] * 5), "majority") == 0  # three votes, and two in place of others
    for n in range(4):
        for states in product(STATES, repeat=n):
            records = votes(*states)
            if accepted(records) is not None:
                assert missing(records, "majority") == 0
                continue
            more = missing(records, "majority")
            for state in ("right", "wrong"):
                longest = [*states, *([state] * more)]
                leads = states.count(state) >= max(states.count(s) for s in ("right", "wrong"))
                assert not leads or accepted(votes(*longest)) is not None


def test_orders_differ_until_all_have_come_and_are_the_same_in_every_run():
    (item,) = items(1)
    orders = [tuple(order_of(item, n)) for n in range(24)]
    assert len(set(orders)) == 24 and orders[0] == tuple(order_of(item, 24))
    assert orders == [tuple(order_of(item | {"options": item["options"][::-1]}, n)) for n in range(24)]
    pair = item | {"options": ["yes", "no"]}
    assert order_of(pair, 0) != order_of(pair, 1)
    # Over many items each option is as often first as any other, to five standard deviations.
    first = [order_of(i | {"key": f"k{n}"}, 0)[0] for n in range(400) for i in [item]]
    assert all(abs(first.count(o) - 100) <= 5 * (400 * 0.25 * 0.75) ** 0.5 for o in item["options"])


# ---- with a server ----
def server(says):
    """says(question, {option: letter}, picture there?) -> the reply."""

    def respond(body, nth):
        text = text_of(body)
        question, _, *options = text.splitlines()
        seen = len(body["messages"][-1]["content"]) > 1
        return 200, openai_answer(says(question, {o[4:]: o[1] for o in options}, seen)), {}

    return serve(respond)


def cast(method, todo, says, done=(), **options):
    with server(says) as (url, api):
        records = list(
            method(todo, "openai:m", list(done), base_url=url, concurrency=4, purse=Purse(), **options)
        )
    return records, api


def of(records):
    out = {}
    for record in records:
        out.setdefault(record["key"], []).append(record)
    return out


def test_a_model_with_a_favourite_letter_is_neither_blind_nor_trusted():
    todo = items(40)
    records, _ = cast(blind, todo, lambda question, letters, seen: "(A)")
    assert len(records) == 40 * BLIND_VOTES
    by_key = of(records)
    assert not any(
        is_blind(by_key[item["key"]]) for item in todo if len({r["said"] for r in by_key[item["key"]]}) > 1
    )
    # A guesser among four is right three times in 1.6 % of cases: of 40, at most 5 but for one in 10,000.
    assert sum(is_blind(by_key[item["key"]]) for item in todo) <= 5


def test_what_can_be_said_without_the_picture_is_found_and_no_picture_is_sent():
    todo = items(12)
    known = {item["text"]: item["answer"] for item in todo[:6]}

    def says(question, letters, seen):
        assert not seen
        guess = sorted(letters)[lot(question, *letters) % 4]
        return f"({letters[known.get(question, guess)]})"

    by_key = of(cast(blind, todo, says)[0])
    assert all(is_blind(by_key[item["key"]]) for item in todo[:6])


def test_a_validator_sees_the_picture_and_decides():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    todo = items(16)
    truth = {item["text"]: item["answer"] for item in todo}

    def says(question, letters, seen):
        assert seen
        n = int(question.split()[-1][:-1])
        right = letters[truth[question]]
        other = next(v for o, v in letters.items() if o != truth[question])
        return {0: f"({right})", 1: f"({other})", 2: "I cannot tell."}[n % 3]

    records, api = cast(validate, todo, says, picture=lambda item: buffer.getvalue())
    by_key = of(records)
    for i, item in enumerate(todo):
        states = [r["state"] for r in by_key[item["key"]]]
        assert states == {0: ["right"] * 2, 1: ["wrong"] * 2, 2: ["unreadable"] * len(states)}[i % 3]
        assert accepted(by_key[item["key"]]) is {0: True, 1: False, 2: None}[i % 3]
        assert len(states) <= 5
        assert len({tuple(r["order"]) for r in by_key[item["key"]]}) == len(states)
    assert all(body["temperature"] == 0.7 for body in api.bodies)
    # What is on disk is not asked again, whichever of two votes came first.
    half = [r for r in records if r["vote"] == 1]
    rest, again = cast(validate, todo, says, done=half, picture=lambda item: buffer.getvalue())
    assert sorted((r["key"], r["vote"]) for r in half + rest) == sorted(
        (r["key"], r["vote"]) for r in records
    )
    assert len(again.bodies) == len(rest)
    assert cast(validate, todo, says, done=records, picture=lambda item: buffer.getvalue())[0] == []


def test_a_missing_picture_is_an_error_and_no_vote():
    def lost(item):
        raise OSError("gone")

    records, api = cast(validate, items(2), lambda *_: "(A)", picture=lost)
    assert {r["state"] for r in records} == {"error"} and not api.bodies
    assert accepted(records) is None
