"""Tokens of several levels in one buffer, so that a layer is one product over all of them.

Level-major: all sequences of level 0, then all of level 1 and so on; each level's part is a dense
(B, K_l, D) view, because K_l is the same for every sample. Shapes: B samples, L levels, K_l tokens
of a sample at level l, T = sum of B K_l, S = L B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each sequence lies in a packed (T, D) buffer.

    batch : B, sequences of each level; lengths : K_l of each level, none empty
    """

    batch: int
    lengths: tuple[int, ...]
    _cu_tokens: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """T, rows of the buffer."""
        return self.batch * sum(self.lengths)

    @property
    def sequences(self) -> int:
        """S, the number of sequences."""
        return self.batch * len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def pack(self, parts: list[Tensor]) -> Tensor:
        """One (B, K_l, D) a level -> (T, D); a view where there is one level."""
        if len(parts) == 1:
            return parts[0].flatten(0, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def views(self, x: Tensor) -> list[Tensor]:
        """(T, ...) -> its (B, K_l, ...) a level, without a copy."""
        parts = x.split([self.batch * length for length in self.lengths])
        return [part.unflatten(0, (self.batch, -1)) for part in parts]

    def cu_tokens(self, device: torch.device) -> Tensor:
        """(S + 1,) int32: sequence s is the rows cu[s] .. cu[s + 1]. Made once a device."""
        if device not in self._cu_tokens:
            ends, first = [torch.zeros(1, dtype=torch.int32, device=device)], 0
            for length in self.lengths:  # made there: nothing is copied from the host, which a GPU would wait for
                ends.append(torch.arange(1, self.batch + 1, dtype=torch.int32, device=device) * length + first)
                first += self.batch * length
            self._cu_tokens[device] = torch.cat(ends)
        return self._cu_tokens[device]


@lru_cache(maxsize=256)
def packing_of(batch: int, lengths: tuple[int, ...]) -> Packing:
    """The one Packing of these sizes: what it has moved to a device is moved once a run."""
    return Packing(batch, lengths)
