"""Opt-in torch.compile of the side network's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from schemas.errors import PlatformError
from stages.methods.base import Network


def compile_blocks(networks: Sequence[Network], device: torch.device) -> None:
    """Compile the blocks of networks, in place; names and weights of the networks stay as they are.

    Blocks of one shape share one compiled function, whatever their number; of side networks two are compiled, since the
    last computes only the class token. That takes about half a minute per training. Shapes are fixed: dynamic ones are
    slower, and `eager_unless` runs the last smaller batch as it stands.

    Raises:
        PlatformError: If nothing can be compiled here.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # of each backend its own
        raise PlatformError(
            f"torch {torch.__version__} cannot compile for {device.type}: {str(error).strip().splitlines()[0]}",
            "There is no C++ compiler, or none of Triton for this GPU.",
            "Install one (such as g++), or set train.compile to false.",
        ) from error
    for network in networks:
        for block in network.compiled_blocks():
            block.compile(dynamic=False)


def eager_unless(compiled: bool) -> AbstractContextManager[object]:
    """Context in which nothing compiled is used, unless `compiled`."""
    return nullcontext() if compiled else torch.compiler.set_stance("force_eager")
