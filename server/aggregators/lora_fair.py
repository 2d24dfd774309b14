"""LoRA-FAIR: the mean of factors, and then a correction of `b` towards the mean of products.

    A = sum_k p_k A_k,  B = sum_k p_k B_k,  W* = sum_k p_k B_k A_k,   A+ = A,  B+ = B + D

    ridge    D = (W* - B A) Aᵀ (A Aᵀ + l m I)⁻¹            which minimises ||W* - (B + D) A||² + l m ||D||²
    cosine   D minimises 1 - cos(W*, (B + D) A) + l ||D||   the paper's

m is the mean squared norm of the rows of A, so that l means the same at every scale of `a`.

Source: Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025,
arXiv 2411.14961; the closed form is our own.

Differs from the paper: `ridge`, the default, needs no descent; `cosine` goes down by proximal steps, whose lengths
follow from the curvature, and not by SGD. W* is never formed: all that is needed of it is W* Aᵀ and its norm.

Bias: what of W* lies outside the rows of A is lost, and l keeps the correction small: it holds on to the factors that
devices know, which the paper finds to matter more than exactness.

Cost: O((d_out + d_in) r R) a layer, R = sum r_k; `cosine` adds O(d_out r²) a step.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import Wide, norm, size_of, stack
from server.aggregators.fedit import merge_layer as averaged
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, LayerReport

VARIANTS = ("ridge", "cosine")
STRENGTH = 0.01
STEPS = 200


def lora_fair(engine: Engine = local, /, *, variant: str = "ridge", strength: float = STRENGTH) -> Aggregator:
    """The corrected mean of factors.

    Args:
        engine: merges the layers.
        variant: of VARIANTS.
        strength: l of the formula, above 0.

    Raises:
        ValueError: no such variant, or a strength that is not positive.
    """
    if variant not in VARIANTS:
        raise ValueError(f"aggregator.variant must be one of {', '.join(VARIANTS)}; found {variant!r}")
    if not 0 < strength < float("inf"):
        raise ValueError(f"aggregator.strength must be positive; found {strength}")

    return averaging(
        partial(merge_layer, variant=variant, strength=strength), engine, exact=False, equal_ranks=True, of_factors=True
    )


def merge_layer(task: LayerTask, *, variant: str, strength: float) -> LayerResult:
    """New global pair and report of one layer.

    Raises:
        AggregationError: an update of another rank.
    """
    mean = averaged(task).pair
    left, right = stack((part.share, part.trained) for part in task.shares)
    a, b = mean.a.astype(np.float64), mean.b.astype(np.float64)
    across, gram = left @ (right @ a.T), a @ a.T
    if variant == "ridge":
        moved = ridge(across - b @ gram, gram, strength)
    else:
        moved = cosine(across, gram, b, size_of(left, right), strength)
    merged = Pair(mean.a, (b + moved).astype(np.float32))
    return LayerResult(merged, None, LayerReport(len(task.shares), norm(merged), 0.0, 0.0))


def ridge(lacking: Wide, gram: Wide, strength: float) -> Wide:
    """D from (W* - B A) Aᵀ and A Aᵀ."""
    scale = float(np.mean(np.diag(gram)))
    if not scale:
        return np.zeros_like(lacking)
    return np.asarray(np.linalg.solve(gram + strength * scale * np.eye(len(gram)), lacking.T).T, np.float64)


def cosine(across: Wide, gram: Wide, b: Wide, size: float, strength: float) -> Wide:
    """D by proximal steps down 1 - cos + l ||D||.

    Args:
        across: W* Aᵀ, (d_out, r).
        gram: A Aᵀ, (r, r).
        b: B, (d_out, r).
        size: ||W*||.
        strength: l.
    """
    moved, widest = np.zeros_like(b), float(np.linalg.norm(gram, 2))
    for _ in range(STEPS):
        at = b + moved
        length = float(np.sqrt(max(np.sum((at @ gram) * at), 0.0)))
        if not length or not size:
            break  # a product of zero has no direction
        slope = np.sum(across * at) / (size * length**3) * (at @ gram) - across / (size * length)
        step = length**2 / (2 * widest)
        moved = moved - step * slope
        reach = float(np.linalg.norm(moved))
        # The norm has a kink at zero, so it is its proximal map that is taken, and not its gradient.
        moved *= max(0.0, 1.0 - step * strength / reach) if reach else 0.0
    return moved
