"""mkdocs hooks: README.md and other Markdown files outside docs/ are pages too, and every link that works in
the repository works on the site (a link to a file that is no page becomes the file's path)."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "tpu_scripts/README.md": "tpu-scripts.md",
}
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are kept outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links between files of the repository to links between pages."""
    sources = {page: source for source, page in PAGES.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")

    def rewrite(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / place).exists():
            raise PluginError(f"{source}: link to {target}, which does not exist")
        to = PAGES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else None)
        if to is None:
            label = text.strip("![]").strip("`")
            return f"`{place}`" if label in (path, place) else f"{label} (`{place}`)"
        return f"{text}({posixpath.relpath(to, posixpath.dirname(uri) or os.curdir)}{hash_}{anchor})"

    return LINK.sub(rewrite, markdown)
