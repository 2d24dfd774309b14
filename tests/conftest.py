"""The tiny base model of the tests of training, for every room that runs one."""

from __future__ import annotations

from tests.train.conftest import build_tiny_base, tiny_base

__all__ = ["build_tiny_base", "tiny_base"]
