"""`lesionsam data check`: find items, inspect each, write a page."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.data.check.checks import check
    from lesionsam.data.check.items import find_items
    from lesionsam.data.check.page import write_page

__all__ = ["check", "find_items", "write_page"]
__getattr__, __dir__ = lazy_names(__name__, checks="check", items="find_items", page="write_page")
