"""Which questions enter a data set: quotas of categories, even answers, splits, order of options.

    train = choose(questions, n=9000, shares={"relation": 0.5})
    options = order_options(0, train, val)

Pure functions of the questions and a seed: the same questions in any order give the same set.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256

from questions import CATEGORIES, LEVELS

LEVEL_SHARES = dict(zip(LEVELS, (0.4, 0.4, 0.2), strict=True))  # of a category, where its questions allow


def hash01(*parts) -> float:
    """A number in [0, 1) that follows from the parts, the same in every process."""
    return int.from_bytes(sha256("|".join(map(str, parts)).encode()).digest()[:8], "big") / 2**64


def split_of(image_group: str, val_share: float, seed: int) -> str:
    """train or val: all images of a group go together, whatever is asked about them."""
    return "val" if hash01(seed, "split", image_group) < val_share else "train"


# ---- quotas ----
def quotas(n: int, shares: Mapping[str, float], supply: Mapping[str, int]) -> dict[str, int]:
    """How many questions of each category.

    Named shares are kept. The other categories divide the rest evenly; where one is rare, all of it is taken
    and the others divide what it leaves. Args: supply: {category: questions there are}.
    """
    named = {c: min(int(n * share + 0.5), supply.get(c, 0)) for c, share in shares.items()}
    left = n - sum(int(n * share + 0.5) for share in shares.values())
    rest = sorted((c for c in CATEGORIES if c not in shares), key=lambda c: (supply.get(c, 0), c))
    result = {}
    for i, category in enumerate(rest):  # the rarest first: what it cannot give, those after it share
        result[category] = min(-(-left // (len(rest) - i)) if left > 0 else 0, supply.get(category, 0))
        left -= result[category]
    return {c: (named | result)[c] for c in CATEGORIES}


# ---- choice ----
class Pool:
    """The questions of one category; gives first what has been taken least.

    Evened out are the forms, within a form its answers, within an answer its topics, in all of them the
    levels; ties go by rating, then by a hash. No answer is taken more than 1.1 times as often as the next
    (CLEVR's rule), nor, beyond three, so often that guessing it would earn 2 points more than chance. Yes and
    no are taken in pairs about the same topic, so that neither the word nor what is asked about gives the
    answer away.
    """

    def __init__(self, questions: Iterable, seed: int):
        self.tree, self.taken, self.spent = {}, Counter(), Counter()  # the last: of the answers used up
        self.chance = {}  # of a form
        for q in sorted(questions, key=lambda q: (-q.rating, hash01(seed, q.key))):
            self.pairs = q.category == "existence"
            keys = (q.form, q.topic, q.answer) if self.pairs else (q.form, q.answer, q.topic)
            self.chance[q.form] = min(1 / (1 + len(q.wrong)), self.chance.get(q.form, 1))
            node = self.tree
            for key in keys:
                node = node.setdefault(key, {})
            node.setdefault(q.level, deque()).append(q)

    def take(self, fits: Callable[[object], bool]) -> list:
        """One more question (two, yes and no, of existence), or none. What does not fit is dropped."""
        return self._take(self.tree, (), fits)

    def _take(self, node: dict, path: tuple, fits) -> list:
        if len(path) == 2 and self.pairs and set(node) <= {"yes", "no"}:
            return self._pair(node, path, fits)
        if len(path) == 3:
            return self._leaf(node, fits)
        while node:
            name = min(node, key=lambda k: self.taken[(*path, k)])
            count = self.taken[(*path, name)]
            if len(path) == 1 and not self.pairs and count + 1 > self._most(path, alone=len(node) == 1):
                return []
            if got := self._take(node[name], (*path, name), fits):
                self.taken[(*path, name)] += len(got)
                return got
            del node[name]
            self.spent[path] = max(self.spent[path], count)
        return []

    def _most(self, form: tuple, alone: bool) -> float:
        """How often the answer that was taken least may be taken, `alone` if the others are used up."""
        guess = max(3, (self.chance[form[0]] + 0.02) * self.taken[form] + 1)
        return min(guess, max(1.1 * self.spent[form], self.spent[form] + 1)) if alone else guess

    def _pair(self, node: dict, path: tuple, fits) -> list:
        if len(node) < 2 or not (one := self._leaf(node["yes"], fits)):
            return []
        other = self._leaf(node["no"], lambda q: q.image_id != one[0].image_id and fits(q))
        return one + other if other else []

    def _leaf(self, levels: dict, fits) -> list:
        for level in sorted(levels, key=lambda v: self.taken[v] / LEVEL_SHARES[v]):
            while levels[level]:
                if fits(q := levels[level].popleft()):
                    self.taken[level] += 1
                    return [q]
        return []


def choose(
    questions: Sequence, n: int, shares: Mapping[str, float], per_image: int = 1, seed: int = 0
) -> list:
    """n of the questions, or as many as the shares and the images allow.

    Args: questions: with the fields of `questions.Question`; shares: see `quotas`; per_image: questions about
        one image at most, each about other objects. A text with the same answer is at most 1 % of the set.
    """
    by_category = {c: [q for q in questions if q.category == c] for c in CATEGORIES}
    supply = {c: min(len(qs), per_image * len({q.image_id for q in qs})) for c, qs in by_category.items()}
    pools = {c: Pool(qs, seed) for c, qs in by_category.items()}
    of_image, facts, repeats, chosen = Counter(), set(), Counter(), {c: [] for c in CATEGORIES}
    most = max(10, n // 100)

    def fits(q):
        fact = (q.image_id, q.category, q.objects)
        return of_image[q.image_id] < per_image and fact not in facts and repeats[q.text, q.answer] < most

    while True:
        wanted = quotas(n, shares, supply)
        for category in sorted(CATEGORIES, key=lambda c: supply[c] / (wanted[c] or 1)):  # the scarcest first
            pair = category == "existence"  # comes by two
            while len(chosen[category]) + pair < wanted[category]:
                if not (got := pools[category].take(fits)):
                    supply[category] = len(chosen[category])
                    break
                for q in got:
                    of_image[q.image_id] += 1
                    facts.add((q.image_id, q.category, q.objects))
                    repeats[q.text, q.answer] += 1
                chosen[category] += got
        if quotas(n, shares, supply) == wanted:
            return sorted((q for qs in chosen.values() for q in qs), key=lambda q: (q.image_id, q.key))


def order_options(seed: int, *splits: Sequence) -> dict[str, tuple[str, ...]]:
    """{key: options in the order shown}. Letters are even to one: over all, in each split, of each answer."""
    ordered, turn = {}, Counter()
    sort = [sorted(qs, key=lambda q: (q.form, q.answer, hash01(seed, "letter", q.key))) for qs in splits]
    for q in (q for questions in sort for q in questions):
        wrong = sorted(q.wrong, key=lambda option: hash01(seed, q.key, option))
        at = turn[len(wrong)] % (len(wrong) + 1)
        turn[len(wrong)] += 1
        ordered[q.key] = (*wrong[:at], q.answer, *wrong[at:])
    return ordered
