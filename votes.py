"""Votes on questions: by a model that sees no picture, whose success is a fault, and by one that sees it.

    for record in blind(items, "openai:gpt-4o-mini", done, purse=Purse(budget=5)): ...
    for record in validate(items, "vllm:Qwen/Qwen2.5-VL-7B-Instruct", done, picture, purse=Purse()): ...

An item is {key, text, options, answer}. Each vote shows the options in another order, in which every option
gets every letter once before one comes again: a model with a favourite letter is never right throughout, and
its votes cancel out. A reply that names no option, and a request that failed, are no votes: another is asked
for, three times at most.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import count, islice

from answers import parse_choice
from stvqa import LETTERS, with_letters
from writer import LONGEST, Purse, Request, replies_of

BLIND_VOTES = 3
AGAIN = 3  # requests that replace votes which could not be read, of one item
ACCEPT = ("majority", "any_of_4")
SYSTEM = "Answer the question about a picture with the letter of one option, such as (A). Say nothing else."
BLIND = "The picture is not shown: answer by what is most likely. "


# ---- the rules ----
def order_of(item: dict, number: int) -> list[str]:
    """The options in the order of a vote: all turns of one order, then of others, by the key's hash.

    The first order does not come again; of two options, all others are then alike.
    """
    lap, turn = divmod(number, len(item["options"]))
    order = sorted(item["options"], key=lambda o: sha256(f"{item['key']} {lap} {o}".encode()).hexdigest())
    order = order[turn:] + order[:turn]
    return order[1:] + order[:1] if number and order == order_of(item, 0) else order


def readable(records: Iterable[dict]) -> list[str]:
    """right or wrong, in the order of the votes' numbers, not of their arrival."""
    ordered = sorted(records, key=lambda r: r["vote"])
    return [r["state"] for r in ordered if r["state"] in ("right", "wrong")]


def is_blind(records: Iterable[dict]) -> bool:
    """Whether all votes without the picture were right, in all orders of the options."""
    states = readable(records)
    return len(states) >= BLIND_VOTES and set(states) == {"right"}


def accepted(records: Iterable[dict], accept: str = "majority", unanimous: bool = False) -> bool | None:
    """What the votes with the picture say; None: not decided.

    majority: the side that comes to two votes first. any_of_4: one right vote of four (the paper's rule).
    Args: unanimous: three right votes and no wrong one, whatever `accept` says: for what the graph does not
        vouch for, as a count where not every instance has a box.
    """
    states = readable(records)
    if unanimous:
        return False if "wrong" in states else True if len(states) >= 3 else None
    if accept == "any_of_4":
        return True if "right" in states[:4] else False if len(states) >= 4 else None
    for n in range(len(states) + 1):
        for state, verdict in (("right", True), ("wrong", False)):
            if states[:n].count(state) >= 2:
                return verdict
    return None


def needed(records: Sequence[dict], accept: str | None, unanimous: bool = False) -> int:
    """How many votes it takes at least to decide an item; accept None: to tell whether it is blind.

    Never more, so that no vote is paid for that decides nothing, and a killed run asks for the same ones.
    """
    states = readable(records)
    if accept is None:
        return max(BLIND_VOTES - len(states), 0)
    if accepted(records, accept, unanimous) is not None:
        return 0
    if unanimous:
        return 3 - len(states)
    return 1 if accept == "any_of_4" else 2 - max(states.count("right"), states.count("wrong"))


# ---- asking ----
def ballot(
    items: Sequence[dict], model: str, done: Iterable[dict], accept: str | None, picture, temperature: float,
    *, purse: Purse, max_new_tokens: int = 512, **service,
) -> Iterator[dict]:  # fmt: skip
    """Records of votes until all is decided: {key, vote, model, order, said, raw, state, ...}.

    A request that failed in an earlier run does not count against an item: a server may have been down.
    """
    records = {item["key"]: [] for item in items}
    forgiven = dict.fromkeys(records, 0)  # failures of earlier runs
    for record in done:
        if record["key"] in records:
            records[record["key"]].append(record)
            forgiven[record["key"]] += record["state"] == "error"
    most = AGAIN + (4 if accept == "any_of_4" else 3)
    system = SYSTEM if picture else BLIND + SYSTEM

    def missing(item):
        past = records[item["key"]]
        left = most - len(past) + forgiven[item["key"]]
        return max(min(needed(past, accept, item.get("unanimous", False)), left), 0)

    def requests():
        for item in items:
            cast = {r["vote"] for r in records[item["key"]]}  # a killed run may have lost the first of two
            for number in islice((n for n in count() if n not in cast), missing(item)):
                order = order_of(item, number)
                shown = partial(picture, item) if picture else None
                yield Request(f"{item['key']} {number}", system, with_letters(item["text"], order), shown,
                              (item, number, order))  # fmt: skip

    while any(map(missing, items)):
        for (item, number, order), reply, dollars in replies_of(
            model, requests(), purse, temperature=temperature, max_new_tokens=max_new_tokens, **service
        ):
            failed = reply.finish_reason == "failed"
            letter = None if failed else parse_choice(reply.text, order)
            said = order[LETTERS.index(letter)] if letter else None
            state = ("error" if failed else "unreadable" if said is None
                     else "right" if said == item["answer"] else "wrong")  # fmt: skip
            record = {"key": item["key"], "vote": number, "model": model, "order": order, "said": said,
                      "raw": reply.text[:LONGEST] or reply.error, "state": state, "dollars": dollars,
                      "tokens": [reply.prompt_tokens, reply.n_tokens]}  # fmt: skip
            records[item["key"]].append(record)
            yield record


def blind(items: Sequence[dict], model: str, done: Iterable[dict], **service) -> Iterator[dict]:
    """Votes without the picture, three an item."""
    return ballot(items, model, done, None, None, 0.0, **service)


def validate(
    items: Sequence[dict], model: str, done: Iterable[dict], picture: Callable[[dict], bytes],
    accept: str = "majority", **service,
) -> Iterator[dict]:  # fmt: skip
    """Votes with the picture, until `accepted` has a verdict. An item with "unanimous" needs three alike."""
    if accept not in ACCEPT:
        raise ValueError(f"accept: expected one of {', '.join(ACCEPT)}, got {accept}")
    return ballot(items, model, done, accept, picture, 0.7, **service)
