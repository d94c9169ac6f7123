"""The documentation: generated parts are up to date, links and commands name what exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from locft_jax.config import KEYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[bt]*/README.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"locft (?:edit|evaluate|ask|locate|sweep|plan)\b(?:\\\n|[^`\n])*")
FILE = re.compile(r"(?<![\w/.-])(?:configs|benchmarks|docs|tests|tpu_scripts|notebooks|locft_jax)/[\w./-]*\w")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_generated_parts_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [path.name for path, text in generate.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python docs/generate.py"
    rows = generate.key_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(KEYS)
    assert all(row.count("|") == 4 and row.startswith("| `") for row in rows)
    assert "| `learning_rate` (alias `lr`) | `0.0005` |" in generate.key_table()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_exist(page):
    targets = [target.partition("#")[0] for target in LINK.findall(prose(page)) if ":" not in target]
    assert [t for t in targets if t and not (page.parent / t).exists()] == []
    text = page.read_text(encoding="utf-8")
    assert [f for f in FILE.findall(text) if not (ROOT / f).exists()] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f": {p.name}\n" not in navigation] == []


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f'__version__ = "{version}"' in (ROOT / "locft_jax" / "version.py").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("configs/**/*.yaml")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_commands_use_known_keys(page):
    commands = COMMAND.findall(page.read_text(encoding="utf-8"))
    keys = {key for command in commands for key in re.findall(r"(?<=[\s'])([a-z_]+)=", command)}
    assert keys <= set(KEYS)
