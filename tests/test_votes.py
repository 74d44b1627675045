"""Votes: which orders, what counts as one, who decides, what is paid."""

import io
from itertools import product

import pytest
from models_behind import lot
from PIL import Image
from servers import KEY, anthropic_answer, openai_answer, serve, text_of

from apis import NoService
from votes import AGAIN, BLIND_VOTES, accepted, blind, is_blind, needed, order_of, validate
from writer import Purse

STATES = ("right", "wrong", "unreadable", "error")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


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


def test_a_count_that_nothing_vouches_for_takes_three_alike():
    for states in product(("right", "wrong"), repeat=3):
        for accept in ("majority", "any_of_4"):
            assert accepted(votes(*states), accept, unanimous=True) is (set(states) == {"right"})
    assert accepted(votes("right", "right"), unanimous=True) is None
    assert accepted(votes("wrong"), unanimous=True) is False
    assert [needed(votes(*["right"] * n), "majority", True) for n in range(4)] == [3, 2, 1, 0]


@pytest.mark.parametrize("accept, unanimous", [("majority", False), ("any_of_4", False), ("majority", True)])
def test_an_item_is_asked_for_as_few_votes_as_can_decide_it(accept, unanimous):
    """With the votes that are asked for it can be accepted or is decided; with one less it cannot."""

    def ends(states, n):
        rests = product(("right", "wrong"), repeat=n)
        return {accepted(votes(*states, *rest), accept, unanimous) for rest in rests}

    for n in range(5):
        for states in product(STATES, repeat=n):
            more = needed(votes(*states), accept, unanimous)
            if accepted(votes(*states), accept, unanimous) is not None:
                assert more == 0
            elif unanimous:
                assert True in ends(states, more) and True not in ends(states, more - 1)
            else:
                assert ends(states, more) != {None} and ends(states, more - 1) == {None}
    assert needed([], "majority") == 2 and needed([], "any_of_4") == 1 and needed([], None) == BLIND_VOTES
    assert needed(votes("right", "wrong"), "majority") == 1  # three readable votes decide any item
    assert needed(votes("right", "error", "wrong"), None) == 1


def test_every_option_gets_every_letter_and_the_first_order_does_not_come_again():
    for options in (["yes", "no"], ["a", "b", "c"], ["cup", "plate", "lamp", "vase"]):
        n = len(options)
        for k in range(50):
            item = {"key": f"k{k}", "options": options}
            orders = [tuple(order_of(item, number)) for number in range(3 * n)]
            assert {frozenset(order) for order in orders} == {frozenset(options)}
            assert all({order[place] for order in orders[:n]} == {*options} for place in range(n))
            assert orders[0] not in orders[1:]
            assert orders == [tuple(order_of(item | {"options": options[::-1]}, m)) for m in range(3 * n)]
    # Over many items each option is as often first as any other, to five standard deviations.
    first = [order_of({"key": f"k{n}", "options": options}, 0)[0] for n in range(400)]
    assert all(abs(first.count(o) - 100) <= 5 * (400 * 0.25 * 0.75) ** 0.5 for o in options)


# ---- with a server ----
def server(says, answer=openai_answer):
    """says(question, {option: letter}, picture there?) -> the reply, or what `serve` takes."""

    def respond(body, nth):
        text = text_of(body)
        question, _, *options = text.splitlines()
        seen = len(body["messages"][-1]["content"]) > 1
        said = says(question, {o[4:]: o[1] for o in options}, seen)
        return (200, answer(said), {}) if isinstance(said, str) and said != "cut" else said

    return serve(respond)


def cast(method, todo, says, done=(), dialect="openai", **options):
    options = {"purse": Purse(), "concurrency": 4} | options
    answer = {"openai": openai_answer, "anthropic": anthropic_answer}[dialect]
    with server(says, answer) as (url, api):
        url = f"{url}/v1" if dialect == "openai" else url
        records = list(method(todo, f"{dialect}:m", list(done), base_url=url, **options))
    return records, api


def picture(item) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


def of(records):
    out = {}
    for record in records:
        out.setdefault(record["key"], []).append(record)
    return out


@pytest.mark.parametrize("options", [("yes", "no"), ("a", "b", "c"), ("cup", "plate", "lamp", "vase")])
def test_a_model_with_a_favourite_letter_is_neither_blind_nor_trusted(options):
    todo = [item | {"options": [*options], "answer": options[0]} for item in items(40)]
    records, _ = cast(blind, todo, lambda question, letters, seen: "(A)")
    assert len(records) == 40 * BLIND_VOTES
    assert not any(is_blind(votes) for votes in of(records).values())
    records, _ = cast(validate, todo, lambda question, letters, seen: "(A)", picture=picture)
    if len(options) > 2:  # of three votes at most one is right; of two options the third vote has its way
        assert not any(accepted(votes) for votes in of(records).values())


def test_what_can_be_said_without_the_picture_is_found_and_no_picture_is_sent():
    todo = items(12)
    known = {item["text"]: item["answer"] for item in todo[:6]}

    def says(question, letters, seen):
        assert not seen
        guess = sorted(letters)[lot(question, *letters) % 4]
        return f"({letters[known.get(question, guess)]})"

    by_key = of(cast(blind, todo, says)[0])
    assert all(is_blind(by_key[item["key"]]) for item in todo[:6])


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_validator_sees_the_picture_and_decides(dialect):
    todo = items(16)
    truth = {item["text"]: item["answer"] for item in todo}

    def says(question, letters, seen):
        assert seen
        n = int(question.split()[-1][:-1])
        right = letters[truth[question]]
        other = next(v for o, v in letters.items() if o != truth[question])
        return {0: f"({right})", 1: f"({other})", 2: "I cannot tell."}[n % 3]

    records, api = cast(validate, todo, says, picture=picture, dialect=dialect)
    by_key = of(records)
    for i, item in enumerate(todo):
        states = [r["state"] for r in by_key[item["key"]]]
        assert states == {0: ["right"] * 2, 1: ["wrong"] * 2, 2: ["unreadable"] * (3 + AGAIN)}[i % 3]
        assert accepted(by_key[item["key"]]) is {0: True, 1: False, 2: None}[i % 3]
        assert len({tuple(r["order"]) for r in by_key[item["key"]]}) >= min(len(states), 4)
        assert all(r["said"] == item["answer"] for r in by_key[item["key"]] if r["state"] == "right")
    assert all(body["temperature"] == 0.7 for body in api.bodies)
    assert len(api.bodies) == len(records) and all(r["tokens"] == [50, 3] for r in records)
    # What is on disk is not asked again, whichever of two votes came first.
    half = [r for r in records if r["vote"] == 1]
    rest, again = cast(validate, todo, says, done=half, picture=picture, dialect=dialect)
    assert sorted((r["key"], r["vote"]) for r in half + rest) == sorted(
        (r["key"], r["vote"]) for r in records
    )
    assert len(again.bodies) == len(rest)
    assert cast(validate, todo, says, done=records, picture=picture)[0] == []


def test_a_third_vote_is_asked_for_where_two_differ_and_counts_need_three():
    todo = [item | {"unanimous": n >= 8} for n, item in enumerate(items(16))]
    truth, turns = {item["text"]: item["answer"] for item in todo}, {}

    def says(question, letters, seen):  # every other vote on an odd item is wrong
        turns[question] = turns.get(question, 0) + 1
        n, right = int(question.split()[-1][:-1]), letters[truth[question]]
        other = next(v for o, v in letters.items() if o != truth[question])
        return f"({other})" if n % 2 and turns[question] % 2 == 0 else f"({right})"

    by_key = of(cast(validate, todo, says, picture=picture, concurrency=1)[0])
    for n, item in enumerate(todo):
        records = by_key[item["key"]]
        assert len(records) == (3 if item["unanimous"] or n % 2 else 2)
        assert accepted(records, unanimous=item["unanimous"]) is (not item["unanimous"] or n % 2 == 0)


def test_an_outage_costs_no_item():
    """Failures are no votes; the run ends with one line, and the next one asks as if nothing had been."""
    todo, truth = items(12), {item["text"]: item["answer"] for item in items(12)}
    records = []
    with server(lambda *_: (400, {"error": {"message": "no"}}, {})) as (url, api):
        records += validate(todo, "openai:m", [], picture, base_url=url, purse=Purse())
    assert {r["state"] for r in records} == {"error"} and not any(r["dollars"] for r in records)
    assert len(records) == 12 * (3 + AGAIN)
    says = lambda question, letters, seen: f"({letters[truth[question]]})"  # noqa: E731
    more, api = cast(validate, todo, says, done=records, picture=picture)
    assert len(api.bodies) == 24 and all(accepted(votes) for votes in of(records + more).values())
    with pytest.raises(NoService, match="the last 4 requests failed: APIConnectionError") as ended:
        list(validate(todo, "openai:m", [], picture, base_url="http://127.0.0.1:9", purse=Purse(),
                      concurrency=2, retries=0))  # fmt: skip
    assert "\n" not in str(ended.value)


def test_a_missing_picture_is_an_error_and_no_vote():
    def lost(item):
        raise OSError("gone")

    records, api = cast(validate, items(2), lambda *_: "(A)", picture=lost)
    assert {r["state"] for r in records} == {"error"} and not api.bodies
    assert accepted(records) is None


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="accept: expected one of majority, any_of_4, got most"):
        validate([], "openai:m", [], picture, accept="most", purse=Purse())
