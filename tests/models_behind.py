"""What a language model behind an API would say, as a function of the request alone, faults and all.

It knows the rules' questions about the scenes it may be shown, and gives those; before that it misbehaves in
one of many ways, by the request's hash.
"""

import json
from dataclasses import replace
from hashlib import sha256

from servers import anthropic_answer, openai_answer, text_of

from questions import CATEGORIES, candidates
from scenes import SceneGraph
from writer import instructions, scene_text

QUICK = {"retry-after": "0.01", "retry-after-ms": "10"}
TROUBLE = {  # of the connection: met once by a request, then it is answered
    "429": (429, {"error": {"type": "x", "message": "slowly"}}, QUICK),
    "503": (503, b"", QUICK),
    "cut": "cut",
    "none": None,
}


def lot(*parts) -> int:
    return int(sha256("|".join(map(str, parts)).encode()).hexdigest()[:8], 16)


def as_reply(q, **changes) -> str:
    said = {"question": q.text, "options": sorted([q.answer, *q.wrong]), "answer": q.answer,
            "objects": list(q.objects), "level": q.level, "rating": q.rating}  # fmt: skip
    return json.dumps(said | changes)


BAD = {  # what a model replies -> none may become a question
    "prose": lambda q: "Sure! Here is a question about the picture.",
    "refusal": lambda q: "I'm sorry, but I cannot help with that.",
    "empty": lambda q: "",
    "cut JSON": lambda q: as_reply(q)[:-20],
    "wrong ids": lambda q: as_reply(q, objects=["unicorn.1"]),
    "no ids": lambda q: as_reply(q, objects=[]),
    "one option": lambda q: as_reply(q, options=[q.answer]),
    "five options": lambda q: as_reply(q, options=list("abcd") + [q.answer]),
    "twice": lambda q: as_reply(q, options=[q.answer, q.answer.upper()]),
    "foreign answer": lambda q: as_reply(q, answer="something else"),
    "level": lambda q: as_reply(q, level="trivial"),
    "rating": lambda q: as_reply(q, rating=11),
    "list": lambda q: json.dumps([as_reply(q)]),
    "deep": lambda q: "[" * 100_000,
    "long": lambda q: as_reply(q) + " " * 200_000 + "and so on",
    "ids in words": lambda q: as_reply(q, question=q.text + f" (see {q.objects[0]})"),
    "null": lambda q: "null",
}
WRONG = {  # a wrong answer to a right question, and two right ones
    "wrong answer": lambda q: as_reply(q, answer=q.wrong[0])
}


class Model:
    """Behind a server of tests/servers.py: `respond` is what it asks for."""

    def __init__(
        self,
        graphs: list[SceneGraph],
        dialect: str = "openai",
        bad: bool = True,
        trouble: tuple = tuple(TROUBLE),
    ):
        self.answer = {"openai": openai_answer, "anthropic": anthropic_answer}[dialect]
        self.bad, self.trouble, self.kinds = bad, trouble, {}
        self.known = {}  # (category, scene as shown) -> the rules' question
        for graph in graphs:
            for q in candidates(graph):
                for level in ("easy", "medium", "hard"):
                    self.known.setdefault((q.category, scene_text(graph, level)), q)
        self.categories = {instructions(c): c for c in CATEGORIES}
        self.right = {q.text: q.answer for q in self.known.values()}

    def respond(self, body: dict, nth: int):
        text = text_of(body)
        trouble = TROUBLE[self.trouble[lot("trouble", text) % len(self.trouble)]] if self.trouble else None
        if trouble and nth == 1:
            return trouble
        return 200, self.answer(self.say(body, text)), {}

    def say(self, body, text) -> str:
        system = body.get("system") or body["messages"][0]["content"]
        system = system if isinstance(system, str) else system[0]["text"]
        if system in self.categories:
            return self.write(self.categories[system], text)
        seen = len(body["messages"][-1]["content"]) > 1
        return self.vote(text, seen)

    def write(self, category: str, text: str) -> str:
        scene, _, again = text.partition("\n\nYour last reply")
        q = replace(self.known[category, scene], level=text[7:].partition(".")[0])
        kinds = [*BAD, *(WRONG if category not in ("existence", "instance_location") else ()), "good"]
        kind = kinds[lot("reply", category, scene) % len(kinds)]
        if not again and self.bad and kind != "good":
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            return (BAD | WRONG)[kind](q)
        return as_reply(q)

    def vote(self, text: str, seen: bool) -> str:
        """Right with the picture, or not, in a tenth of cases; without it right in about half."""
        question, *options = [line for line in text.splitlines() if line != "Options:"]
        letters = {line[4:]: line[1] for line in options}
        kind = lot("vote", question, *sorted(letters)) % 10
        if lot("unread", text) % 5 == 0:
            return "Hard to say."
        right = letters.get(self.right.get(question), "A")
        if kind < (8 if seen else 5):
            return f"({right})"
        return f"({next((v for v in letters.values() if v != right), 'A')})"
