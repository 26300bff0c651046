"""An output head in 8 bits with the same best tokens as the head in 16 or 32 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.ops import reference
from coterie.ops.cpu.experts import release_pages
from coterie.quantization import QTensor, dequantize
from coterie.values import Matrix, PackedMatrix

BLOCK = 64  # rows that share one bound
CHUNK_ROWS = 1 << 8  # read at once
ROUNDING = 2.0**-22
"""A sum of k products in fp32 errs by less than k times this share of the product of the norms:
four times the textbook bound, for both products and the norms themselves."""
SLACK = 1.001  # for the rounding of the bound


@dataclass(frozen=True)
class QuantizedHead:
    """A head [V, H] in 8 bits, with the rows as they were.

    For a row w and its quantised row v, and a token x that is rounded to y, w x - v y is
    (w - v) x + v (x - y). By Cauchy-Schwarz it is at most |w - v| |x| + |v| |x - y|.
    """

    rows: Tensor  # [V, H] as stored
    quantized: Matrix  # [V, H] in 8 bits
    largest: Tensor  # [blocks] fp32: the largest |v| of a block of rows
    error: Tensor  # [blocks] fp32: the largest |w - v|

    @staticmethod
    def of(rows: Tensor, quantized: QTensor, *, in_file: bool = False) -> QuantizedHead:
        """Takes over both weights. With ``in_file``, rows are mapped, and read again when used."""
        norms = torch.empty(2, len(rows))
        for first in range(0, len(rows), CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            values = dequantize(quantized[chunk])
            norms[0, chunk] = values.norm(dim=1)
            norms[1, chunk] = (rows[chunk].float() - values).norm(dim=1)
            if in_file:
                release_pages([rows[: chunk.stop]])
        largest, error = _block_maxima(norms)
        return QuantizedHead(
            rows, ops.prepare_matrix(quantized, release_source=True), largest, error
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [P, V] fp32 of x [P, H]; the two largest of each row, and ties, are exact.

        So are the argmax, the argmax without any one token, and their logits. Others may be those
        of the 8-bit product; they are smaller than these two.
        """
        logits = ops.linear(x, self.quantized, dtype=torch.float32)
        peaks, bound = _block_maxima(logits), self.bound(x)  # [P, blocks] each
        two = _two_best(logits, peaks)
        self._make_exact(logits, x, two.unique())
        # At least two logits are not smaller: those of these two ids.
        least = logits.gather(1, two).amin(1, keepdim=True)
        self._make_exact(logits, x, _reaching(least, logits, peaks, bound))
        return logits

    def bound(self, x: Tensor) -> Tensor:
        """[P, blocks]: no 8-bit logit of x [P, H] errs by more."""
        size = x.float().norm(dim=-1, keepdim=True)
        rounding = (x.float() - reference.round_activations(x)).norm(dim=-1, keepdim=True)
        share = ROUNDING * x.shape[-1]
        weights = self.error + share * (self.largest + self.error)
        return SLACK * (weights * size + self.largest * rounding)

    def _make_exact(self, logits: Tensor, x: Tensor, ids: Tensor) -> None:
        """Writes the logits of ids [C]; in bf16 they equal those of the packed head bit by bit."""
        for chunk in ids.split(CHUNK_ROWS):
            rows = self.rows[chunk]
            if isinstance(self.quantized, PackedMatrix) and x.dtype == torch.bfloat16:
                # A sum does not depend on which factor is packed, and x is far smaller.
                exact = ops.linear(rows, ops.prepare_matrix(x), dtype=torch.float32).T
            else:
                exact = F.linear(x.float(), rows.float())
            logits.index_copy_(1, chunk, exact)


def _block_maxima(values: Tensor) -> Tensor:
    """[n, V] -> [n, blocks]: the maximum of each block of columns."""
    whole = values.shape[1] // BLOCK * BLOCK
    maxima = values[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1)
    if whole == values.shape[1]:
        return maxima
    return torch.cat((maxima, values[:, whole:].amax(-1, keepdim=True)), dim=1)


def _ids_of(blocks: Tensor, vocabulary: int) -> Tensor:
    """[..., BLOCK]: the ids of blocks [...]; those past the end are the last."""
    return (blocks[..., None] * BLOCK + torch.arange(BLOCK)).clamp(max=vocabulary - 1)


def _two_best(logits: Tensor, peaks: Tensor) -> Tensor:
    """Two ids of each row [P, 2]: the best of the two best blocks."""
    if peaks.shape[1] < 2:
        return logits.topk(min(2, logits.shape[1])).indices
    ids = _ids_of(peaks.topk(2).indices, logits.shape[1])  # [P, 2, BLOCK]
    place = logits.gather(1, ids.flatten(1)).view(ids.shape).argmax(-1, keepdim=True)
    return ids.gather(-1, place).squeeze(-1)


def _reaching(least: Tensor, logits: Tensor, peaks: Tensor, bound: Tensor) -> Tensor:
    """The ids [C] with a logit that may be ``least`` [P, 1] or more in a row, ascending."""
    row, block = torch.nonzero(peaks + bound >= least, as_tuple=True)
    ids = _ids_of(block, logits.shape[1])
    return ids[logits[row[:, None], ids] + bound[row, block, None] >= least[row]].unique()
