"""The rows of a dense tensor in a live model: some trained, the others held, in the order in which they were loaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edge_runtime.lora.adapter import LayerSlot, Matrix, Pair


class DenseTensor(torch.nn.Module):
    """A change of zero until it is loaded; see `edge_runtime.lora.dense`.

    Attributes:
        a: (r, w) float32, trained; None where nothing is.
        held_a: (h - r, w) float32, frozen; None where nothing is.
        rows: which of the h rows are trained, in the order of `a`.
    """

    def __init__(self, slot: LayerSlot, device: torch.device) -> None:
        """All zero, with the first rows trained."""
        super().__init__()

        def zeros(rows: int) -> torch.nn.Parameter | None:
            return (
                torch.nn.Parameter(torch.zeros(rows, slot.d_in, device=device), requires_grad=False) if rows else None
            )

        self.a, self.held_a = zeros(slot.trained), zeros(slot.held - slot.trained)
        self._columns: Matrix = np.eye(slot.d_out, slot.held, dtype=np.float32)
        self.rows: tuple[int, ...] = ()
        self._arrange(range(slot.trained))

    def forward(self) -> torch.Tensor:
        """(h, w), differentiable in the rows that are trained."""
        parts: list[torch.Tensor] = [part for part in (self.a, self.held_a) if part is not None]
        return parts[0] if len(parts) == 1 and self._in_order else torch.cat(parts).index_select(0, self._order)

    def load(self, pair: Pair, rows: Sequence[int]) -> None:
        """Write the h rows of a pair, of which those named are trained."""
        self._arrange(rows)
        self._columns = pair.b
        for parameter, chosen in ((self.a, self.rows), (self.held_a, self._others())):
            if parameter is not None:
                with torch.no_grad():
                    parameter.copy_(torch.from_numpy(np.ascontiguousarray(pair.a[list(chosen)])))

    def trained(self) -> Pair:
        """The rows that are trained, in the order in which they are."""
        if self.a is None:
            raise ValueError("no row of this tensor is trained")
        return Pair(_numpy(self.a), np.ascontiguousarray(self._columns[:, list(self.rows)]))

    def whole(self) -> Pair:
        """All rows, as they were loaded."""
        with torch.no_grad():
            return Pair(_numpy(self()), self._columns)

    def _others(self) -> tuple[int, ...]:
        return tuple(row for row in range(self._columns.shape[1]) if row not in self.rows)

    def _arrange(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        order = np.argsort([*self.rows, *self._others()])
        self._in_order = bool((order == np.arange(order.size)).all())
        device = next(part.device for part in (self.a, self.held_a) if part is not None)
        self._order = torch.from_numpy(order).to(device)


def _numpy(values: torch.Tensor) -> Matrix:
    # A copy: the values must not follow the parameter through the steps to come.
    return np.array(values.detach().to("cpu", torch.float32).numpy(), copy=True)
