"""Silence around the model libraries: no progress bars, no advice and no telemetry where only our own words belong."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from edge_runtime.errors import missing_extra

try:
    import huggingface_hub.constants
    import transformers
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "transformers", "client") from missing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers, huggingface_hub and bitsandbytes report errors only; telemetry is off from then on."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    # bitsandbytes advises to install `kernels`, which fetches code from the hub when it is imported.
    bitsandbytes = logging.getLogger("bitsandbytes")
    level, verbosity = bitsandbytes.level, transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    bitsandbytes.setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes.setLevel(level)
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
