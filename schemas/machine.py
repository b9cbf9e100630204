"""Settings of the machine: where features are read, what computes. Never part of a fingerprint."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from schemas.base import Name, Section, Text, Word
from schemas.urls import holds_secret

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes of a unit."""
LARGEST = 2**60
"""Bytes that a memory may have: 1 EiB."""

Resources = Annotated[dict[Word, Annotated[float, Field(gt=0.0, le=1e9)]], Field(max_length=32)]


class StoreSettings(Section):
    """How stage two reads the feature store. Never part of a fingerprint; DVC does not watch it."""

    model_config = ConfigDict(hide_input_in_errors=True)

    memory_budget: Annotated[int, Field(ge=0, le=LARGEST)] | Word = "auto"
    """Features of the study's images are held in memory if they take no more than this: bytes, or text such as 2GB or
    1.5GiB; 0: never; auto: half of the memory that is free when training starts."""
    remote: Name | None = None
    """URL or folder of a cache root, such as `fpt cache push` fills, whose store training and evaluation read in place
    where the local cache lacks it; null: none. Relative paths start at the folder of `params.yaml`. Never with a
    password: credentials belong in the environment."""

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
                "must not hold a password or token, since it is written beside results; set them in the environment"
                " (FSSPEC_FTP_USERNAME and FSSPEC_FTP_PASSWORD, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY;"
                " docs/store.md has more)"
            )
        return value

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes; None: auto."""
        return _bytes(self.memory_budget) if isinstance(self.memory_budget, str) else self.memory_budget


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]{0,3})", text.strip())
    if match is None or match[2].upper() not in UNITS:
        return None
    size = float(match[1]) * UNITS[match[2].upper()]
    return int(size) if size <= LARGEST else None


class ComputeSettings(Section):
    """How to use this machine. Never part of a fingerprint; DVC does not watch it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """torch threads; 0: as many as the process may use."""
    extract_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65_536)] = "auto"
    """Images per forward pass of the LPM, halved where they do not fit the memory; auto: 4, on an accelerator 32."""
    loader_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that read the store in training; 0: the training process itself."""


class SlurmSettings(Section):
    """What a job of SLURM asks for; one job is one worker. null: what Dask's jobqueue.yaml or the site says."""

    queue: Name | None = None
    """Partition."""
    account: Name | None = None
    """Account that pays."""
    walltime: Name | None = None
    """Longest time of a job, such as 04:00:00; a shard that is cut off is computed again by another."""
    cores: Annotated[int, Field(ge=1, le=4096)] = 4
    """CPU cores of a job."""
    directives: Annotated[tuple[Name, ...], Field(max_length=100)] = ()
    """Further #SBATCH options, such as --gres=gpu:1."""


class ClusterSettings(Section):
    """Who does stage one: this process, or workers of Dask. Never part of a fingerprint; DVC does not watch it."""

    kind: Literal["inline", "local", "scheduler", "cuda", "slurm"] = "inline"
    """inline: this process; local: processes of this machine; cuda: one for each of its GPUs; slurm: jobs; scheduler:
    the workers of a running one."""
    workers: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Processes of local, jobs of slurm."""
    threads_per_worker: Annotated[int, Field(ge=0, le=1024)] = 0
    """torch threads of a worker; 0: compute.threads, and if that is 0 too, its share of the cores."""
    memory: Annotated[Word, Field(validate_default=True)] = "auto"
    """Memory of a worker, such as 16GiB: one that takes more is killed; auto: its share of this machine's."""
    address: Annotated[Text | None, Field(validate_default=True)] = None
    """Address of the scheduler, such as tcp://host:8786."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """How often a shard is given away again after its worker died or failed."""
    resources: Resources = Field(default_factory=dict)
    """What a shard takes of a worker's resources, such as {GPU: 0.5} for two at once on a worker that offers GPU=1."""
    wait: Annotated[float, Field(gt=0.0, le=1e7)] = 600.0
    """Seconds to wait for a worker of a job, and after the last worker was lost."""
    slurm: SlurmSettings = SlurmSettings()
    """Jobs of slurm."""

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
