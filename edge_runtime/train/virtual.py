"""Virtual tokens: before each example stand tokens that nobody wrote, and that only this module and its wrappers know.

Whoever calls the model passes the examples as they are, packed or side by side, and gets back what belongs to their own
tokens. On the way in, n virtual tokens are put before each example and its positions move on by n; on the way out their
hidden states are dropped. With a cache, later tokens find them in it.

    prompt   their embeddings are trained                               prompt tuning, arXiv 2104.08691
    prefix   their keys and values are trained, in every layer          prefix tuning, arXiv 2101.00190

The keys of a prefix are trained before positions turn them, as virtual tokens of positions 0 to n - 1: the same
functions as with keys that are trained afterwards, in another gauge. What the virtual tokens of a prefix compute
besides is dropped; they cost what n more tokens cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edge_runtime.lora.named_draws import virtual_rows
from edge_runtime.train.dense_tensor import DenseTensor
from edge_runtime.train.lora_linear import frozen_product
from edge_runtime.train.loss import PACKED_LENGTHS


def _start(tensor: DenseTensor, name: str) -> torch.Tensor:
    rows = tensor().detach()
    return torch.from_numpy(virtual_rows(name, *rows.shape)).to(rows.device)


class Prompted(torch.nn.Module):
    """An embedding that knows those of the virtual tokens."""

    def __init__(self, base: Any, tensor: DenseTensor, name: str) -> None:
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True
        self.virtual: VirtualTokens | None = None
        self.start = _start(tensor, name)

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        weight: torch.Tensor = self.base.weight
        return weight

    @property
    def rows(self) -> torch.Tensor:
        """(n, d), the embeddings of the virtual tokens."""
        rows: torch.Tensor = self.start + self.tensor()
        return rows

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Of real tokens alone."""
        embedded: torch.Tensor = self.base(input_ids)
        return embedded


class Prefixed(torch.nn.Module):
    """A layer that makes keys or values, and has those of the virtual tokens."""

    def __init__(self, base: Any, tensor: DenseTensor, name: str) -> None:
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True
        self.virtual: VirtualTokens | None = None
        self.start = _start(tensor, name)

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        weight: torch.Tensor = self.base.weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, d_in) → (rows, tokens, d_out)."""
        y = frozen_product(self.base, x)
        numbers = self.virtual.numbers if self.virtual is not None else None
        if not self.enabled or numbers is None:
            return y
        own = (self.start + self.tensor()).to(y.dtype)
        return torch.where((numbers >= 0)[:, None], own[numbers.clamp(min=0)], y)


class VirtualTokens:
    """Puts the virtual tokens into what a backbone is called with, and takes them out of what it returns.

    Attributes:
        numbers: (tokens,) of the row that passes through, or of each of the rows: the virtual token's number, and -1
            for a real one; None where there are none.
    """

    def __init__(self, backbone: Any, wrappers: Sequence[Any]) -> None:
        """Of a transformers model without its head, in which these wrappers stand."""
        self.numbers: torch.Tensor | None = None
        self._real: torch.Tensor | None = None
        self._wrappers = tuple(wrappers)
        for wrapper in self._wrappers:
            wrapper.virtual = self
        self._handles = (
            backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            backbone.register_forward_hook(self._leave),
        )

    def remove(self) -> None:
        """Leave the backbone as it was."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self.numbers = self._real = None
        if not any(wrapper.enabled for wrapper in self._wrappers):
            return None
        given = dict(kwargs)
        ids = args[0] if args else given.pop("input_ids", None)
        embeds = given.pop("inputs_embeds", None)
        embeds = backbone.get_input_embeddings()(ids) if embeds is None else embeds
        count = int(self._wrappers[0].start.shape[0])
        mask, positions, cache = (given.get(key) for key in ("attention_mask", "position_ids", "past_key_values"))
        if mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], 1)
        if cache is not None and cache.get_seq_length():
            # They are in the cache, so whoever continues comes after them.
            if positions is not None:
                given["position_ids"] = positions + count
            return (), {**given, "inputs_embeds": embeds}
        lengths = given.get(PACKED_LENGTHS)
        order = _order(tuple(lengths or (embeds.shape[1],)), count, embeds.device)
        self.numbers, self._real = torch.where(order < count, order, -1), (order >= count).nonzero().flatten()
        if lengths:
            given[PACKED_LENGTHS] = tuple(length + count for length in lengths)
        if positions is not None:
            first = torch.arange(count, device=positions.device).expand(len(positions), -1)
            given["position_ids"] = torch.cat([first, positions + count], 1).index_select(1, order)
        given["inputs_embeds"] = torch.cat([self._rows(embeds, count), embeds], 1).index_select(1, order)
        return (), given

    def _rows(self, embeds: torch.Tensor, count: int) -> torch.Tensor:
        """(rows, n, d) of what passes in: trained, or nothing, where keys and values are all that they are for."""
        first = self._wrappers[0]
        rows = first.rows.to(embeds.dtype) if isinstance(first, Prompted) else embeds.new_zeros(count, embeds.shape[-1])
        return rows.expand(len(embeds), -1, -1)

    def _leave(self, _backbone: Any, _args: Any, output: Any) -> Any:
        if self._real is not None:
            output.last_hidden_state = output.last_hidden_state.index_select(1, self._real)
        return output


def _order(lengths: tuple[int, ...], count: int, device: torch.device) -> torch.Tensor:
    """(tokens,) of virtual tokens 0 … count - 1 and, from `count` on, those of the row: each example after its own."""
    parts, start = [], count
    for length in lengths:
        parts += [torch.arange(count), torch.arange(start, start + length)]
        start += length
    return torch.cat(parts).to(device)
