"""Fine-tuning: the last blocks of the LPM, or all of it, with a linear head. The comparator of every adaptation.

Training reads hidden tokens (`features.hidden`), and the blocks below them never run; or augmented images, and frozen
blocks run without keeping anything for the backward pass. Weights below the first trained block are not saved: they are
those of the LPM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from schemas.base import digest
from schemas.errors import UnsupportedModelError
from schemas.features import LpmInfo
from schemas.resolved import ResolvedSettings
from schemas.specs import FinetuneSpec, MethodSpec
from stages.methods.base import Details, GradientMethod, Network
from stages.methods.batch import Batch, required


class FinetunedLpm(Network):
    """timm's model with a linear head, of which only the upper blocks are trained."""

    spec: FinetuneSpec
    lpm: Any

    def __init__(self, spec: FinetuneSpec, lpm: nn.Module) -> None:
        """Take over a model.

        Args:
            spec: Which blocks are trained.
            lpm: timm's model with `spec.classes` outputs; changed in place.
        """
        super().__init__()
        self.spec = spec
        model: Any = lpm
        self.lpm = model
        if spec.hidden is not None:
            # They never run: what enters block `hidden` is read.
            for block in range(spec.hidden):
                model.blocks[block] = _Skipped()
            # Stays registered, with the tokens of the last batch: checkpointing runs the block again in the backward
            # pass.
            self._hidden = torch.empty(0)
            model.blocks[spec.hidden].register_forward_pre_hook(self._enter)
        self.requires_grad_(spec.everything)
        for module in self._trained_modules():
            module.requires_grad_(True)
        # With hidden tokens, frozen blocks between those and the first trained one are saved, too: evaluation from the
        # store does not load the LPM.
        between = tuple(f"lpm.blocks.{block}." for block in range(spec.hidden or 0, spec.first_block))
        self._saved = frozenset(
            name
            for name, value in self.named_parameters()
            if value.requires_grad or (spec.hidden is not None and name.startswith(between))
        )
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_ignore_frozen)  # type: ignore[no-untyped-call]

    def _trained_modules(self) -> Iterator[nn.Module]:
        yield from self.lpm.blocks[self.spec.first_block :]
        for name in ("norm", "fc_norm", "attn_pool", "head"):
            module = getattr(self.lpm, name, None)
            if isinstance(module, nn.Module):
                yield module

    @staticmethod
    def member_logits(members: Sequence[Any], batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (M, B, classes), one model after the other."""
        return torch.stack([member.logits(batch, checkpointing) for member in members])

    def logits(self, batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch with hidden tokens or images."""
        self.lpm.set_grad_checkpointing(checkpointing)
        if self.spec.hidden is None:
            return cast("torch.Tensor", self.lpm(required(batch.image, "image")))
        # timm's own forward pass, with a blank image of which nothing is left once the hidden tokens enter: rotary
        # embeddings, final norm and pooling of every supported family are then those of the model.
        self._hidden = required(batch.hidden, "hidden")["hidden"]
        blank = self._hidden.new_zeros(1, 3, self.spec.image_size, self.spec.image_size)
        return cast("torch.Tensor", self.lpm(blank))

    def _enter(self, _block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._hidden, *inputs[1:])

    def train(self, mode: bool = True) -> FinetunedLpm:
        """Keep the LPM in evaluation mode: dropout and drop path stay off, as when its features were cached."""
        super().train(mode)
        self.lpm.eval()
        return self

    def start_from(self, lpm: nn.Module) -> None:
        """Copy the weights of the LPM; the head keeps its initial ones."""
        self._copy(lpm, lambda _: True)

    def use_lpm(self, lpm: nn.Module) -> None:
        """Copy the frozen weights of the LPM."""
        self._copy(lpm, lambda name: f"lpm.{name}" not in self._saved)

    @torch.no_grad()
    def _copy(self, lpm: nn.Module, wanted: Any) -> None:
        here = {**dict(self.lpm.named_parameters()), **dict(self.lpm.named_buffers())}
        for name, value in (*lpm.named_parameters(), *lpm.named_buffers()):
            if name in here and wanted(name):
                here[name].copy_(value)


class _Skipped(nn.Module):
    """In place of a block that never runs."""

    def forward(self, tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the tokens."""
        return tokens


def _drop_frozen(network: FinetunedLpm, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name not in network._saved]:
        del state[name]


def _ignore_frozen(network: FinetunedLpm, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in network._saved]


class FinetuneMethod(GradientMethod):
    """Fine-tuning as a method."""

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> FinetuneSpec:
        """Return the spec of resolved settings."""
        finetune = settings.methods.finetune
        return FinetuneSpec(
            classes=classes,
            task=settings.data.task,
            lpm=lpm.name,
            image_size=lpm.image_size,
            depth=lpm.depth,
            first_block=finetune.first_block(lpm.depth),
            everything=finetune.blocks == "all",
            hidden=settings.features.hidden if finetune.source == "hidden" else None,
        )

    def build(self, spec: MethodSpec) -> Network:
        """Build timm's model with random weights."""
        # Imported late: methods that read cached features need no code of the LPM.
        from stages.lpm.catalogue import find_model

        spec = cast("FinetuneSpec", spec)
        model = find_model(_architecture(spec.lpm)).build(spec.classes, pretrained=False, img_size=spec.image_size)
        return FinetunedLpm(spec, model)

    def describe(self, spec: MethodSpec) -> Details:
        """Return which blocks are trained, and on what."""
        spec = cast("FinetuneSpec", spec)
        upper = f"{spec.first_block} to {spec.depth - 1}, final norm"
        blocks = "all, embeddings included" if spec.everything else upper
        source = "augmented images" if spec.hidden is None else f"hidden tokens that enter block {spec.hidden}"
        return (("Trained blocks, from 0", blocks), ("Training reads", source))


def _architecture(lpm: str) -> str:
    """Return the name from which timm builds the LPM without its folder, of which a bundle holds no path.

    Raises:
        UnsupportedModelError: The LPM is that of a folder, with `model_args` that only its config.json has.
    """
    if not lpm.startswith("local-dir:"):
        return lpm
    name, _, content = lpm.removeprefix("local-dir:").partition("@")
    if content != digest({"architecture": name, "args": {}})[:8]:
        raise UnsupportedModelError(
            f"{lpm} cannot be fine-tuned.",
            "Its config.json has model_args, which the saved model could not be rebuilt from.",
            f"Use the weights with timm's own model: lpm.name: {name} and lpm.weights: FILE.",
        )
    return name


METHOD = FinetuneMethod()
