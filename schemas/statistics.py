"""Token statistics in the store: what they are, in which order, and how they are described in reports.

Of an LPM that is no plain vision transformer they are those of its feature maps, whose positions take the place of
patch tokens (`map_segments`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from schemas.base import Contract

DIRECTIONS = 64
"""Fixed directions in which covariances are stored."""
COVARIANCES = DIRECTIONS * (DIRECTIONS + 1) // 2
"""Numbers of one covariance matrix: its upper triangle."""


KINDS = ("outputs", "value means", "output covariance", "value covariance", "MLP activations")
"""Statistics of all patch tokens: class token, mean and deviation of the outputs of a block; means of the values in its
attention; covariances in fixed directions; mean and deviation of the activations in its MLP. The last three are stored
for the middle half of the blocks."""


class Segment(NamedTuple):
    """One statistic of one block or feature map."""

    kind: str
    """One of `KINDS`, kept keys, or kept values."""
    block: int
    """Block of the LPM, or its stage, from 0."""
    start: int
    """Position of its first number in a row."""
    stop: int
    """Position after its last number."""
    unit: str = "block"
    """block or stage."""

    @property
    def width(self) -> int:
        """Count of its numbers."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"{self.kind} of {self.unit} {self.block}"


def middle(depth: int) -> range:
    """Return the middle half of the blocks, whose statistics predict best (docs/lab-notes.md)."""
    return range(depth // 4, depth - depth // 4)


def segments(
    depth: int, width: int, mlp_width: int, has_class_token: bool, layers: tuple[int, ...]
) -> tuple[Segment, ...]:
    """Return the statistics of a row, in their order in the store.

    Args:
        depth: Blocks of the LPM.
        width: D, the width of a token.
        mlp_width: Width of the activations in the MLP of a block.
        has_class_token: Whether token 0 is a class token.
        layers: Tapped blocks; empty without cached tokens.
    """
    found: list[Segment] = []

    def add(kind: str, block: int, count: int) -> None:
        start = found[-1].stop if found else 0
        found.append(Segment(kind, block, start, start + count))

    for block in range(depth):
        add("outputs", block, (3 if has_class_token else 2) * width)
        add("value means", block, width)
        if block in middle(depth):
            add("output covariance", block, COVARIANCES)
            add("value covariance", block, COVARIANCES)
            add("MLP activations", block, 2 * mlp_width)
    for layer in layers:
        add("kept keys", layer, 2 * width)
        add("kept values", layer, 2 * width)
    return tuple(found)


def map_segments(widths: Sequence[int]) -> tuple[Segment, ...]:
    """Return the statistics of a row of an LPM that gives feature maps, in their order in the store.

    They are mean and deviation (outputs) and output covariance of every map. Maps of one width are those of blocks,
    others those of stages.

    Args:
        widths: Channels of each map.
    """
    unit = "block" if len(set(widths)) == 1 else "stage"
    found: list[Segment] = []
    for number, width in enumerate(widths):
        for kind, count in (("outputs", 2 * width), ("output covariance", COVARIANCES)):
            start = found[-1].stop if found else 0
            found.append(Segment(kind, number, start, start + count, unit))
    return tuple(found)


ProbeRule = Literal["all", "kept", "covariance", "every block", "central"]
"""What linear probes are fitted to, one source each: all (every kind of statistic of all middle blocks together, most
kinds also of each central block), kept (each statistic of the kept tokens of each tapped block), covariance (of the
outputs of each middle block), every block (class token and mean of all blocks together), central (outputs of each
central block: few numbers)."""


def _without_deviations(found: Sequence[Segment], width: int) -> list[Segment]:
    """Return the outputs of every block without their last vector."""
    return [one._replace(stop=one.stop - width) for one in found if one.kind == "outputs"]


def output_vectors(found: Sequence[Segment], width: int) -> tuple[int, ...]:
    """Return the position in a row of each class token and mean of the blocks' outputs, block by block.

    Args:
        found: Statistics of a row.
        width: D, the width of a token.
    """
    return tuple(start for one in _without_deviations(found, width) for start in range(one.start, one.stop, width))


class ProbeSource(Contract):
    """Numbers of a row that one linear probe is fitted to, and how."""

    name: str
    """What they are."""
    spans: tuple[tuple[int, int], ...]
    """First number and the one after the last, of each span of the row (`stages.methods.fit_rows.describe_rows`)."""
    loss: Literal["logistic", "squared"] = "logistic"
    """Loss of the fit: logistic regression, or ridge regression on the labels."""

    @property
    def width(self) -> int:
        """Count of its numbers."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def by_least_squares(self) -> ProbeSource:
        """The same numbers for a ridge regression."""
        return self.model_copy(update={"loss": "squared"})

    @property
    def title(self) -> str:
        """Name in reports, with the kind of fit."""
        return self.name if self.loss == "logistic" else f"{self.name}, least squares"


def grouped(found: Sequence[Segment], depth: int, width: int, rule: ProbeRule, first: int) -> tuple[ProbeSource, ...]:
    """Return the sources of linear probes among the statistics of a row.

    Args:
        found: Statistics of a row; none without `features.statistics`.
        depth: Blocks of the LPM.
        width: D, the width of a token.
        rule: Which of them.
        first: Numbers of the row before the statistics.
    """
    if rule == "kept" or not found:
        return tuple(_source(one.name, [one], first) for one in found if one.kind.startswith("kept"))
    if rule == "covariance":
        return tuple(_source(one.name, [one], first) for one in found if one.kind == "output covariance")
    if rule == "every block":
        return (_source("class token and mean of every block", _without_deviations(found, width), first),)
    if rule == "central":
        inner = [one for one in found if one.kind == "outputs" and abs(one.block - depth // 2) <= 1]
        return tuple(_source(one.name, [one], first) for one in inner)
    inner = [one for one in found if one.block in middle(depth)]
    return (*_joint(inner, depth, first), *_single(inner, depth, first))


def map_sources(found: Sequence[Segment], rule: ProbeRule, first: int) -> tuple[ProbeSource, ...]:
    """Return the sources of linear probes among the statistics of feature maps.

    They follow the rules of blocks; stages are few, and each of them counts like a middle block.

    Args:
        found: Statistics of a row, from `map_segments`; none without `features.statistics`.
        rule: Which of them.
        first: Numbers of the row before the statistics.
    """
    if rule == "kept" or not found:
        return ()
    unit, depth = found[0].unit, found[-1].block + 1
    outputs = [one for one in found if one.kind == "outputs"]
    if rule == "every block":
        means = [one._replace(stop=one.start + one.width // 2) for one in outputs]
        return (_source(f"mean of every {unit}", means, first),)
    chosen = range(depth) if unit == "stage" else middle(depth)
    inner = [one for one in found if one.block in chosen]
    if rule == "covariance":
        return tuple(_source(one.name, [one], first) for one in inner if one.kind == "output covariance")
    joint = [
        _source(f"{kind} of {unit}s {chosen[0]} to {chosen[-1]}", [one for one in inner if one.kind == kind], first)
        for kind in ("outputs", "output covariance")
    ]
    if rule == "central":
        inner, joint = outputs, []
    central = [one for one in inner if unit == "stage" or abs(one.block - depth // 2) <= 1]
    return (*joint, *(_source(one.name, [one], first) for one in central))


def _joint(inner: Sequence[Segment], depth: int, first: int) -> Iterator[ProbeSource]:
    """Yield the sources that join a kind of statistic of all middle blocks."""
    blocks = f"of blocks {middle(depth)[0]} to {middle(depth)[-1]}"
    for kind in ("outputs", "value means", "output covariance", "value covariance"):
        yield _source(f"{kind} {blocks}", [one for one in inner if one.kind == kind], first)
    activations = [one for one in inner if one.kind == "MLP activations"]
    halves = [(one, one.start + one.width // 2) for one in activations]
    yield _source(f"MLP means {blocks}", [one._replace(stop=half) for one, half in halves], first)
    yield _source(f"MLP deviations {blocks}", [one._replace(start=half) for one, half in halves], first)
    if kept := [one for one in inner if one.kind.startswith("kept")]:
        yield _source(f"kept tokens {blocks}", kept, first)


def _single(inner: Sequence[Segment], depth: int, first: int) -> Iterator[ProbeSource]:
    """Yield the sources of single blocks: statistics of the central ones, kept tokens of every one."""
    for one in inner:
        if abs(one.block - depth // 2) <= 1 and one.kind in KINDS and one.kind != "output covariance":
            yield _source(one.name, [one], first)
    for block in middle(depth):
        if kept := [one for one in inner if one.kind.startswith("kept") and one.block == block]:
            yield _source(f"kept tokens of block {block}", kept, first)


def _source(name: str, parts: list[Segment], first: int) -> ProbeSource:
    return ProbeSource(name=name, spans=tuple((first + one.start, first + one.stop) for one in parts))
