"""The house: which file imports which, one way only, and how long files and functions are.

    python tests/test_house.py        # the table, as it stands

The rules behind it are tests below.
"""

import ast
from functools import cache
from pathlib import Path

from mutants import MUTANTS

REPO = Path(__file__).parents[1]
FILES = sorted(path.stem for path in REPO.glob("*.py"))
COMMANDS = {"train_grpo", "train_sft", "merge", "evaluate", "synthesize", "ask"}  # nothing builds on these
LONGEST = 90  # lines of a function; train() tells the whole algorithm and may be longer


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((REPO / f"{name}.py").read_text())


def imports(name: str) -> set[str]:
    """Files of the project that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & set(FILES)


def functions(name: str) -> list[tuple[str, int]]:
    """(function, its lines), methods and inner ones too."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    found = [node for node in ast.walk(tree(name)) if isinstance(node, kinds)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in found]


def floors() -> list[list[str]]:
    """The files from the ground up: each imports from lower floors only. Raises: ValueError on a circle."""
    left, built = {name: imports(name) for name in FILES}, []
    while left:
        floor = [name for name, needs in left.items() if not needs & set(left)]
        if not floor:
            raise ValueError(f"imports in a circle: {left}")
        built.append(floor)
        left = {name: needs for name, needs in left.items() if name not in floor}
    return built


def test_imports_point_one_way():
    assert sorted(sum(floors(), [])) == FILES
    for name in FILES:
        assert not imports(name) & COMMANDS, name


def test_what_is_copied_or_pure_stands_alone():
    assert imports("rewards") == imports("config") == imports("distributed") == set()
    assert imports("answers") == {"rewards"}
    assert "testsets" not in imports("results") and "evaluate" not in imports("report")


def test_the_algorithm_begins_within_250_lines():
    lines = (REPO / "train_grpo.py").read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("def group_advantages")) <= 250


def test_functions_are_short():
    long = [(name, f, n) for name in FILES for f, n in functions(name) if n > LONGEST and f != "train"]
    assert not long


def test_every_mutant_finds_its_text():
    """tests/mutants.py takes hours; that a text has changed is seen at once."""
    texts = {file: (REPO / file).read_text() for file, *_ in MUTANTS}
    assert not [(file, old) for file, old, *_ in MUTANTS if texts[file].count(old) != 1]


if __name__ == "__main__":
    print(f"{'file':14}{'lines':>6}{'longest function':>34}  imports")
    for floor in floors():
        for name in floor:
            n = len((REPO / f"{name}.py").read_text().splitlines())
            longest, size = max(functions(name), key=lambda item: item[1])
            print(f"{name:14}{n:6}{f'{longest} {size}':>34}  {' '.join(sorted(imports(name))) or '-'}")
