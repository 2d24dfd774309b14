"""One BLAS thread for what is merged and judged: see docs/decisions/0004.

To find the libraries takes a millisecond, so they are looked for once, when the first is needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

from threadpoolctl import ThreadpoolController


@lru_cache(maxsize=1)
def _libraries() -> Any:
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Within it, products and decompositions take one thread."""
    limited: AbstractContextManager[Any] = _libraries().limit(limits=1)
    return limited
