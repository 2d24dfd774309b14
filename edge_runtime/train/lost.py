"""What a quantised weight lost: the leading directions of E = W - Q(W), by subspace iteration.

The spectrum of such an error is nearly flat: 16 directions of a 384 x 384 layer hold a sixth of it. What the layer's
outputs lose is not, because its inputs are not alike: some of their entries are many times as large as others. So the
directions are taken of E D, with D the root mean square of each input, and divided by D again: the best for the outputs
where the entries of an input do not correlate.

Four passes find as much of it as an exact decomposition does to within a twentieth, at the cost of a few thin products,
where the exact one of a 4096 x 4096 layer takes minutes on a small processor.

Sources: of the passes, Halko, Martinsson, Tropp, SIAM Review 53(2), 2011, algorithm 4.4; of directions beside a
quantised weight, LoftQ (Li et al., ICLR 2024, arXiv 2310.08659); of D, LQER (Zhang et al., ICML 2024, arXiv
2402.02446). Differs from LoftQ: they are frozen and belong to the base; from LQER: D is a root mean square, not a
largest value.
"""

from __future__ import annotations

from edge_runtime.errors import missing_extra

try:
    import torch
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

PASSES = 4
OVERSAMPLING = 8
LEAST = 1e-3
"""An input that is always smaller than this part of the layer's largest counts as if it had that size."""
Factors = tuple[torch.Tensor, torch.Tensor]


def leading(error: torch.Tensor, rank: int, sizes: torch.Tensor | None = None) -> Factors:
    """The leading directions of an error as two factors; the same error gives the same factors.

    Args:
        error: W - Q(W), (d_out, d_in), float32.
        rank: how many directions; all of them where the layer has fewer.
        sizes: (d_in,) root mean square of each entry of the layer's input; alike when absent.

    Returns:
        a (rank, d_in) and b (d_out, rank), float32, whose product is as near to the error as the rank permits.
    """
    rank = min(rank, *error.shape)
    columns = min(rank + OVERSAMPLING, *error.shape)
    weight = torch.ones(error.shape[1]) if sizes is None else sizes.clamp_min(LEAST * sizes.max())
    weighed = error * weight
    # A fixed seed: where the passes begin is of no meaning, and a base must be the same whenever it is prepared.
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(weighed @ torch.randn(error.shape[1], columns, generator=draw)).Q
    for _ in range(PASSES):
        basis = torch.linalg.qr(weighed @ torch.linalg.qr(weighed.T @ basis).Q).Q
    left, size, right = torch.linalg.svd(basis.T @ weighed, full_matrices=False)
    root = size[:rank].sqrt()
    return root[:, None] * right[:rank] / weight, (basis @ left[:, :rank]) * root
