"""Cost estimate from shapes: needs no images, weights or accelerator.

A closed form has no training step; what it reads and leaves is that of `stages.train.fit_cost`. The tensor memory of a
step is measured: one step of the training loop runs on fake CPU tensors (shapes without data) while
`MemTracker` adds up the storages that are alive at the same time. Temporary buffers inside kernels and the rounding of
the allocator are not included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from schemas.cost import CostReport, FitCost
from schemas.errors import PlatformError
from schemas.features import FeatureSpec, LpmInfo
from schemas.methods import METHODS
from schemas.resolve import feature_spec
from schemas.resolved import ResolvedSettings
from schemas.settings import TrainSettings
from schemas.specs import Inputs
from stages.methods.base import Network, gradient_method, learnable_parameters
from stages.methods.batch import Batch, array_names
from stages.methods.cached_tokens import CachedTokens
from stages.store.layout import array_layouts
from stages.store.quantise import HIDDEN_ARRAYS
from stages.train.checkpoints import Fit
from stages.train.extrapolation import begin_workers
from stages.train.fit_cost import FitCounts, closed_form_cost, probe_cost, size_mib
from stages.train.loop import Recipe, Run, make_optimizer, training_step


class StepCost(NamedTuple):
    """Tensor memory of a training step, MiB."""

    total: float
    """Everything."""
    batch: float
    """The batch as it is stored."""
    states: float
    """Parameters, gradients, and states of the optimiser."""
    frozen: float
    """Parameters that do not learn."""


def estimate_cost(
    settings: ResolvedSettings,
    lpm: LpmInfo,
    classes: int,
    root: Path | None = None,
    counts: FitCounts | None = None,
) -> CostReport:
    """Compute parameters, tensor memory and stored bytes of resolved settings. Takes seconds.

    Args:
        settings: Resolved settings.
        lpm: Shape of their LPM at their image size.
        classes: Outputs of the classifier.
        root: Base folder of a relative `local-dir:`; None: the working directory.
        counts: Rows that closed forms and linear probes are fitted to; None: not known.

    Raises:
        PlatformError: If this build of torch cannot track tensor memory.
    """
    features = feature_spec(settings, lpm, weights_sha256="0" * 64)
    step: StepCost | None = None
    fit: FitCost | None
    if METHODS[settings.method].closed_form:
        closed = fit = closed_form_cost(settings, features, classes, counts)
        learnable = closed.coefficients
    else:
        method = gradient_method(settings.method)
        with torch.device("meta"):
            network = method.build(method.spec(settings, lpm, classes))
        learnable, fit = learnable_parameters(network), probe_cost(network, settings, features, counts)
        step = step_cost(network, features, settings)
    lpm_parameters, full_mib = full_finetune_cost(
        settings.lpm.name, lpm.image_size, classes, settings.train.batch_size, root
    )
    share = learnable / lpm_parameters
    return CostReport(
        lpm=lpm.name,
        method=settings.method,
        image_size=lpm.image_size,
        classes=classes,
        batch_size=settings.train.batch_size,
        dtype=settings.features.dtype,
        learnable=learnable,
        lpm_parameters=lpm_parameters,
        learnable_share=share,
        train_tensor_mib=None if step is None else step.total,
        train_batch_mib=None if step is None else step.batch,
        train_states_mib=None if step is None else step.states,
        train_frozen_mib=None if step is None else step.frozen,
        fit=fit,
        checkpointing=settings.train.checkpointing,
        accumulate=settings.train.accumulate,
        full_finetune_tensor_mib=full_mib,
        ppe_factor=efficiency_factor(share),
        pme_factor=None if step is None else efficiency_factor(step.total / full_mib),
        cache_bytes_per_image=features.bytes_per_image,
        cache_bytes_by_dtype=features.bytes_by_dtype,
    )


@cache
def full_finetune_cost(
    name: str, image_size: int, classes: int, batch_size: int, root: Path | None = None
) -> tuple[int, float]:
    """Compute the parameters of an LPM with a linear head, and the tensor memory of a step of fine-tuning it, MiB.

    Args:
        name: As in `lpm.name`.
        image_size: Its input, in pixels.
        classes: Outputs.
        batch_size: Images per step.
        root: Base folder of a relative `local-dir:`.

    Raises:
        PlatformError: If this build of torch cannot track tensor memory.
    """
    # Imported late: training on cached features does not need the code of the LPM.
    from stages.lpm.catalogue import build_on_meta

    model = build_on_meta(name, classes, root, img_size=image_size)
    return learnable_parameters(model), _full_step_mib(model, image_size, TrainSettings(batch_size=batch_size))


def efficiency_factor(share: float) -> float:
    """Return exp(-log10(share + 1)), which times a score is its PPE (share of parameters) or PME (share of memory)."""
    return math.exp(-math.log10(share + 1.0))


def step_cost(network: Network, features: FeatureSpec, settings: ResolvedSettings) -> StepCost:
    """Measure the tensor memory of a training step: batch as read, network, gradients and optimiser states."""
    train, inputs = settings.train, METHODS[settings.method].trains_on(settings)
    learnable = size_mib(parameter for parameter in network.parameters() if parameter.requires_grad)
    parameters = size_mib(network.parameters())
    batch_mib = 0.0
    recipe = Recipe(train, features, class_weights=None, device=torch.device("cpu"), workers=0)

    def make_step() -> tuple[torch.optim.Optimizer, list[torch.Tensor], Callable[[], object]]:
        nonlocal batch_mib
        batch = _blank_batch(network, features, inputs, train.batch_size)
        batch_mib = size_mib(batch.tensors())
        optimizer = make_optimizer(network, train)
        run = Run(Fit(network, optimizer), recipe, Path(), lambda _: None)
        return optimizer, list(batch.tensors()), lambda: training_step([run], batch)

    total = _peak_mib(network, train, make_step)
    return StepCost(total, batch_mib, parameters + _states(train) * learnable, parameters - learnable)


def _states(train: TrainSettings) -> int:
    """Return the numbers that a step holds per learnable parameter: gradient, moments, past gradients of workers."""
    moments = 2 if train.optimizer.endswith("adamw") else int(train.momentum > 0)
    return 1 + moments + (train.extrapolation.workers if train.extrapolates else 0)


def _blank_batch(network: Network, features: FeatureSpec, inputs: Inputs, rows: int) -> Batch:
    """Return an empty batch with the shapes and types of a row source."""
    names = array_names(inputs - {"side", "image"})
    arrays = {
        name: torch.empty((rows, *layout.shape), dtype=getattr(torch, layout.dtype))
        for name, layout in array_layouts(features).items()
        if name in names
    }
    tokens = {name: arrays[name] for name in ("keys", "values", "scale", "offset") if name in arrays}
    hidden = {name: arrays[name] for name in HIDDEN_ARRAYS if name in arrays}
    side, size = network.spec.side_size, features.lpm.image_size
    return Batch(
        torch.zeros(rows, dtype=torch.int64),
        torch.empty(rows, 3, side, side, dtype=torch.uint8) if side else None,
        CachedTokens(**tokens) if tokens else None,
        arrays.get("pooled"),
        arrays.get("statistics"),
        hidden=hidden or None,
        image=torch.empty(rows, 3, size, size, dtype=torch.uint8) if "image" in inputs else None,
    )


def _full_step_mib(model: nn.Module, image_size: int, train: TrainSettings) -> float:
    """Measure a step of full fine-tuning of the LPM with timm's drop rates, fused attention and the same optimiser."""

    def make_step() -> tuple[torch.optim.Optimizer, list[torch.Tensor], Callable[[], object]]:
        images = torch.empty(train.batch_size, 3, image_size, image_size)
        labels = torch.zeros(train.batch_size, dtype=torch.int64)
        optimizer = make_optimizer(model, train)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            optimizer.step()

        return optimizer, [images, labels], step

    for module in model.modules():
        # timm reads this from the environment; the baseline always uses the more efficient implementation.
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", True)  # noqa: B010
    return _peak_mib(model, train, make_step)


def _peak_mib(
    network: nn.Module,
    train: TrainSettings,
    make_step: Callable[[], tuple[torch.optim.Optimizer, list[torch.Tensor], Callable[[], object]]],
) -> float:
    """Return the peak memory of all tensors during one step, MiB.

    Args:
        network: Network whose parameters are replaced by fake tensors.
        train: Optimiser.
        make_step: Called in fake tensor mode; returns the optimiser, the inputs of the step, and the step.
    """
    tracker = total_tracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.train().to_empty(device="cpu")
        optimizer, inputs, step = make_step()
        # An optimiser allocates its states in its first step; the estimate is for a later one.
        for parameter in (value for value in network.parameters() if value.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        begin_workers(optimizer, train)
        tracker.track_external(network, optimizer, *inputs)
        with tracker:
            step()
    peak: dict[torch.device, dict[str, int]] = tracker.get_tracker_snapshot("peak")
    return peak[torch.device("cpu")]["Total"] / 2**20


def total_tracker() -> Any:
    """Return a `MemTracker` that only keeps totals.

    Imported late: it loads torch.distributed, which some builds of torch lack.

    Raises:
        PlatformError: If this build does.
    """
    try:
        if not torch.distributed.is_available():
            raise ImportError("torch.distributed is not available")
        from torch.distributed._tools.mem_tracker import MemTracker
    except ImportError as error:
        raise PlatformError(
            f"torch {torch.__version__} cannot track tensor memory here: {error}",
            "This build of torch lacks torch.distributed, or is older than 2.6.",
            "Install a regular build of torch (pip install --upgrade torch).",
        ) from error

    class TotalTracker(MemTracker):  # type: ignore[no-untyped-call]
        """Tracks the total, and not the memory of each module.

        Module tracking would take most of the time, and mistakes a network whose submodules are called one by one for
        a network that runs twice.
        """

        def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
            pass

        def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
            pass

        def _pre_bw_hook(self, module: nn.Module, args: Any) -> None:
            pass

        def _post_bw_hook(self, module: nn.Module, args: Any) -> None:
            pass

    return TotalTracker()
