"""Feature specs and their fingerprints, and the receipts of a store."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import model_validator

from schemas.base import Contract, digest
from schemas.manifest import ImageId
from schemas.rendering import Frame, Rendering, Window
from schemas.settings import (
    FeatureCodec,
    FeatureDtype,
    FeatureResize,
    FixedView,
    Importance,
    Normalisation,
    Precision,
    ResizeFilter,
)
from schemas.statistics import ProbeRule, ProbeSource, Segment, grouped, map_segments, map_sources, segments
from schemas.views import IDENTITY, ViewRow

FEATURE_VERSION = 2
"""Bump it when the definition of a feature changes; it enters every fingerprint."""

STORE_VERSION = 1
"""Bump it when the layout of the store changes; it enters every fingerprint."""

CRC_BYTES = 4
"""Length of a CRC32C."""

LATER_FIELDS: dict[str, Any] = {
    "codec": "none",
    "bitround": None,
    "pooled": True,
    "precision": "float32",
    "resize": "squash",
    "filter": None,
    "normalisation": "lpm",
    "window": "stored",
    "frame": "middle",
    "hidden": None,
    "statistics": False,
}
"""Fields added after the first stores, with the values of those stores: in a fingerprint only if they differ."""


class LpmInfo(Contract):
    """Shape and preprocessing of an LPM at one input size: all that stage two and the cost estimate depend on."""

    name: str
    """timm name with tag, `hf-hub:organisation/name`, or `local-dir:architecture@content`; never a path."""
    depth: int
    """Blocks; feature maps of an LPM that gives those."""
    width: int
    """D, the width of a token; of an LPM that gives feature maps, of its pooled outputs."""
    heads: int
    """H; 1 of an LPM that gives feature maps."""
    patch: int
    """Side of a patch in pixels; of feature maps, of a position of the coarsest."""
    prefix_tokens: int
    """Class and register tokens before the patches."""
    has_class_token: bool
    """Whether token 0 is a class token."""
    image_size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float]
    """Per channel (RGB), of pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Per channel (RGB), of pixels in [0, 1]."""
    interpolation: ResizeFilter
    """Filter of the resize to the input."""
    mlp_width: int | None = None
    """Width of the activations in the MLP of a block; None: described by an earlier version."""
    map_widths: tuple[int, ...] = ()
    """Channels of each feature map of an LPM of which no keys and values are cached: of its stages, or of its blocks
    where all are of one width. Empty: a plain vision transformer."""

    @property
    def architecture(self) -> str:
        """Shape in words."""
        if not self.map_widths:
            return f"{self.depth} blocks, width {self.width}, {self.heads} heads, patch {self.patch}"
        widths = dict.fromkeys(self.map_widths)
        if len(widths) == 1:
            return f"{self.depth} blocks, width {self.map_widths[0]}, pooled width {self.width}"
        return f"{self.depth} stages, widths {', '.join(map(str, self.map_widths))}, pooled width {self.width}"

    @property
    def tokens(self) -> int:
        """N: patches and prefix tokens."""
        return (self.image_size // self.patch) ** 2 + self.prefix_tokens

    @property
    def head_dim(self) -> int:
        """d = D / H."""
        return self.width // self.heads


class FeatureSpec(Contract):
    """Everything that determines a feature. Two specs with one fingerprint give the same features."""

    feature_version: int = FEATURE_VERSION
    """Definition of a feature."""
    store_version: int = STORE_VERSION
    """Layout of the store."""
    lpm: LpmInfo
    """Shape and preprocessing of the LPM."""
    weights_sha256: str
    """Sha256 of the weights file."""
    layers: tuple[int, ...]
    """Tapped blocks, ascending; empty without cached tokens."""
    importance: Importance
    """Rule of importance."""
    kept: int
    """T = int(ratio * N): tokens kept per head; 0 without cached tokens."""
    dtype: FeatureDtype
    """Type of keys and values."""
    codec: FeatureCodec = "none"
    """Compression of the chunks."""
    bitround: int | None = None
    """Mantissa bits of floats in the store; None: all."""
    pooled: bool = True
    """Whether the pooled outputs of the LPM are stored."""
    precision: Precision = "float32"
    """Type in which the LPM computes."""
    side_image_size: int
    """Side of the stored small image, in pixels."""
    resize: FeatureResize = "squash"
    """Rule that makes an image square, for the LPM and for the side network."""
    filter: ResizeFilter | None = None
    """Filter of the resize, where it is not `lpm.interpolation`."""
    normalisation: Normalisation = "lpm"
    """Source of `lpm.mean` and `lpm.std`: the LPM's training, or the training images of a study."""
    window: Window = "stored"
    """Grey values of files of more than 8 bits that become black and white."""
    frame: Frame = "middle"
    """Frame or slice of a file that has several."""
    hidden: int | None = None
    """Block whose input tokens, all N, are cached too; None: no block's."""
    statistics: bool = False
    """Whether token statistics of every block are cached (`segments`)."""

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the canonical JSON of all fields; the store is named by its first 16 characters."""
        fields = self.model_dump(mode="json")
        if not self.statistics:
            del fields["lpm"]["mlp_width"]  # Nothing else depends on it.
        if not self.lpm.map_widths:
            del fields["lpm"]["map_widths"]  # Earlier stores have none.
        return digest({name: value for name, value in fields.items() if LATER_FIELDS.get(name, ...) != value})

    @property
    def rendering(self) -> Rendering:
        """Window and frame."""
        return Rendering(window=self.window, frame=self.frame)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Token statistics of a row, in their order; none without them."""
        if not self.statistics:
            return ()
        lpm = self.lpm
        if lpm.map_widths:
            return map_segments(lpm.map_widths)
        return segments(lpm.depth, lpm.width, lpm.mlp_width or 0, lpm.has_class_token, self.layers)

    def probe_sources(self, rule: ProbeRule, with_pooled: bool = True) -> tuple[ProbeSource, ...]:
        """Return what the linear probes of an ensemble read of a row: pooled outputs, then token statistics.

        Args:
            rule: Which of the statistics.
            with_pooled: Whether the rows of the method begin with the pooled outputs, where these are stored.
        """
        first = 2 * self.lpm.width if self.pooled and with_pooled else 0
        pooled = (
            (ProbeSource(name="pooled outputs", spans=((0, first),)),)
            if first and rule in ("all", "kept", "central")
            else ()
        )
        if self.lpm.map_widths:
            return pooled + map_sources(self.segments, rule, first)
        return pooled + grouped(self.segments, self.lpm.depth, self.lpm.width, rule, first)

    @property
    def resize_filter(self) -> ResizeFilter:
        """Filter of the resize."""
        return self.filter or self.lpm.interpolation

    def normalised(self, lpm: LpmInfo) -> LpmInfo:
        """Return `lpm` with the mean and standard deviation of these features, if those are of a data set."""
        if self.normalisation == "lpm":
            return lpm
        return lpm.model_copy(update={"mean": self.lpm.mean, "std": self.lpm.std})

    def differing(self, other: FeatureSpec) -> dict[str, tuple[Any, Any]]:
        """Return the dotted fields in which `other` differs from this spec, as (this, other)."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return {
            name: (mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            # The name of the LPM determines the width of its MLP.
            if mine.get(name) != theirs.get(name) and name != "lpm.mlp_width"
        }

    @property
    def bytes_per_image(self) -> int:
        """Bytes of one row in the store without checksums and shard indices, before compression."""
        lpm = self.lpm
        per_layer = lpm.heads * (2 * _encoded_bytes(self.dtype, self.kept, lpm.head_dim) + 2 * self.kept)
        pooled = 2 * lpm.width * 4 if self.pooled else 0
        hidden = 0 if self.hidden is None else _encoded_bytes(self.dtype, lpm.tokens, lpm.width)
        return len(self.layers) * per_layer + hidden + pooled + self.statistics_bytes + 3 * self.side_image_size**2 + 32

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the token statistics of one row, float16."""
        return 2 * self.segments[-1].stop if self.segments else 0

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """`bytes_per_image` of the same features in every dtype."""
        return {name: self.model_copy(update={"dtype": name}).bytes_per_image for name in get_args(FeatureDtype)}


class ChannelStatistics(Contract):
    """Mean and standard deviation per channel of training images at the LPM's input size (`normalisation: dataset`)."""

    images_sha256: str
    """Digest of the sorted ids of the images."""
    images: int
    """Image contents, each counted once."""
    image_size: int
    """Side of the square input, in pixels; padding does not count."""
    resize: FeatureResize
    """Rule that makes an image square."""
    filter: ResizeFilter
    """Filter of the resize."""
    rendering: Rendering | None = None
    """Window and frame; None: the defaults."""
    mean: tuple[float, float, float]
    """Per channel (RGB), of pixels in [0, 1], rounded to 4 decimals."""
    std: tuple[float, float, float]
    """Per channel (RGB), of pixels in [0, 1], rounded to 4 decimals."""


def _encoded_bytes(dtype: FeatureDtype, tokens: int, width: int) -> int:
    """Bytes of (tokens, width) numbers in a dtype, with the scales and offsets that decode them."""
    per_token = {"float32": 4 * width, "float16": 2 * width, "int8": width, "int4": -(-width // 2)}[dtype]
    # One byte of scale per token (int8) or per channel (int4), and a float16 offset per channel.
    side_data = {"int8": tokens + 2 * width, "int4": width + 2 * width}.get(dtype, 0)
    return tokens * per_token + side_data


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


class FileDigest(Contract):
    """One file of a shard."""

    bytes: int
    """Length."""
    sha256: str
    """Sha256 of the content."""


class ShardReceipt(Contract):
    """Proof that a shard is complete. Written last, by atomic rename: no receipt, no shard."""

    shard: int
    """Number; its rows are [shard * shard_size, ...)."""
    fingerprint: str
    """Fingerprint of its store."""
    rows: tuple[ImageId, ...]
    """Row ids in their order; may be fewer than shard_size. The row id of the image itself is its image id."""
    files: dict[str, FileDigest]
    """Array name -> digest of this shard's file."""
    seconds: float
    """Time from the first decode to the last byte."""
    images: tuple[ImageId, ...] | None = None
    """Image id of each row; None: each row is an image itself."""
    views: tuple[str, ...] | None = None
    """View of each row, crops with their parameters (`schemas.views.ViewRow`); None: each row is an image itself."""
    crc32c: dict[str, str] | None = None
    """Array name -> CRC32C of each row's decoded little-endian bytes, 8 hex digits per row. It ties a file to its
    receipt: files of uncompressed rows have equal lengths and indices. None: written by an earlier version."""

    @model_validator(mode="after")
    def _check_views(self) -> ShardReceipt:
        if (self.images is None) != (self.views is None):
            raise ValueError("images and views go together")
        if self.images is not None and self.views is not None:
            # The names hold images and views, and the digest of a receipt holds the names.
            named = [ViewRow(*row).row_id for row in zip(self.images, self.views, strict=True)]
            if tuple(named) != self.rows:
                raise ValueError("images and views do not give the names of the rows")
        return self

    @model_validator(mode="after")
    def _check_checksums(self) -> ShardReceipt:
        if self.crc32c is not None:
            if self.crc32c.keys() != self.files.keys():
                raise ValueError("files and checksums go together")
            if any(len(bytes.fromhex(text)) != CRC_BYTES * len(self.rows) for text in self.crc32c.values()):
                raise ValueError("each row of each array has one checksum")
        return self

    def checksums(self, array: str) -> bytes | None:
        """Return the CRC32C of each row of an array, big-endian, 4 bytes per row; None without checksums."""
        return None if self.crc32c is None else bytes.fromhex(self.crc32c[array])

    @property
    def origins(self) -> tuple[ViewRow, ...]:
        """Image and view of each row."""
        if self.images is None or self.views is None:
            return tuple(ViewRow(row, IDENTITY) for row in self.rows)
        return tuple(ViewRow(*row) for row in zip(self.images, self.views, strict=True))

    def to_json(self) -> bytes:
        """Return the content of its file, without fields that are None."""
        return self.model_dump_json(indent=1, exclude_none=True).encode()


class ExtractionReceipt(Contract):
    """The features of a study: a small file that DVC tracks instead of the store."""

    fingerprint: str
    """Fingerprint of the store."""
    spec: FeatureSpec
    """Definition of the features."""
    images: int
    """Image contents of the manifest, each counted once."""
    manifest_sha256: str
    """Digest of the sorted image ids."""
    shards: dict[str, str]
    """Shard number -> digest of its receipt's files, for the shards that hold the manifest's rows."""
    views: tuple[FixedView, ...] = (IDENTITY,)
    """Extracted views of the training images."""
    crops: int = 0
    """Extracted random crops of each training image."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Share of the area that the crops keep, (lowest, highest)."""


class ExtractionPlan(Contract):
    """Prediction of an extraction, before anything is computed."""

    fingerprint: str | None
    """Fingerprint of the features; None before the mean and deviation of the training images are computed."""
    store: str | None
    """Folder of the store; None as for `fingerprint`."""
    images: int
    """Image contents of the manifest."""
    rows: int
    """Rows of the store that they need: each image, and the other views of training images."""
    cached: int
    """Rows that are in the cache already."""
    reused: int = 0
    """Rows of `cached` that are copied from a store of more layers."""
    to_compute: int
    """Rows that are not cached."""
    bytes_per_image: int
    """Size of one row."""
    statistics_bytes: int = 0
    """Size of its token statistics."""
    cache_bytes_by_dtype: dict[str, int]
    """Size of one row in each dtype."""
    bytes: int
    """Size of the rows that will be computed or copied."""
    files: int
    """Files that will be written."""
    free_bytes: int
    """Free space on the disk of the cache root."""
    seconds: float
    """Estimated time for `to_compute`."""
    estimate: Literal["receipts", "probe"]
    """Basis of `seconds`: times of earlier shards, or a short measured matrix product and the LPM's operations."""
