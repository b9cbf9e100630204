"""The methods that can be trained on the frozen LPM: one registry row each, and their settings.

To add a method: a row here (with a spec in `schemas.specs` where it saves more than others do), a module of
`stages.methods`, and a test (docs/methods.md). Help texts, validation, cost, sweeps, the report and the tables of the
documentation read the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from schemas import cross_adaptations, prompt_adaptations, weight_adaptations
from schemas.base import Section
from schemas.errors import SettingsError
from schemas.method_row import MethodRow, Preset, Problems
from schemas.probe_specs import KnnSpec, LinearSpec, PooledSpec, RidgeSpec, StatisticsSpec
from schemas.specs import AlfSpec, AttentiveSpec, FinetuneSpec, Inputs, LoffTaSpec, MethodSpec, SideNetworkSpec

if TYPE_CHECKING:
    from schemas.resolved import ResolvedSettings


class FinetuneSettings(Section):
    """Settings of finetune."""

    blocks: Literal["all"] | Annotated[int, Field(ge=1, le=1000)] = 2
    """Last blocks of the LPM that are trained with the final norm; all: the complete LPM, embeddings included."""
    source: Literal["auto", "hidden", "image"] = "auto"
    """What training reads: hidden (cached tokens, un-augmented; the blocks below never run) or image (augmented pixels
    through the LPM); auto: hidden where `features.hidden` is at or below the first trained block, else image."""

    def first_block(self, depth: int) -> int:
        """First trained block of an LPM of this depth."""
        return 0 if self.blocks == "all" else max(0, depth - self.blocks)


class AlfSettings(Section):
    """Settings of alf."""

    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Dropout of the attention weights over blocks; the paper chooses among 0, 0.1 and 0.3."""


class MethodSettings(Section):
    """Settings that only one method has."""

    alf: AlfSettings = AlfSettings()
    """Attentive layer fusion."""
    finetune: FinetuneSettings = FinetuneSettings()
    """Fine-tuning of the LPM."""
    ept: prompt_adaptations.EptSettings = prompt_adaptations.EptSettings()
    """Embedded Prompt Tuning: ept and ept-lse."""
    cvpt: cross_adaptations.CvptSettings = cross_adaptations.CvptSettings()
    """Cross Visual Prompt Tuning."""
    dvpt: cross_adaptations.DvptSettings = cross_adaptations.DvptSettings()
    """Dynamic Visual Prompt Tuning."""
    dvpt_release: cross_adaptations.DvptReleaseSettings = cross_adaptations.DvptReleaseSettings()
    """Dynamic Visual Prompt Tuning as in the released code."""
    apt: cross_adaptations.AptSettings = cross_adaptations.AptSettings()
    """Approximated Prompt Tuning."""
    vpt: prompt_adaptations.VptSettings = prompt_adaptations.VptSettings()
    """Visual Prompt Tuning: vpt-shallow and vpt-deep."""
    decomposed_prompts: prompt_adaptations.DecomposedPromptSettings = prompt_adaptations.DecomposedPromptSettings()
    """Low-rank prompts."""
    vfpt: prompt_adaptations.VfptSettings = prompt_adaptations.VfptSettings()
    """Visual Fourier Prompt Tuning."""
    e2vpt: prompt_adaptations.E2vptSettings = prompt_adaptations.E2vptSettings()
    """Effective and efficient Visual Prompt Tuning."""
    prefix: prompt_adaptations.PrefixSettings = prompt_adaptations.PrefixSettings()
    """Prefix tuning."""
    pt_peft: prompt_adaptations.PtPeftSettings = prompt_adaptations.PtPeftSettings()
    """Prefix tuning, then LoRA as well."""
    ssf: weight_adaptations.SsfSettings = weight_adaptations.SsfSettings()
    """Scaling and shifting of features."""
    adapter: weight_adaptations.AdapterSettings = weight_adaptations.AdapterSettings()
    """Adapters after the MLPs."""
    adaptformer: weight_adaptations.AdaptFormerSettings = weight_adaptations.AdaptFormerSettings()
    """Adapters parallel to the MLPs."""
    lora: weight_adaptations.LoraSettings = weight_adaptations.LoraSettings()
    """Low-rank updates: lora and dora."""
    vera: weight_adaptations.VeraSettings = weight_adaptations.VeraSettings()
    """Vector-based random matrix adaptation."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Settings of a method that is not part of fpt (docs/methods.md), by name."""


def method_options(methods: MethodSettings, row: MethodRow) -> Section | None:
    """Return the settings that only this method has, or None if it has none.

    Raises:
        SettingsError: If `methods.options` do not fit a method that is not part of fpt.
    """
    section = getattr(methods, row.settings_section, None)
    if isinstance(section, Section) or row.options is None:
        return section if isinstance(section, Section) else None
    try:
        return row.options.model_validate(methods.options)
    except ValidationError as error:
        problems = [(f"methods.options.{'.'.join(map(str, one['loc']))}", one["msg"]) for one in error.errors()]
        raise SettingsError(f"The options of {row.name} are not valid.", problems, "Correct params.yaml.") from None


FITTED_BY: frozenset[str] = frozenset({"class_weights"})
"""Fields of `train` that a closed form depends on: another seed or learning rate gives the same model."""


def _probe_inputs(settings: ResolvedSettings) -> Inputs:
    return frozenset({"pooled", "statistics"} if settings.train.probe_weight else ())


def _resolve_finetune(methods: MethodSettings, depth: int, hidden: int | None) -> tuple[MethodSettings, Problems]:
    finetune, problems = methods.finetune, []
    if isinstance(finetune.blocks, int) and finetune.blocks > depth:
        problems.append(("methods.finetune.blocks", f"must be at most {depth}, the depth of the LPM, or all"))
    first = finetune.first_block(depth)
    cached = hidden is not None and hidden <= first and finetune.blocks != "all"
    if finetune.source == "hidden" and not cached:
        reason = (
            "cannot be hidden: with blocks: all the embeddings are trained, which hidden tokens are computed with"
            if finetune.blocks == "all"
            else f"needs features.hidden: {first}, or lower"
        )
        problems.append(("methods.finetune.source", reason))
    source = finetune.source if finetune.source != "auto" else "hidden" if cached else "image"
    return methods.model_copy(update={"finetune": finetune.model_copy(update={"source": source})}), problems


def _finetune_inputs(settings: ResolvedSettings) -> Inputs:
    # "auto" became hidden or image when the settings were resolved.
    return frozenset({"hidden"} if settings.methods.finetune.source == "hidden" else {"image"})


def _resolve_loff_ta(methods: MethodSettings, depth: int, hidden: int | None) -> tuple[MethodSettings, Problems]:
    if hidden is not None:
        return methods, []
    reason = f"must be a block, such as {depth // 2}: loff-ta reads the cached tokens that enter it"
    return methods, [("features.hidden", reason)]


_FPT, _FPT_PLUS = "arXiv 2403.07576 (MICCAI 2024)", "arXiv 2408.02426 (TNNLS 2025)"
_ROWS = (
    MethodRow(
        name="fpt",
        title="FPT",
        help="side network of the MICCAI paper: all blocks, side image 224",
        paper=_FPT,
        module="fpt_family",
        spec=SideNetworkSpec,
        inputs=frozenset({"tokens", "side"}),
        trained_by="gradient",
        preset=Preset(first_layer=0.0, side_image_size=224),
        probe_inputs=_probe_inputs,
    ),
    MethodRow(
        name="fpt+",
        title="FPT+",
        help="side network of the TNNLS paper: upper half of the blocks, side image 128",
        paper=_FPT_PLUS,
        module="fpt_family",
        spec=SideNetworkSpec,
        inputs=frozenset({"tokens", "side"}),
        trained_by="gradient",
        probe_inputs=_probe_inputs,
    ),
    MethodRow(
        name="fpt-x",
        title="FPT-X",
        help="side networks of fpt+ and linear probes of token statistics, averaged",
        paper="",
        module="fpt_family",
        spec=SideNetworkSpec,
        inputs=frozenset({"tokens", "side"}),
        trained_by="gradient",
        preset=Preset(
            members=3,
            adaptive_members=True,
            probe_weight=0.7,
            keep="late",
            fits_shares=True,
            least_squares=True,
            preference=0.5,
        ),
        probe_inputs=_probe_inputs,
    ),
    MethodRow(
        name="fpt-x-kept",
        title="FPT-X of the kept tokens",
        help="fpt-x as it was before token statistics: its linear probes read only the cached tokens",
        paper="",
        module="fpt_family",
        spec=SideNetworkSpec,
        inputs=frozenset({"tokens", "side"}),
        trained_by="gradient",
        preset=Preset(members=5, attentive=1, probe_weight=0.5, keep="late", probes="kept"),
        probe_inputs=_probe_inputs,
    ),
    MethodRow(
        name="side",
        title="side network only",
        help="side network of fpt+ without the cached features",
        paper=_FPT_PLUS,
        module="fpt_family",
        spec=SideNetworkSpec,
        inputs=frozenset({"side"}),
        trained_by="gradient",
        probe_inputs=_probe_inputs,
    ),
    MethodRow(
        name="statistics",
        title="statistics probe",
        help="linear regressions on statistics of all tokens, block by block, averaged",
        paper="",
        module="statistics",
        spec=StatisticsSpec,
        inputs=frozenset({"statistics", "pooled"}),
        trained_by="closed form",
        preset=Preset(least_squares=True, preference=0.5),
    ),
    MethodRow(
        name="ridge",
        title="ridge regression on sums",
        help="ridge regressions on pooled outputs and central blocks; sites can add up what it reads",
        paper="",
        module="ridge",
        spec=RidgeSpec,
        inputs=frozenset({"statistics", "pooled"}),
        trained_by="closed form",
        summed=True,
        preset=Preset(probes="central"),
    ),
    MethodRow(
        name="covariance",
        title="covariance probe",
        help="logistic regressions on the covariance of all tokens, block by block, averaged",
        paper="arXiv 2511.04190",
        module="statistics",
        spec=StatisticsSpec,
        inputs=frozenset({"statistics"}),
        trained_by="closed form",
        preset=Preset(probes="covariance"),
    ),
    MethodRow(
        name="all-block-linear",
        title="all-block linear probe",
        help="one logistic regression on class token and mean of every block",
        paper="arXiv 2601.09322",
        module="statistics",
        spec=StatisticsSpec,
        inputs=frozenset({"statistics"}),
        trained_by="closed form",
        preset=Preset(probes="every block"),
    ),
    MethodRow(
        name="linear",
        title="linear probe",
        help="logistic regression on the pooled outputs",
        paper="",
        module="linear",
        spec=LinearSpec,
        inputs=frozenset({"pooled"}),
        trained_by="closed form",
    ),
    MethodRow(
        name="knn",
        title="k nearest neighbours",
        help="votes of the nearest training images by the pooled outputs",
        paper="arXiv 1805.01978",
        module="knn",
        spec=KnnSpec,
        inputs=frozenset({"pooled"}),
        trained_by="closed form",
    ),
    MethodRow(
        name="nearest-mean",
        title="nearest class mean",
        help="cosine similarity of the pooled outputs to the mean of each class",
        paper="",
        module="nearest_mean",
        spec=PooledSpec,
        inputs=frozenset({"pooled"}),
        trained_by="closed form",
    ),
    MethodRow(
        name="attentive",
        title="attentive probe",
        help="learnable queries on the cached tokens",
        paper="arXiv 2506.10178",
        module="attentive",
        spec=AttentiveSpec,
        inputs=frozenset({"tokens"}),
        trained_by="gradient",
        any_layers=True,
    ),
    MethodRow(
        name="alf",
        title="attentive layer fusion",
        help="a learnable query on class token and mean of every block",
        paper="arXiv 2601.09322 (ICML 2026)",
        module="alf",
        spec=AlfSpec,
        inputs=frozenset({"statistics"}),
        trained_by="gradient",
    ),
    MethodRow(
        name="loff-ta",
        title="LOFF-TA",
        help="a small transformer on cached hidden tokens, which are augmented",
        paper="arXiv 2410.02527 (NeurIPS 2024)",
        module="loff_ta",
        spec=LoffTaSpec,
        inputs=frozenset({"hidden"}),
        trained_by="gradient",
        resolve=_resolve_loff_ta,
    ),
    MethodRow(
        name="finetune",
        title="fine-tuning",
        help="the last blocks of the LPM, or all of it, with a linear head; from hidden tokens or images",
        paper="",
        module="finetune",
        spec=FinetuneSpec,
        inputs=frozenset(),
        trained_by="gradient",
        adapts_lpm=True,
        images_setting="methods.finetune.source=image",
        resolve=_resolve_finetune,
        added_inputs=_finetune_inputs,
    ),
)

_ADAPTATIONS = (*prompt_adaptations.ROWS, *cross_adaptations.ROWS, *weight_adaptations.ROWS)
METHODS: dict[str, MethodRow] = {row.name: row for row in (*_ROWS, *_ADAPTATIONS)}
"""Name -> row, in the order of help texts."""


def register(row: MethodRow) -> None:
    """Add the row of a plugin to the registry; again with the same module does nothing.

    Raises:
        SettingsError: If the name is that of another method.
    """
    known = METHODS.setdefault(row.name, row)
    if (known.package, known.module) != (row.package, row.module):
        raise SettingsError(
            f"The plugin {row.module} has a method named {row.name}, and so has {known.module}.",
            repair="Rename one of them.",
        )


def _known(name: str) -> str:
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": _listed(others, last)})
    return name


def _listed(others: list[str], last: str) -> str:
    return f"{', '.join(others)} or {last}"


Method = Annotated[str, AfterValidator(_known)]
"""Name of a method."""


def _to_spec(value: Any) -> Any:
    """Parse a spec with the class of its method."""
    if not isinstance(value, dict):
        return value
    row = METHODS.get(str(value.get("method")))
    if row is None:
        raise ValueError(f"method {value.get('method')!r} is not known to this version")
    return row.spec.model_validate(value)


AnySpec = Annotated[SerializeAsAny[MethodSpec], BeforeValidator(_to_spec)]
"""The spec of any method; `method` selects the class."""


def model_inputs(spec: MethodSpec) -> Inputs:
    """Return what a trained model of this spec reads."""
    return METHODS[spec.method].inputs | spec.added_inputs


METHODS_HELP = "; ".join(f"{row.name} ({row.help})" for row in METHODS.values())
"""Every method with its line."""
