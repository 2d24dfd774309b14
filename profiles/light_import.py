"""bitsandbytes without the compiler that it would bring along.

At its import bitsandbytes hands two functions for inference to `torch.compile`, which imports torch's compiler: 570
modules, 41 MiB and three seconds on a server's core, which a device that only trains never uses. Imported through here
it gets these functions back as they are: that is what it does itself wherever a compilation fails.

Source: `bitsandbytes.backends.default.ops._try_torch_compile`, version 0.50.2.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

COMPILES_AT_IMPORT = ("bitsandbytes", "peft")  # peft imports bitsandbytes


def light_import(name: str) -> ModuleType:
    """`importlib.import_module`, without compilation where the library asks for it at its import.

    Raises:
        ImportError: as import_module does.
    """
    if name.partition(".")[0] not in COMPILES_AT_IMPORT or name in sys.modules:
        return importlib.import_module(name)
    torch: Any = importlib.import_module("torch")
    before = torch.compile
    torch.compile = _uncompiled
    try:
        return importlib.import_module(name)
    finally:
        torch.compile = before


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _uncompiled
