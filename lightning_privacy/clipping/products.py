"""Products whose result bounds a contribution: in float32 or better, whatever comes in.

Legend: ``U`` units, ``M`` positions of a unit.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_privacy.clipping import kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

# Below twice this many positions a blocked, symmetric Gram costs more in launches than it saves.
_BLOCK = 64

# A square below the smallest number is none: one factor may be 1e-22 and look like zero, while the
# other is 1e19. So each element of a factor counts as this much in what rounding is relative to,
# which its margin (of 2.5e-7 and 1e-15 at the least) turns into a smallest number again.
_HIDDEN = {torch.float32: 2.0**-104, torch.float64: 2.0**-972}


@contextmanager
def full_precision() -> Iterator[None]:
    """Context in which products and convolutions of float32 are float32.

    With `torch.set_float32_matmul_precision`, "high" or "medium", their factors are rounded to 11
    or 8 bits: a norm by Gram products could then be far below the norm of what is added.
    """
    found: Any = torch.backends
    cudnn = (found.cudnn.conv, found.cudnn.rnn)
    backends = (found.cuda.matmul, found.mkldnn.matmul, *cudnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms and sums are kept in float32 or better, whatever the gradients' type."""
    return torch.promote_types(dtype, torch.float32)


def hidden(dtype: torch.dtype) -> float:
    """What the square of an element may be besides what it seems, for a margin's sake."""
    return _HIDDEN[accumulation_dtype(dtype)]


def gram_product(lefts: Sequence[Tensor], right: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of ``left^T right`` per unit, for the lefts side by side.

    ``|l^T r|^2 = sum((l l^T) * (r r^T))``; the Gram matrix of lefts side by side is the sum of
    theirs. (The "ghost norm", Li et al. 2022, arXiv 2110.05679, section 4.)

    Args:
        lefts: each ``[U, M, a]``, of any widths ``a``.
        right: ``[U, M, b]``.

    Returns:
        The squared norms ``[U]``, and ``[U]`` sums over positions of ``|left_m| |right_m|``, whose
        square is what rounding in the first is relative to (each element with `hidden`).
    """
    if kernels.serve(*lefts, right):
        product, largest = kernels.gram_products([(lefts, right)], hidden(right.dtype))
        return product[0], largest[0]
    widths = sum(left.shape[2] for left in lefts), right.shape[2]
    least = (hidden(right.dtype) * widths[0], hidden(right.dtype) * widths[1])
    positions = right.shape[1]
    block = _BLOCK if positions >= 2 * _BLOCK and not right.is_cuda else positions
    product = right.new_zeros(right.shape[0], dtype=accumulation_dtype(right.dtype))
    largest = torch.zeros_like(product)
    for start in range(0, positions, block):
        # Rows of the lower triangle: what lies before the diagonal block stands for both halves.
        rows, until = slice(start, start + block), slice(0, start + block)
        own = _gram(lefts, rows, until), _gram([right], rows, until)
        squares = [part[:, :, start:].diagonal(dim1=1, dim2=2).clamp_min(0) for part in own]
        largest += ((squares[0] + least[0]) * (squares[1] + least[1])).sqrt().sum(1)
        if start:
            own[0][:, :, start:].mul_(0.5)
        product += (2 if start else 1) * _dot(*own)
    return product, largest


def gram_products(
    layers: Sequence[tuple[Sequence[Tensor], Tensor]],
) -> tuple[Tensor, Tensor]:
    """`gram_product` of several layers, whose order does not matter.

    Args:
        layers: lefts and right of each; the rights are of one type.

    Returns:
        As `gram_product`, ``[L, U]``.
    """
    served, found = [], []
    for lefts, right in layers:
        if kernels.serve(*lefts, right):
            served.append((lefts, right))
        else:
            product, largest = gram_product(lefts, right)
            found.append((product[None], largest[None]))
    if served:
        found.append(kernels.gram_products(served, hidden(served[0][1].dtype)))
    products, sizes = zip(*found, strict=True)
    return torch.cat(products), torch.cat(sizes)


def gram(tensor: Tensor) -> Tensor:
    """``tensor tensor^T [U, M, M]`` of ``tensor [U, M, d]``, in float32 or better."""
    every = slice(None)
    return _gram([tensor], every, every)


def skips_zeros(rows: Tensor) -> bool:
    """Whether `weighted_rows` does not even read what has a coefficient of zero, NaN or not."""
    return kernels.serve(rows)


def weighted_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
    """``sum_u coefficients[u] * rows[u]`` of ``rows [U, n]``, in float32 or better."""
    if kernels.serve(rows):
        return kernels.weighted_rows(coefficients, rows)
    return sum_of_products(coefficients[:, None], rows)[0]


def scaled_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
    """``coefficients[u] * rows[u]`` of ``rows [U, ..]``, in float32 or better.

    On a GPU in the type of ``rows``, in which their products are fast.
    """
    if kernels.serve(rows):
        return kernels.scaled_rows(coefficients, rows)
    dtype = rows.dtype if rows.is_cuda else accumulation_dtype(rows.dtype)
    return rows * coefficients.to(dtype).view(-1, *[1] * (rows.dim() - 1))


def sum_of_products(first: Tensor, second: Tensor) -> Tensor:
    """``first^T second``, summed and returned in float32 or better.

    A sum rounded to bfloat16 would be off by 0.4 % of all units' gradients together, which is far
    more than 0.4 % of one unit's.
    """
    dtype = accumulation_dtype(second.dtype)
    if second.is_cuda and second.dtype != dtype:
        return torch.mm(first.to(second.dtype).t(), second, out_dtype=dtype)
    return torch.mm(first.to(dtype).t(), second.to(dtype))


def _gram(tensors: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
    """The sum of ``tensor[rows] tensor[columns]^T`` per unit, in float32 or better."""
    dtype = accumulation_dtype(tensors[0].dtype)
    total = None
    for tensor in tensors:
        if tensor.dtype != dtype and tensor.is_cuda:
            own = torch.bmm(tensor[:, rows], tensor[:, columns].mT, out_dtype=dtype)
            total = own if total is None else total.add_(own)
            continue
        first, second = tensor[:, rows].to(dtype), tensor[:, columns].to(dtype).mT
        total = torch.bmm(first, second) if total is None else total.baddbmm_(first, second)
    assert total is not None
    return total


def _dot(first: Tensor, second: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(first.flatten(1), second.flatten(1))
    return products
