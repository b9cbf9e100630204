"""Settings of the machine: where features are read and where they are computed. Never part of a fingerprint."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ByteSize, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator

from schemas.base import Name, Section, Text, Word
from schemas.urls import holds_secret

LARGEST = 2**60
"""Largest memory size in bytes: 1 EiB."""
# Stricter than ByteSize, which also takes bits, units without B, and any text after the unit.
_MEMORY = re.compile(r"\d{1,15}(?:\.\d{1,15})?\s*(?:(?:[KkMmGg][Ii]?|[Tt])?[Bb])?")
_BYTE_SIZE = TypeAdapter(ByteSize)

Resources = Annotated[dict[Word, Annotated[float, Field(gt=0.0, le=1e9)]], Field(max_length=32)]


class StoreSettings(Section):
    """How stage two reads the feature store. Never part of a fingerprint; DVC does not watch it."""

    model_config = ConfigDict(hide_input_in_errors=True)

    memory_budget: Annotated[int, Field(ge=0, le=LARGEST)] | Word = "auto"
    """Training holds the features of its images in memory if they take no more than this: bytes, or text such as 2GB or
    1.5GiB; 0: never; auto: half of the memory that is free when training starts."""
    remote: Name | None = None
    """URL or folder of a cache root, such as `fpt cache push` fills, whose store training and evaluation read in place
    if the local cache lacks it; null: none. Relative paths start at the folder of `params.yaml`. Passwords are refused:
    credentials belong in the environment."""

    @field_validator("memory_budget")
    @classmethod
    def _check_budget(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value != "auto" and _bytes(value) is None:
            raise ValueError("must be auto, a number of bytes, or text such as 2GB or 1.5GiB")
        return value

    @field_validator("remote")
    @classmethod
    def _check_remote(cls, value: str | None) -> str | None:
        if value is not None and holds_secret(value):
            raise ValueError(
                "must not hold a password or token, since it is saved with the results; set them in the environment"
                " (FSSPEC_FTP_USERNAME and FSSPEC_FTP_PASSWORD, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY;"
                " docs/store.md has more)"
            )
        return value

    @property
    def memory_bytes(self) -> int | None:
        """Budget in bytes; None for auto."""
        return _bytes(self.memory_budget) if isinstance(self.memory_budget, str) else self.memory_budget


def _bytes(text: str) -> int | None:
    # The settings keep the text as it was written, so that params.yaml and its digests do not change.
    text = text.strip()
    size = int(_BYTE_SIZE.validate_python(text)) if _MEMORY.fullmatch(text) else LARGEST + 1
    return size if size <= LARGEST else None


class ComputeSettings(Section):
    """How to use this machine. Never part of a fingerprint; DVC does not watch it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """torch threads; 0: one per available core."""
    extract_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65_536)] = "auto"
    """Images per forward pass of the LPM, halved when memory runs out; auto: 32 on an accelerator, 4 on a CPU."""
    loader_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that read the store during training; 0: the training process reads it."""


class SlurmSettings(Section):
    """Resources of a SLURM job; one job is one worker. null: the default of Dask's jobqueue.yaml or of the site."""

    queue: Name | None = None
    """Partition."""
    account: Name | None = None
    """Account to charge."""
    walltime: Name | None = None
    """Time limit of a job, such as 04:00:00; another worker computes an interrupted shard again."""
    cores: Annotated[int, Field(ge=1, le=4096)] = 4
    """CPU cores per job."""
    directives: Annotated[tuple[Name, ...], Field(max_length=100)] = ()
    """Further #SBATCH options, such as --gres=gpu:1."""


class ClusterSettings(Section):
    """Where stage one runs: in this process, or on Dask workers. Never part of a fingerprint; DVC does not watch it."""

    kind: Literal["inline", "local", "scheduler", "cuda", "slurm"] = "inline"
    """inline: this process; local: processes on this machine; cuda: one process per GPU of this machine; slurm: SLURM
    jobs; scheduler: the workers of a running Dask scheduler."""
    workers: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Processes (local) or jobs (slurm)."""
    threads_per_worker: Annotated[int, Field(ge=0, le=1024)] = 0
    """torch threads per worker; 0: compute.threads, and if that is 0 too, its share of the cores."""
    memory: Annotated[Word, Field(validate_default=True)] = "auto"
    """Memory per worker, such as 16GiB: a worker that exceeds it is killed; auto: its share of the machine's memory."""
    address: Annotated[Text | None, Field(validate_default=True)] = None
    """Address of the scheduler, such as tcp://host:8786."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """Retries per shard after its worker dies or fails."""
    resources: Resources = Field(default_factory=dict)
    """Worker resources that a shard uses, such as {GPU: 0.5} for two shards at once on a worker that offers GPU=1."""
    wait: Annotated[float, Field(gt=0.0, le=1e7)] = 600.0
    """Seconds to wait for the first worker of a SLURM cluster, and for a new worker after the last one was lost."""
    slurm: SlurmSettings = SlurmSettings()
    """Resources of each SLURM job."""

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" and not _bytes(value):
            raise ValueError("must be auto, or text such as 16GiB")
        if value == "auto" and info.data.get("kind") == "slurm":
            raise ValueError("slurm needs the memory of a job, such as 16GiB")
        return value

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("kind") == "scheduler":
            raise ValueError("scheduler needs an address, such as tcp://host:8786")
        if value is not None and not re.fullmatch(r"(tcp|tls|ws|wss|ucx)://\S+:\d{1,5}", value):
            raise ValueError("must be like tcp://host:8786")
        return value
