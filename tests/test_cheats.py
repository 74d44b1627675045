"""What cheats earn stays at most where docs/rewards.md says it is."""

import math
import re
from pathlib import Path

import pytest

from benchmarks import cheats

N, IN_DOCS = 40, 400  # questions


def documented() -> list[dict]:
    """[{(who, column): mean reward}], one of each table in docs/rewards.md."""
    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text().partition("## What cheats earn")[2]
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        tables.append({(who, c): float(x) for who, *row in lines for c, x in zip(head[1:], row, strict=True)})
    return tables


@pytest.mark.parametrize("number, scenes", [(0, cheats.drawn), (1, cheats.like_vg)])
def test_no_policy_earns_more_than_documented(number, scenes):
    table, known = cheats.measure(scenes(N, seed=1)), documented()[number]
    means = {(who, c): sum(r) / len(r) for who, row in table.items() for c, r in row.items()}
    assert set(means) == set(known)
    for (who, column), mean in means.items():
        rewards = table[who][column]
        variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
        margin = (
            3.5 * math.sqrt(variance / len(rewards) + variance / IN_DOCS) + 0.0006
        )  # the table is rounded
        assert mean <= known[who, column] + margin, (who, column, mean)


def test_what_the_options_are_for():
    for table in documented():
        honest, junk = "honest, noise 0.15", "the same, junk labels"
        blind = "answer and counts known, boxes identical"
        assert table[blind, "default"] > 0.88 > 0.82 > table[blind, "positive_ciou"] > table[blind, "iou50"]
        assert table[junk, "default"] >= table[honest, "default"]
        assert table[junk, "need_label"] < table[honest, "need_label"] - 0.1
        assert all(table["honest, perfect", c] == 1 for c in cheats.COLUMNS)
