"""What a method of your own builds upon (docs/extending.md); loaded with `fpt --plugin FILE` or an entry point."""

from schemas.adaptation_row import adaptation
from schemas.base import Section
from schemas.method_row import MethodRow
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation, keys_values, mix_with
from stages.lpm.attention import Projected
from stages.methods.adapted_lpm import AdaptationMethod

__all__ = [
    "Adaptation",
    "AdaptationMethod",
    "AdaptationSpec",
    "MethodRow",
    "Projected",
    "Section",
    "adaptation",
    "keys_values",
    "mix_with",
]
