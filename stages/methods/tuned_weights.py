"""Parameters of the LPM that learn as they are: its biases (BitFit) or its norms (LN-Tune).

    bitfit     every bias of layers and norms but the head's (arXiv 2106.10199); the published form has all blocks
    ln-tune    gain and bias of norm1 and norm2 of every block and of the final norm (arXiv 2304.01917)

Embeddings are among them only where they run: with images, and from block 0 upward. Whether the paper of LN-Tune
includes the final norm is UNVERIFIED. In a plain ViT the key third of every qkv bias is dead: it adds the same number
to all logits of a query, which the softmax cancels (identity 9). It is counted, as in published tables; norms of keys
or rotary positions bring it to life. Weight decay pulls towards 0, as in every fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable

from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation
from stages.methods.adapted_lpm import AdaptationMethod


class TunedWeights(Adaptation):
    """No change but new values of some parameters."""

    def __init__(self, spec: AdaptationSpec, chosen: Callable[[str], bool]) -> None:
        """Choose the parameters.

        Args:
            spec: First adapted block.
            chosen: Whether a parameter is trained if it belongs to what is adapted, by its name.
        """
        super().__init__(spec.first_block)
        self._embeds = embeds(spec)
        self._chosen = chosen

    def learns(self, name: str) -> bool:
        """Whether this parameter of the LPM is trained."""
        place, _, rest = name.partition(".")
        if place == "blocks":
            return int(rest.partition(".")[0]) >= self.first and self._chosen(name)
        runs = place in ("norm", "fc_norm", "attn_pool") or (self._embeds and not place.startswith("head"))
        return runs and self._chosen(name)


def embeds(spec: AdaptationSpec) -> bool:
    """Return whether embeddings run in training and can be adapted: with images, from block 0 upward."""
    return spec.hidden is None and spec.first_block == 0


def is_bias(name: str) -> bool:
    """Return whether a parameter of the LPM is a bias; `q_bias` and `v_bias` of EVA and BEiT are."""
    return name.endswith("bias")


def is_norm(name: str) -> bool:
    """Return whether a parameter of the LPM belongs to a norm of its residual stream."""
    place, *rest = name.split(".")
    return rest[1] in ("norm1", "norm2") if place == "blocks" else place in ("norm", "fc_norm")


def _make(spec: AdaptationSpec, _options: None) -> Adaptation:
    return TunedWeights(spec, is_bias if spec.method == "bitfit" else is_norm)


METHOD = AdaptationMethod(_make)
