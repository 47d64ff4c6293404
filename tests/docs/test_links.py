"""Links of a page on the site: where they lead for pages, for other files, and with the repository's address."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from repo.import_graph import ROOT

DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS)] if str(DOCS) not in sys.path else []
links = importlib.import_module("links")

README, INDEX = ROOT / "README.md", DOCS / "index.md"


def rewritten(text: str, repository: str = "") -> str:
    """Return text of README.md as the start page shows it."""
    return links.rewrite_links(text, README, INDEX, repository)


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("[a](docs/howto/predict.md#in-python)", "[a](howto/predict.md#in-python)"),
        ("[a](docs/decisions)", "[a](decisions/index.md)"),
        ("[a](own/README.md)", "[a](project/own.md)"),
        ("![a](docs/images/cases.png)", "![a](images/cases.png)"),
        ("[a](https://arxiv.org/abs/2304.02643)", "[a](https://arxiv.org/abs/2304.02643)"),
        ("[a](#limits)", "[a](#limits)"),
        ("[a](LICENSE)", "a (`LICENSE`)"),
        ("[LICENSE](LICENSE)", "LICENSE"),
    ],
)
def test_links_lead_to_pages_of_the_site(link: str, shown: str) -> None:
    assert rewritten(link) == shown


def test_with_an_address_files_lead_to_the_repository() -> None:
    assert rewritten("[a](LICENSE)", "https://host/me/it") == "[a](https://host/me/it/blob/main/LICENSE)"
    assert rewritten("[a](src)", "https://host/me/it") == "[a](https://host/me/it/tree/main/src)"


def test_code_blocks_stay_as_they_are() -> None:
    block = "```\n[a](docs/method.md)\n```\n"
    assert rewritten(f"{block}[a](docs/method.md)\n") == f"{block}[a](method.md)\n"


def test_a_link_to_nothing_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"README\.md: link to gone\.txt"):
        rewritten("[a](gone.txt)")


def test_a_section_of_another_file_is_taken_over() -> None:
    page = DOCS / "howto" / "index.md"
    text = links.site_text("<!-- from ../README.md: How to -->\nafter\n", page)
    assert "[Predict](predict.md)" in text
    assert "howto/" not in text
    assert text.endswith("after\n")


def test_every_page_made_of_a_file_outside_docs_has_its_file() -> None:
    assert [name for name in links.OUTSIDE if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script defer src="https://cdn.host/x.js"></script>', True),
        ('<link href="//cdn.host/x.css" rel="stylesheet">', True),
        ("<style>@font-face { src: url('https://cdn.host/x.woff2') }</style>", True),
        ('<script src="_static/x.js"></script><link rel="stylesheet" href="_static/x.css">', False),
        ('<a href="https://arxiv.org/abs/2304.02643">paper</a>', False),
    ],
)
def test_what_a_page_loads_from_a_server_is_found(text: str, loads: bool, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    assert bool(links.loads_from_elsewhere(tmp_path)) == loads
