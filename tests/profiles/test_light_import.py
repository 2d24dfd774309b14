"""bitsandbytes and PEFT come without torch's compiler, and torch's compiler stays what it was."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from profiles.light_import import light_import

pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.torch

SCRIPT = """
import json, sys, torch
from profiles.light_import import light_import
before = torch.compile
library = light_import("bitsandbytes")
weight = torch.randn(64, 64)
packed, state = library.functional.quantize_4bit(weight, quant_type="nf4")
error = float((library.functional.dequantize_4bit(packed, state) - weight).abs().max())
print(json.dumps(["torch._inductor.compile_fx" in sys.modules, torch.compile is before, error]))
"""


def test_the_compiler_stays_outside_and_the_library_works() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    compiler, kept, error = json.loads(done.stdout.splitlines()[-1])

    assert not compiler
    assert kept
    assert error < 1.0


def test_other_modules_are_imported_as_ever() -> None:
    assert light_import("json") is json
    with pytest.raises(ImportError):
        light_import("no_module_of_this_name")
