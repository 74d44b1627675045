"""README and docs: what they paste runs, what they point at exists, and every file is named."""

import re
import subprocess
import sys

import pytest
from programs import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def test_the_snippets_run_as_pasted(tmp_path):
    """In a folder with rewards.py alone; what they print is what the comments say."""
    (tmp_path / "rewards.py").write_bytes((REPO / "rewards.py").read_bytes())
    snippets = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.S)
    assert snippets
    for code in snippets:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        said = [line.partition("  # ")[2] for line in code.splitlines() if line.startswith("print(")]
        assert done.stdout.splitlines() == said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_and_what_is_named_is_there(page):
    text = page.read_text()
    assert max(map(len, text.splitlines())) <= 120
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|docs|benchmarks|configs|assets)/[\w./]+)`", text):
        assert (REPO / name).exists(), name
    for name in re.findall(r"`(\w+\.(?:py|sh|toml))`", text):
        assert (REPO / name).exists(), name
    for target in re.findall(r"\bmake ([a-z-]+)`?", re.sub(r"make (?:it|them|a)\b", "", text)):
        assert f"\n{target}:" in (REPO / "Makefile").read_text(), target
    anchors = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


def test_every_file_has_its_line_in_the_readme():
    table = PAGES[0].read_text().partition("## The files")[2]
    assert not [path.name for path in REPO.glob("*.py") if f"`{path.name}`" not in table]


def test_every_key_of_the_configs_is_known_and_explained():
    from train_grpo import GRPOConfig
    from train_sft import SFTConfig

    for path in (REPO / "configs").glob("*.yaml"):
        (SFTConfig if "sft" in path.name else GRPOConfig).load([str(path)])
    for config in (GRPOConfig, SFTConfig):
        assert not [key for key, field in config.model_fields.items() if not field.description]
