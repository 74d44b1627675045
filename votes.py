"""Votes on questions: by a model that sees no picture, whose success is a fault, and by one that sees it.

Each vote shows the options in another order, so that a model with a favourite letter does not vote alike. A
reply that names no option, and a request that failed, are no votes: another is asked for, twice at most.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import count, islice, permutations

from answers import parse_choice
from stvqa import LETTERS, with_letters
from writer import Purse, Request, replies_of

BLIND_VOTES = 3
AGAIN = 2  # requests that replace votes which could not be read
SYSTEM = "Answer the question about a picture with the letter of one option, such as (A). Say nothing else."
BLIND = "The picture is not shown: answer by what is most likely. "


def order_of(item: dict, number: int) -> list[str]:
    """The options in the order of a vote; no order comes twice before all have come."""
    key = lambda order: sha256(f"{item['key']} {order}".encode()).hexdigest()  # noqa: E731
    orders = sorted(permutations(sorted(item["options"])), key=key)
    return list(orders[number % len(orders)])


def readable(records: Sequence[dict]) -> list[str]:
    """right or wrong, in the order of the votes' numbers, not of their arrival."""
    ordered = sorted(records, key=lambda r: r["vote"])
    return [r["state"] for r in ordered if r["state"] in ("right", "wrong")]


def is_blind(records: Sequence[dict]) -> bool:
    """Whether all votes without the picture were right, in all orders of the options."""
    states = readable(records)
    return len(states) >= BLIND_VOTES and set(states) == {"right"}


def accepted(records: Sequence[dict], accept: str = "majority") -> bool | None:
    """What the votes with the picture say; None: not decided.

    majority: the side that comes to two votes first. any_of_4: one right vote of four (the paper's rule).
    """
    states = readable(records)
    if accept == "any_of_4":
        return True if "right" in states else False if len(states) >= 4 else None
    for n in range(len(states) + 1):
        for state, verdict in (("right", True), ("wrong", False)):
            if states[:n].count(state) >= 2:
                return verdict
    return None


def missing(records: Sequence[dict], accept: str | None) -> int:
    """How many votes an item needs at least, before it can be decided; accept None: a blind item's.

    Fewer could not decide it, so that a killed run asks for the same votes in the end.
    """
    states = readable(records)
    if accept is None:
        most, needed = BLIND_VOTES, BLIND_VOTES - len(states)
    elif accepted(records, accept) is not None:
        return 0
    elif accept == "any_of_4":
        most, needed = 4, 1
    else:
        most, needed = 3, 2 - max(states.count("right"), states.count("wrong"))
    return max(min(needed, most + AGAIN - len(records)), 0)


def ballot(
    items: Sequence[dict], model: str, done: Sequence[dict], accept: str | None, picture, temperature: float,
    *, purse: Purse, **service,
) -> Iterator[dict]:  # fmt: skip
    """Records of votes until all is decided: {key, vote, model, order, said, raw, state, ...}."""
    records = {item["key"]: [] for item in items}
    for record in done:
        records.setdefault(record["key"], []).append(record)
    system = SYSTEM if picture else BLIND + SYSTEM

    def requests():
        for item in items:
            past = records[item["key"]]
            cast = {r["vote"] for r in past}  # a killed run may have lost the first of two
            for number in islice((n for n in count() if n not in cast), missing(past, accept)):
                order = order_of(item, number)
                shown = partial(picture, item) if picture else None
                yield Request(f"{item['key']} {number}", system, with_letters(item["text"], order), shown,
                              (item, number, order))  # fmt: skip

    while any(missing(records[item["key"]], accept) for item in items):
        for (item, number, order), reply, dollars in replies_of(
            model, requests(), purse, temperature=temperature, max_new_tokens=64, **service
        ):
            letter = None if reply.finish_reason == "failed" else parse_choice(reply.text, order)
            said = order[LETTERS.index(letter)] if letter else None
            state = ("error" if reply.finish_reason == "failed" else "unreadable" if said is None
                     else "right" if said == item["answer"] else "wrong")  # fmt: skip
            record = {"key": item["key"], "vote": number, "model": model, "order": order, "said": said,
                      "raw": reply.text or reply.error, "state": state, "dollars": dollars,
                      "tokens": [reply.prompt_tokens, reply.n_tokens]}  # fmt: skip
            records[item["key"]].append(record)
            yield record


def blind(items: Sequence[dict], model: str, done: Sequence[dict], **service) -> Iterator[dict]:
    """Votes without the picture."""
    return ballot(items, model, done, None, None, 0.0, **service)


def validate(
    items: Sequence[dict], model: str, done: Sequence[dict], picture: Callable[[dict], bytes],
    accept: str = "majority", **service,
) -> Iterator[dict]:  # fmt: skip
    """Votes with the picture, until `accepted` has a verdict."""
    return ballot(items, model, done, accept, picture, 0.7, **service)
