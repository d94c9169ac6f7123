"""The rules of the house: short functions with few parameters, files that fit in the head, no import circle,
and rooms that import only what they may."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "locft_jax"
FILES = {
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}
MOST_LINES, MOST_PARAMETERS, LONGEST_FILE = 60, 7, 350
# Room -> what it must not import.
APART = {
    "model": ("editing", "evaluation", "studies", "cli", "api", "prepare"),
    "io": ("editing", "evaluation", "studies", "cli", "api", "prepare"),
    "data": ("model", "io.hf", "editing", "evaluation", "studies", "cli", "api", "prepare"),
    "editing": ("evaluation", "studies", "cli", "api", "prepare"),
    "evaluation": ("editing", "studies", "cli", "api", "prepare"),
    "studies": ("cli",),
}


def imports(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("locft_jax"):
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in FILES else str(node.module)


def test_functions_are_short_and_take_few_parameters():
    wrong = []
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                parameters = sum(a.arg not in ("self", "cls") for a in every)
                if lines > MOST_LINES or parameters > MOST_PARAMETERS:
                    wrong.append(f"{module}.{node.name}: {lines} lines, {parameters} parameters")
    assert not wrong


def test_no_file_is_long():
    sizes = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert not {m: n for m, n in sizes.items() if n > LONGEST_FILE and "demo" not in m}


def test_no_import_goes_round_in_a_circle():
    edges = {module: set(imports(module)) - {module} for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_rooms_import_only_what_they_may():
    wrong = []
    for module in FILES:
        room = module.split(".")[1] if "." in module else ""
        for other in imports(module):
            inner = other.removeprefix("locft_jax.")
            if any(inner == name or inner.startswith(name) for name in APART.get(room, ())):
                wrong.append(f"{module} imports {other}")
    assert not wrong
