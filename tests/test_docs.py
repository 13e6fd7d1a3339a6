"""Every Python block in README.md and docs/ runs, so that what we show works."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_helpers import fast_compilations

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True, scope="module")
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__docs__"}  # the blocks of a page build on each other
    for block in BLOCK.finditer(text):
        # Tracebacks then point into the page.
        lines_before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(lines_before + block[1], str(page), "exec"), namespace)


def test_readme_shows_python():
    assert BLOCK.search(PAGES[0].read_text(encoding="utf-8"))
