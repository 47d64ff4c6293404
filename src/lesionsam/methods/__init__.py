"""Training methods: a batch to named loss terms."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.methods.base import Method, Term
    from lesionsam.methods.contrastive import Contrastive
    from lesionsam.methods.supervised import Supervised

__all__ = ["Contrastive", "Method", "Supervised", "Term"]
__getattr__, __dir__ = lazy_names(__name__, base="Method Term", contrastive="Contrastive", supervised="Supervised")
