"""Import torchvision and timm without torch's compiler, which takes as long to import as torch itself.

Only `train.compile` needs the compiler (`torch._dynamo`, with sympy and a thousand more modules). torchvision imports
it for a check in an object detection operator, timm for a decorator of a model that cannot be an LPM; here it is
imported only when these are called.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"
_UTILS = "torch._dynamo.utils"
_disable: Callable[..., Any] = torch.compiler.disable


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Keep torchvision and timm from importing torch's compiler in the block; any other use of it still imports it."""
    if _COMPILER in sys.modules:
        yield
        return
    sys.modules[_UTILS] = _Utils(_UTILS)
    vars(torch.compiler)["disable"] = _disable_when_called
    try:
        yield
    finally:
        vars(torch.compiler)["disable"] = _disable
        _forget()


class _Utils(ModuleType):
    """Stand-in for `torch._dynamo.utils`, replaced by the real module if anything but one function is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "is_compile_supported":
            return _is_compile_supported
        _forget()
        return getattr(importlib.import_module(_UTILS), name)


def _forget() -> None:
    if isinstance(sys.modules.get(_UTILS), _Utils):
        del sys.modules[_UTILS]


def _is_compile_supported(device: str) -> Any:
    return importlib.import_module(_UTILS).is_compile_supported(device)


def _disable_when_called(function: Any = None, *arguments: Any, **options: Any) -> Any:
    """`torch.compiler.disable`, applied when the function is first called."""
    if not isinstance(function, FunctionType):
        return _disable(function, *arguments, **options)

    @functools.wraps(function)
    def disabled(*args: Any, **kwargs: Any) -> Any:
        return applied()(*args, **kwargs)

    @functools.cache
    def applied() -> Any:
        return _disable(function, *arguments, **options)

    return disabled
