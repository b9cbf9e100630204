"""The LPM with an adaptation and a linear head, from images or from cached hidden tokens.

What is saved is the adaptation, the head, and the parameters of the LPM that are trained. Everything else is that of
the frozen LPM, whose weights all runs of a process share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from schemas.base import Section, digest
from schemas.errors import UnsupportedModelError
from schemas.features import LpmInfo
from schemas.methods import METHODS, method_options
from schemas.resolved import ResolvedSettings
from schemas.specs import AdaptationSpec, AdaptedLpmSpec, MethodSpec
from stages.lpm.adaptation import Adaptation, install
from stages.methods.base import Details, GradientMethod, Network
from stages.methods.batch import Batch, required
from stages.methods.positions import resample_embeddings
from stages.phases import Phase

_MINE = "adaptation."
"""First part of the names of the adaptation's own parameters."""


class AdaptedLpm(Network):
    """timm's model with an adaptation and a linear head."""

    spec: AdaptedLpmSpec
    lpm: Any
    has_head = True

    def __init__(self, spec: AdaptedLpmSpec, lpm: nn.Module, adaptation: Adaptation) -> None:
        """Take over a model.

        Args:
            spec: First changed block, and inputs.
            lpm: timm's model with `spec.classes` outputs; changed in place.
            adaptation: What is changed.
        """
        super().__init__()
        self.spec, self.adaptation = spec, adaptation
        self._uses_lpm = False
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
        model.requires_grad_(False)
        install(model, adaptation)
        for name, value in model.named_parameters():
            # New parameters of an adaptation require a gradient until it says otherwise.
            value.requires_grad_(name.startswith("head.") or adaptation.learns(name))
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        drawn = {f"lpm.{name}" for name, _ in model.named_parameters() if adaptation.saves(name)}
        self._saved = frozenset(trained | drawn | {name for name in self.state_dict() if name.startswith(_MINE)})
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_ignore_frozen)  # type: ignore[no-untyped-call]

    @staticmethod
    def member_logits(members: Sequence[Any], batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (M, B, classes), one model after the other."""
        return torch.stack([member.logits(batch, checkpointing) for member in members])

    def logits(self, batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch with hidden tokens or images."""
        self.lpm.set_grad_checkpointing(checkpointing)
        return cast("torch.Tensor", self.lpm(self._input(batch)))

    def features(self, batch: Batch) -> torch.Tensor:
        """Compute what the head reads, (B, D), from a prepared batch."""
        self.lpm.set_grad_checkpointing(False)
        tokens = self.lpm.forward_features(self._input(batch))
        return cast("torch.Tensor", self.lpm.forward_head(tokens, pre_logits=True))

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Compute `features` (B, D) of a prepared batch."""
        return self.features(batch)

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) of pooled outputs (B, D)."""
        return cast("torch.Tensor", self.lpm.head(vectors))

    def maps(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return what explains the images of a prepared batch, by name, (B, blocks, gh, gw) each."""
        return self.adaptation.maps(lambda: self.features(batch))

    def _input(self, batch: Batch) -> torch.Tensor:
        if self.spec.hidden is None:
            return cast("torch.Tensor", required(batch.image, "image"))
        # timm's own forward pass, with a blank image of which nothing is left once the hidden tokens enter: rotary
        # embeddings, final norm and pooling of every supported family are then those of the model.
        self._hidden = required(batch.hidden, "hidden")["hidden"]
        return self._hidden.new_zeros(1, 3, self.spec.image_size, self.spec.image_size)

    def _enter(self, _block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._hidden, *inputs[1:])

    def train(self, mode: bool = True) -> AdaptedLpm:
        """Keep the LPM in evaluation mode: dropout and drop path stay off, as when its features were cached."""
        super().train(mode)
        self.lpm.eval()
        return self

    def phase(self, epoch: int, epochs: int) -> Phase:
        """Return the phase of an epoch, which the adaptation determines."""
        return self.adaptation.phase(epoch, epochs)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set what of the adaptation learns in an epoch."""
        self.adaptation.begin_epoch(epoch, epochs)

    def begin_phase(self, epoch: int, epochs: int) -> None:
        """Change the adaptation before an epoch that begins a phase."""
        self.adaptation.begin_phase(epoch, epochs)

    def read_gradients(self) -> None:
        """Let the adaptation read the gradients of a batch."""
        self.adaptation.read_gradients()

    @property
    def needs_lpm(self) -> bool:
        """Whether weights of the LPM are not saved with the model, and have not been taken over yet."""
        if self._uses_lpm:
            return False
        # With hidden tokens, embeddings see only the blank image.
        running = "" if self.spec.hidden is None else ("blocks.", "norm.", "fc_norm.", "attn_pool.", "head.")
        return any(name.startswith(running) and f"lpm.{name}" not in self._saved for name in self.lpm.state_dict())

    def start_from(self, lpm: nn.Module) -> None:
        """Take over the weights of the LPM; the head and the adaptation keep their initial ones."""
        self._take_over(lpm, lambda name: f"lpm.{name}" in self._saved, lambda _: True)
        with torch.no_grad():
            self.adaptation.start(self.lpm)

    def resampled(self, saved: MethodSpec, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Resample what belongs to token positions, in the adaptation and the LPM, to the image size of this model."""
        patch = self.lpm.patch_embed.patch_size[0]
        sides = cast("AdaptedLpmSpec", saved).image_size // patch, self.spec.image_size // patch
        mine = {name.removeprefix(_MINE): value for name, value in state.items() if name.startswith(_MINE)}
        others = {name: value for name, value in state.items() if not name.startswith(_MINE)}
        adaptation = self.adaptation.resampled(mine, *sides)
        return resample_embeddings(others, *sides) | {f"{_MINE}{name}": value for name, value in adaptation.items()}

    def use_lpm(self, lpm: nn.Module) -> None:
        """Take over the frozen weights of the LPM, and fold the adaptation into new ones where it can be."""
        self._take_over(lpm, lambda _: False, lambda name: f"lpm.{name}" not in self._saved)
        self._uses_lpm = True
        with torch.no_grad():
            self.adaptation.fold(self.lpm)

    @torch.no_grad()
    def _take_over(self, lpm: nn.Module, copied: Callable[[str], bool], chosen: Callable[[str], bool]) -> None:
        """Copy chosen weights, or share the storage of those that are not trained."""
        here = dict(self.lpm.named_parameters()) | dict(self.lpm.named_buffers())
        weights = {_original(name): (name, value) for name, value in here.items()}
        for name, value in (*lpm.named_parameters(), *lpm.named_buffers()):
            if name not in weights or not chosen(weights[name][0]):
                continue
            if copied(weights[name][0]):
                weights[name][1].copy_(value)
            else:
                weights[name][1].data = value.data


def _original(name: str) -> str:
    """Return the name in timm's model of a parameter that an adaptation has wrapped."""
    return name.replace(".base_layer.", ".")


class _Skipped(nn.Module):
    """In place of a block that never runs."""

    def forward(self, tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the tokens."""
        return tokens


def _drop_frozen(network: AdaptedLpm, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name not in network._saved]:
        del state[name]


def _ignore_frozen(network: AdaptedLpm, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in network._saved]


def build_lpm(spec: AdaptedLpmSpec) -> nn.Module:
    """Build timm's model of a spec with a linear head and random weights."""
    # Imported late: methods that read cached features need no code of the LPM.
    from stages.lpm.catalogue import find_model

    return find_model(_architecture(spec.lpm)).build(spec.classes, pretrained=False, img_size=spec.image_size)


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
            f"{lpm} cannot be adapted.",
            "Its config.json has model_args, which the saved model could not be rebuilt from.",
            f"Use the weights with timm's own model: lpm.name: {name} and lpm.weights: FILE.",
        )
    return name


class AdaptationMethod(GradientMethod):
    """A method of the registry that is an adaptation of the LPM.

    Args:
        make: Returns the adaptation of a spec and of the parsed settings of the method, with initial weights.
        describe: Returns further rows of the report.
    """

    def __init__(
        self,
        make: Callable[[AdaptationSpec, Any], Adaptation],
        describe: Callable[[AdaptationSpec, Any], Details] = lambda *_: (),
    ) -> None:
        self._make, self._describe = make, describe

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> AdaptationSpec:
        """Return the spec of resolved settings."""
        row = METHODS[settings.method]
        options, cached = method_options(settings.methods, row), "hidden" in row.trains_on(settings)
        return AdaptationSpec(
            method=settings.method,
            classes=classes,
            task=settings.data.task,
            lpm=lpm.name,
            image_size=lpm.image_size,
            depth=lpm.depth,
            first_block=settings.train.start_block,
            hidden=settings.features.hidden if cached else None,
            width=lpm.width,
            heads=lpm.heads,
            mlp_width=lpm.mlp_width or 0,
            patch=lpm.patch,
            prefix_tokens=lpm.prefix_tokens,
            options={} if options is None else options.model_dump(mode="json"),
        )

    def build(self, spec: MethodSpec) -> Network:
        """Build the adapted model with initial weights."""
        spec = cast("AdaptationSpec", spec)
        lpm = build_lpm(spec)
        return AdaptedLpm(spec, lpm, self._make(spec, _options(spec)))

    def describe(self, spec: MethodSpec) -> Details:
        """Return which blocks are changed, and on what inputs."""
        spec = cast("AdaptationSpec", spec)
        blocks = f"{spec.first_block} to {spec.depth - 1}"
        return (("Adapted blocks, from 0", blocks), trained_on(spec), *self._describe(spec, _options(spec)))


def trained_on(spec: AdaptedLpmSpec) -> tuple[str, str]:
    """Return the report's row about the inputs of training."""
    return (
        "Training reads",
        "augmented images" if spec.hidden is None else f"hidden tokens that enter block {spec.hidden}",
    )


def _options(spec: AdaptationSpec) -> Section | None:
    options = METHODS[spec.method].options
    return None if options is None else options.model_validate(spec.options)
