"""How torch computes in this process."""

from __future__ import annotations

from edge_runtime.errors import missing_extra

try:
    import torch
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing


def place(threads: int) -> str:
    """Let torch have so many threads; where a base goes, in torch's words: "cuda" where there is a card, else "cpu"."""
    torch.set_num_threads(threads)
    return "cuda" if torch.cuda.is_available() else "cpu"
