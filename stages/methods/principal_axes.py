"""Principal axes of standardised rows: one decomposition that serves every linear fit to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stages.methods.regression import Floats, LinearFit, scale_of

RANK = 256
"""Principal axes at most; on real images all 512 of them were no better (docs/lab-notes.md)."""
EXACT = 1500
"""Up to this smaller side of the rows the decomposition is exact, beyond it randomised (Halko et al. 2011)."""

Rows = npt.NDArray[np.float32]


class PrincipalAxes(NamedTuple):
    """Rows in their principal axes. No label is used, so that rows of every fold may take part."""

    z: Rows
    """(n, r) coordinates of the rows, which have a mean square length of 1 at most."""
    axes: tuple[Rows, ...]
    """Factors of the (F, r) axes, of which z = (x - mean) / scale / sqrt(F) @ axes: their product is not needed."""
    mean: Floats
    """(F,) of the rows."""
    scale: Floats
    """(F,) standard deviation of the rows; 1 where they do not vary."""

    def linear_fit(
        self, weight: npt.NDArray[Any], bias: npt.NDArray[Any], held_out: npt.NDArray[Any], c: float, loss: float
    ) -> LinearFit:
        """Return a fit to `z` as a fit to the rows themselves.

        Args:
            weight: (r, C).
            bias: (C,).
            held_out: (n, C) logits by fits that did not see the row.
            c: Inverse of the penalty.
            loss: Log-loss of `held_out`.
        """
        in_features = weight.astype(np.float32) / np.sqrt(len(self.mean), dtype=np.float32)
        for factor in reversed(self.axes):
            in_features = factor @ in_features
        parts = (in_features.T, bias, self.mean, self.scale, held_out)
        tensors = [torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)) for part in parts]
        return LinearFit(tensors[0], tensors[1], tensors[2], tensors[3], c, loss, tensors[4])


def principal_axes(x: Rows) -> PrincipalAxes:
    """Standardise rows (n, F), and turn them to their principal axes, the longest first."""
    mean = x.mean(axis=0, dtype=np.float64)
    centred = x - mean.astype(np.float32)
    scale = scale_of(mean, np.sqrt(np.square(centred).mean(axis=0, dtype=np.float64)))
    centred /= (scale * np.sqrt(x.shape[1])).astype(np.float32)
    axes, z = _decompose(centred)
    return PrincipalAxes(z, axes, mean, scale)


def _decompose(x: Rows) -> tuple[tuple[Rows, ...], Rows]:
    """Return factors of the axes (F, r), and the coordinates (n, r) of rows, the largest first."""
    count, features = x.shape
    smaller = min(count, features)
    if smaller > EXACT:
        from sklearn.utils.extmath import randomized_svd

        left, sizes, right = randomized_svd(x, RANK, n_iter=3, random_state=0)
        rank = _rank(sizes)
        return (right[:rank].T,), left[:, :rank] * sizes[:rank]
    # The smaller product: its eigenvalues are the squares of the singular values.
    product = (x @ x.T if count <= features else x.T @ x).astype(np.float64)
    squares, vectors = np.linalg.eigh(product)
    sizes = np.sqrt(np.maximum(squares[::-1][:RANK], 0.0))
    rank = _rank(sizes)
    vectors = vectors[:, ::-1][:, :rank].astype(np.float32)
    if count > features:
        return (vectors,), x @ vectors
    lengths = sizes[:rank].astype(np.float32)
    return (x.T, vectors / lengths), vectors * lengths


def _rank(sizes: npt.NDArray[Any]) -> int:
    """Return the number of axes that are more than rounding."""
    return max(1, int((sizes > 1e-3 * sizes[0]).sum()))
