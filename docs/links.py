"""Text of the repository's pages for the site: sections taken from other files, links rewritten.

On a repository's web page a link leads to a file. On the site it leads to the page made from that file, and a link to
a file that is no page leads to the repository's web page where its address is known.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Pages outside docs/ -> page of the site; the build writes those in project/.
OUTSIDE = {
    "README.md": "index.md",
    "docs/README.md": "index.md",
    "README.zh-CN.md": "project/readme-zh.md",
    "own/README.md": "project/own.md",
    "foundation/card.md": "project/compact-sam.md",
    "benchmarks/results.md": "project/speed.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changes.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1`*[ ]*$", re.MULTILINE | re.DOTALL)
FROM = re.compile(r"^<!-- from (\S+?)(?:: (.+?))? -->\n", re.MULTILINE)


def page_of(path: Path) -> Path | None:
    """Return the page of the site, a path below docs/, that is made from a file or a folder; None without one."""
    if path.is_dir() and (path / "index.md").is_file():
        path = path / "index.md"
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    if name in OUTSIDE:
        return DOCS / OUTSIDE[name]
    return path if path.suffix == ".md" and path.is_relative_to(DOCS) else None


def rewrite_links(text: str, source: Path, page: Path, repository: str = "") -> str:
    """Return Markdown with its relative links rewritten.

    Args:
        source: file that the text comes from. page: file below docs/ that it is shown as.
        repository: address of the repository's web page; empty: links to files that are no pages become plain text.
    Raises:
        FileNotFoundError: a link leads to no file; names the source and the link.
    """

    def target_of(match: re.Match[str]) -> str:
        image, label, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        name, _, anchor = link.partition("#")
        path = Path(os.path.normpath(source.parent / name))
        if image:
            return f"![{label}]({relative(path, page)})"
        found = page_of(path)
        if found is not None:
            return f"[{label}]({relative(found, page)}{f'#{anchor}' if anchor else ''})"
        if not path.exists():
            raise FileNotFoundError(f"{source.relative_to(ROOT)}: link to {link}, expected a file of the repository")
        place = path.relative_to(ROOT).as_posix()
        if repository:
            return f"[{label}]({repository}/{'tree' if path.is_dir() else 'blob'}/main/{place})"
        return label if place in label else f"{label} (`{place}`)"

    parts, end = [], 0
    for block in FENCED.finditer(text):
        parts += [LINK.sub(target_of, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(target_of, text[end:])])


def relative(path: Path, page: Path) -> str:
    """Return the path from a page to a file."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def section(text: str, heading: str) -> str:
    """Return the text below a heading of level 2, up to the next one.

    Raises:
        KeyError: there is no such heading.
    """
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading].strip() + "\n"


def site_text(text: str, page: Path, repository: str = "") -> str:
    """Return a page's Markdown as the site shows it.

    A line `<!-- from FILE -->` or `<!-- from FILE: HEADING -->` gives way to that file or to that section of it.
    """
    parts = FROM.split(rewrite_links(text, page, page, repository))
    shown = parts[0]
    for name, heading, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        source = Path(os.path.normpath(page.parent / name))
        taken = source.read_text(encoding="utf-8")
        shown += rewrite_links(section(taken, heading) if heading else taken, source, page, repository) + rest
    return shown


LOADS = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|<link\b(?=[^>]*\srel=["']?(?:stylesheet|preload|preconnect|icon|shortcut icon))"""
    r"""[^>]*\shref=["']?(?:https?:)?//[^"'\s>]*"""
    r"""|(?:url\(|@import\s+)["']?(?:https?:)?//[^"')\s]*"""
)


def loads_from_elsewhere(site: Path) -> list[str]:
    """Return a line for each script, style, font or picture that a page or a style of a site loads from a server."""
    found = []
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        for match in LOADS.finditer(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)}: {match[0]}")
    return found
