"""The generated parts of the pages: the key table of config.md and the module map of development.md.

python docs/generate.py            rewrite them
python docs/generate.py --check    exit status 1 where they are out of date
"""

import ast
import re
import sys
from pathlib import Path

from locft_jax.config import key_rows

ROOT = Path(__file__).resolve().parents[1]


def key_table() -> str:
    """Every key of the config as a row of a table."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, alias, default, meaning in key_rows():
        other = f" (alias `{alias}`)" if alias else ""
        shown_default = "-" if default in ("", "null", "[]") else f"`{default}`"
        rows.append(f"| `{name}`{other} | {shown_default} | {meaning} |")
    return "\n".join(rows)


def module_map() -> str:
    """A table for every folder of the package: module, first sentence of its docstring."""
    files = sorted((ROOT / "locft_jax").rglob("*.py"), key=lambda p: (str(p.parent), p.name))
    tables: dict[str, list[str]] = {}
    for path in files:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if doc is None or (path.name == "__init__.py" and path.parent.name != "locft_jax"):
            continue
        first = re.split(r"(?<=[.:])\s*\n|(?<=\.)\s|\n\n", " ".join(doc.split("\n\n")[0].split()))[0]
        folder = path.parent.relative_to(ROOT).as_posix()
        row = f"| `{path.name}` | " + first.rstrip(":").replace("|", r"\|") + " |"
        tables.setdefault(folder, []).append(row)
    head = "| module | what it does |\n| --- | --- |\n"
    return "\n\n".join(f"**{folder}/**\n\n{head}" + "\n".join(rows) for folder, rows in tables.items())


PARTS = {"config.md": ("keys", key_table), "development.md": ("modules", module_map)}


def pages() -> dict[Path, str]:
    """Every page with a generated part, as it must be."""
    found = {}
    for name, (mark, make) in PARTS.items():
        path = ROOT / "docs" / name
        begin, end = f"<!-- generated: {mark} -->\n", f"\n\n<!-- end of {mark} -->"
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        found[path] = before + begin + make() + end + after
    return found


def main() -> None:
    """Rewrite the pages, or with --check only say which are out of date."""
    stale = {path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text}
    if "--check" in sys.argv[1:]:
        names = ", ".join(path.name for path in stale)
        sys.exit(f"out of date: {names}; run python docs/generate.py" if stale else 0)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
