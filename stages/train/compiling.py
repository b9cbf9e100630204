"""Optional torch.compile of the side network's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from schemas.errors import PlatformError
from stages.methods.base import Network


def compile_blocks(networks: Sequence[Network], device: torch.device) -> None:
    """Compile the blocks of networks in place; parameter names and weights do not change.

    Blocks of equal shape share one compiled function. Side networks need two, since the last block computes only the
    class token, which takes about half a minute per training. Shapes are static, because dynamic ones are slower;
    `eager_unless` runs a smaller last batch without compilation.

    Raises:
        PlatformError: If this machine cannot compile.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # each backend raises its own type
        raise PlatformError(
            f"torch {torch.__version__} cannot compile for {device.type}: {str(error).strip().splitlines()[0]}",
            "There is no C++ compiler, or Triton does not support this GPU.",
            "Install one (such as g++), or set train.compile to false.",
        ) from error
    for network in networks:
        for block in network.compiled_blocks():
            block.compile(dynamic=False)


def eager_unless(compiled: bool) -> AbstractContextManager[object]:
    """Return a context in which compiled functions run eagerly, unless `compiled`."""
    return nullcontext() if compiled else torch.compiler.set_stance("force_eager")
