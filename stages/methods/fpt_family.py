"""FPT, FPT+, FPT-X and the plain side network: presets of one family of networks."""

from __future__ import annotations

from typing import cast

from schemas.features import LpmInfo
from schemas.methods import METHODS
from schemas.resolve import feature_spec
from schemas.resolved import ResolvedSettings
from schemas.specs import MethodSpec, SideNetworkSpec
from schemas.text import counted
from stages.methods.base import Details, GradientMethod, Network
from stages.methods.fpt import PromptedSideNetwork
from stages.methods.fpt_x import Ensemble, conclusion


class FptMethod(GradientMethod):
    """FPT, FPT+, FPT-X and the plain side network."""

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> SideNetworkSpec:
        """Return the spec of resolved settings."""
        train, preset = settings.train, METHODS[settings.method].preset
        sources = preset.probe_sources(feature_spec(settings, lpm, ""))
        return SideNetworkSpec.model_validate(
            {
                "method": settings.method,
                "classes": classes,
                "layers": len(settings.features.layers),
                "lpm_width": lpm.width,
                "heads": lpm.heads,
                "width": lpm.width // train.side_reduction,
                "image_size": train.side_image_size,
                "prompts": train.prompts,
                "dropout": train.dropout,
                "members": train.members,
                "most_members": preset.members if train.adaptive_members else 0,
                "attentive": train.attentive,
                "attentive_weight": train.attentive_weight,
                "probe_weight": train.probe_weight,
                "fits_shares": preset.fits_shares,
                "sources": sources if train.probe_weight else (),
                "task": settings.data.task,
            }
        )

    def build(self, spec: MethodSpec) -> Network:
        """Build the network of a spec: one side network, or an ensemble."""
        spec = cast("SideNetworkSpec", spec)
        return Ensemble(spec) if _is_ensemble(spec) else PromptedSideNetwork(spec)

    def describe(self, spec: MethodSpec) -> Details:
        """Return the ensemble and the shape of the side network."""
        spec = cast("SideNetworkSpec", spec)
        kinds = {
            "side networks": counted(spec.members, "side network"),
            "attentive probes": counted(spec.attentive, "attentive probe"),
        }
        ensemble = ", ".join(f"{kinds.get(name, name)} ({weight:g})" for name, weight in spec.experts.items())
        return (
            *((("Averaged", ensemble),) if _is_ensemble(spec) else ()),
            *((("Gain of the side networks", conclusion(spec)),) if spec.held_out is not None else ()),
            ("Input of the side network", f"{spec.image_size} x {spec.image_size} pixels"),
            ("Width of the side network", str(spec.width)),
            ("Prompts per block", f"{spec.prompts}, dropout {spec.dropout:g}"),
        )


def _is_ensemble(spec: SideNetworkSpec) -> bool:
    return bool(spec.members > 1 or spec.attentive or spec.probe_weight)


METHOD = FptMethod()
