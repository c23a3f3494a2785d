"""What the masks of a batch say of the rows and columns to measure: worked out once for all layers of a forward.

Legend: as in metrics.py. Each property is computed when it is first asked for, and kept.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class RowMasks:
    real_BN: Tensor
    """bool, as the next two."""
    response_BN: Tensor
    rows_BN: Tensor
    """The rows that are measured."""
    horizon: tuple[int, int]

    @cached_property
    def count_B1(self) -> Tensor:
        """Measured rows of a text."""
        return self.rows_BN.sum(1, keepdim=True)

    @cached_property
    def in_horizon_BN(self) -> Tensor:
        """Measured rows inside the horizon of each column."""
        low, high = self.horizon
        N = self.rows_BN.shape[1]
        column_N = torch.arange(N, device=self.rows_BN.device)
        before_BN = pad(self.rows_BN.cumsum(1), (1, 0))
        return before_BN[:, (column_N + high + 1).clamp(max=N)] - before_BN[:, (column_N + low).clamp(max=N)]

    # -- for blocks of rows, as metrics.py takes them ------------------------------------------------------------------

    @cached_property
    def active(self) -> list[int]:
        """Columns that are a measured row of some text."""
        return _columns(self.rows_BN)

    @cached_property
    def first_key(self) -> int:
        """The first column that is real in some text."""
        return _columns(self.real_BN)[0]

    @cached_property
    def hidden_BN(self) -> Tensor:
        """Padding that a row could see: what lies after a text's last row is hidden by the causal mask already.

        Up to the last such column of any text.
        """
        hidden_BN = ~self.real_BN & (self.rows_BN.flip(1).cumsum(1).flip(1) > 0)
        return hidden_BN[:, : max(_columns(hidden_BN), default=-1) + 1]

    # -- for tiles, as kernels.py takes them ---------------------------------------------------------------------------

    @cached_property
    def flags_BN(self) -> Tensor:
        """Bits: 1 real, 2 measured, 4 response. int32: a GPU fetches nothing smaller ahead."""
        return self.real_BN.int() + 2 * self.rows_BN.int() + 4 * self.response_BN.int()

    @cached_property
    def first_key_B(self) -> Tensor:
        return self.real_BN.int().argmax(1).int()

    @cached_property
    def clear_from_B(self) -> Tensor:
        """The first column from which on, up to the last measured row, all are real; int32."""
        column_N = torch.arange(1, self.real_BN.shape[1] + 1, device=self.real_BN.device, dtype=torch.int32)
        last_row_B1 = (self.rows_BN * column_N).amax(1, keepdim=True)
        return (~self.real_BN & (column_N < last_row_B1)).mul(column_N).amax(1)


def row_masks(
    attention_mask: Tensor, response_mask: Tensor, horizon: tuple[int, int], rows: str, device: torch.device
) -> RowMasks:
    """masks (B, N): 1 = real / response token. rows: "token" or "predictor", as in `attention_metrics`."""
    real_BN = attention_mask.to(device, torch.bool).contiguous()  # kernels read flat memory
    response_BN = response_mask.to(device, torch.bool).contiguous() & real_BN
    rows_BN = response_BN
    if rows == "predictor":
        rows_BN = torch.zeros_like(response_BN)
        rows_BN[:, :-1] = response_BN[:, 1:] & real_BN[:, :-1]
    return RowMasks(real_BN, response_BN, rows_BN, horizon)


def _columns(mask_BN: Tensor) -> list[int]:
    """The columns that are set in some text."""
    found: list[int] = mask_BN.any(0).nonzero().flatten().tolist()
    return found
