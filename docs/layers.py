"""Draw the layers of the package from its imports: `python docs/layers.py` writes docs/images/layers.svg."""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from repo.import_graph import PACKAGE, module_files, project_imports  # noqa: E402  # pyright: ignore[reportMissingImports]

TARGET = ROOT / "docs" / "images" / "layers.svg"
WIDTH, ROW, BOX_HEIGHT, LEFT, CHARACTER = 760, 66, 30, 14, 8.2


def layers() -> list[list[str]]:
    """Return the rows of LAYERS in tests/repo/test_architecture.py, from the ground up."""
    tree = ast.parse((ROOT / "tests" / "repo" / "test_architecture.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            return ast.literal_eval(node.value)
    raise LookupError("tests/repo/test_architecture.py: expected an assignment to LAYERS, found none")


def package_imports() -> dict[str, set[str]]:
    """Return part -> parts that its modules import; a part is a package or a module directly below lesionsam."""
    found: dict[str, set[str]] = {part: set() for row in layers() for part in row}
    for name, path in module_files().items():
        if name != PACKAGE and path.name != "__init__.py":
            part = name.split(".")[1]
            found[part] |= {other.split(".")[1] for other in project_imports(path)} - {part}
    return found


def needed_edges(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that no chain of other imports implies: the transitive reduction, sorted."""

    def reach(part: str) -> set[str]:
        return imports[part].union(*(reach(other) for other in imports[part]))

    return sorted(
        (part, other)
        for part, others in imports.items()
        for other in others
        if not any(other in reach(between) for between in others - {other})
    )


def picture() -> str:
    """Return the SVG: a row of boxes for each layer, the command line on top, a line for each needed import."""
    rows = layers()
    places: dict[str, tuple[float, float, float]] = {}  # part -> left, top, width
    for k, row in enumerate(reversed(rows)):
        widths = [CHARACTER * len(name) + 20 for name in row]
        gap = (WIDTH - 2 * LEFT - sum(widths)) / (len(row) + 1)
        left = LEFT + gap
        for name, width in zip(row, widths, strict=True):
            places[name] = (left, k * ROW + 18, width)
            left += width + gap
    height = len(rows) * ROW + 6
    shapes = [
        f'<rect x="0" y="{k * ROW + 2}" width="{WIDTH}" height="{ROW - 4}" rx="6" class="layer"/>'
        for k in range(len(rows))
    ]
    for part, other in needed_edges(package_imports()):
        (x0, y0, w0), (x1, y1, w1) = places[part], places[other]
        start, end = (x0 + w0 / 2, y0 + BOX_HEIGHT), (x1 + w1 / 2, y1)
        bend = (end[1] - start[1]) / 2
        shapes.append(
            f'<path d="M{start[0]:.1f} {start[1]:.1f} C{start[0]:.1f} {start[1] + bend:.1f} '
            f'{end[0]:.1f} {end[1] - bend:.1f} {end[0]:.1f} {end[1]:.1f}"><title>{part} imports {other}</title></path>'
        )
    for name, (x, y, w) in places.items():
        shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{BOX_HEIGHT}" rx="5" class="part"/>')
        shapes.append(f'<text x="{x + w / 2:.1f}" y="{y + 20}">{escape(name)}</text>')
    style = (
        ".layer{fill:#eef2f7}.part{fill:#fff;stroke:#35618f}path{fill:none;stroke:#35618f;stroke-opacity:.45}"
        "text{font:14px monospace;text-anchor:middle;fill:#1b2733}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Layers of the package and the imports between them">\n<style>{style}</style>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
