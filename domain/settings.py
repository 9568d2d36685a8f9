"""Where this installation keeps its state and finds its services; every field is RATCHET_<NAME>."""

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes."""
VLLM_DEFAULT_RANK = 16
CHECKOUT = Path(__file__).resolve().parents[1]


def a_vllm_rank(rank: int) -> int:
    if rank not in VLLM_RANKS:
        raise ValueError(f"one of {', '.join(map(str, VLLM_RANKS))}")
    return rank


def half_the_cores() -> int:
    """Trainer and engine share the machine; together they should not exceed its cores."""
    return max(1, (os.cpu_count() or 1) // 2)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="RATCHET_", frozen=True)

    home: Path = Field(default_factory=lambda: Path.home() / ".ratchet")
    """All state of the embedded stack."""
    cache_dir: Path = Field(default_factory=lambda: Path.home() / ".cache" / "ratchet")
    """Base models; shared by homes."""
    database_url: str | None = None
    """SQLAlchemy URL; default: SQLite in `home`."""
    broker_url: str | None = None
    """Celery broker; default: the embedded Valkey's socket in `home`."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """Which inference engine `ratchet up` starts for each base model, or `engine_url` names."""
    engine_url: str | None = None
    """Running inference servers, comma-separated; default: the engines that `ratchet up` registers."""
    engine_prompt_logprobs: bool = False
    """Whether the servers that `engine_url` names can score prompts safely: see docs/serving.md."""
    engine_adapters: int = Field(default=64, ge=4)
    """Adapters that an engine holds at a time: served versions, and those that evaluations load."""
    engine_batch_adapters: int = Field(default=8, ge=1)
    """Adapters whose requests vLLM computes together; more wait for each other."""
    engine_max_rank: Annotated[int, AfterValidator(a_vllm_rank)] = VLLM_DEFAULT_RANK
    """Highest rank that vLLM takes: every adapter costs as much as one of this rank."""
    vllm_python: Path = CHECKOUT / ".vllm" / "bin" / "python"
    """Interpreter of vLLM's own environment, made by `make vllm`."""
    vllm_args: str = ""
    """Further arguments of vLLM's server, as in a shell."""
    artifacts_url: str | None = None
    """Where versions' files are kept: `s3://bucket/prefix` or `file:///path`; default: folders in `home`."""
    artifacts_cache_bytes: int = Field(default=50_000_000_000, gt=0)
    """Of local copies of versions that an object store keeps; more only while more are in use."""
    keep_versions: int | None = Field(default=None, ge=1)
    """Newest versions of an assistant whose files are always kept; default: those of all versions."""
    artifacts_grace_hours: float = Field(default=24.0, gt=0)
    """Files that nothing names, and versions no longer needed, are left alone for so long."""
    general_suite_dir: Path | None = None
    """Folder of general benchmarks; default: the built-in suite."""
    lease_seconds: float = Field(default=60.0, gt=0)
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    sweep_seconds: float = Field(default=2.0, gt=0)
    update_tries: int = Field(default=6, ge=1)
    """Starts of an update that get no further than the one before, until it fails."""
    retry_seconds: float = Field(default=30.0, gt=0)
    """Before the second try of an update; doubled for each further one, up to ten minutes."""
    trainer_threads: int = Field(default_factory=half_the_cores, ge=1)
    rollout_url: str | None = None
    """A running inference server of the base model that draws answers for updates; default: the trainer."""
    trainer_processes: int = Field(default=1, ge=1)
    """That train together, one for each GPU; a CPU is used better by the threads of one."""
    trainer_silence_seconds: float = Field(default=1800.0, gt=0)
    """A trainer that reports nothing for so long hangs: it is killed, and the update tried again."""
    trainer_sharded: bool = False
    """Share the trainer's weights out over its processes (FSDP) instead of a copy in each."""
    max_engines: int = Field(default=4, ge=1)
    """`ratchet up` starts an engine for a full version, served or measured, only while fewer than that run.
    Those of base models count, but always start."""
    engine_threads: int = Field(default_factory=half_the_cores, ge=1)
    version_idle_seconds: float = Field(default=30.0, ge=0)
    """From its last use until a version that no alias names is unloaded, or a full one's engine stopped."""
    engine_connect_seconds: float = Field(default=5.0, gt=0)
    engine_first_byte_seconds: float = Field(default=120.0, gt=0)
    """The gateway's patience until a stream begins, queueing and prompt included."""
    engine_between_bytes_seconds: float = Field(default=60.0, gt=0)
    """Silence within a reply that has begun."""
    engine_reply_seconds: float = Field(default=600.0, gt=0)
    """Until a whole reply begins, which is when its last token is there."""
    gateway_places: int = Field(default=512, ge=1)
    """Completions under way in one API process."""
    gateway_places_per_assistant: int = Field(default=256, ge=1)
    gateway_queue: int = Field(default=128, ge=0)
    """Completions that wait for a place; further ones are refused at once."""
    gateway_queue_seconds: float = Field(default=2.0, gt=0)
    shadow_requests: int = Field(default=4, ge=1)
    """Shadow requests under way in one API process; further ones are dropped."""
    shadow_engine_requests: int = Field(default=8, ge=1)
    """An engine with more requests than that under way gets no shadow request."""
    log_level: str = "INFO"
    webhook_trusted_hosts: str = ""
    """Receivers of webhooks that may be private and speak plain HTTP, comma-separated host names."""
    allowed_hosts: str = "127.0.0.1,localhost,[::1]"
    """Host names that the API answers to, comma-separated; `*` answers to any (behind a proxy)."""

    @cached_property
    def artifacts_dir(self) -> Path:
        return self.home / "artifacts"

    @cached_property
    def artifacts_cache_dir(self) -> Path:
        """Verified local copies of versions that an object store keeps."""
        return self.home / "artifacts-cache"

    @cached_property
    def work_dir(self) -> Path:
        """Job files, checkpoints and adapters that are not published yet."""
        return self.home / "work"

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """Of the servers that run already; none where `ratchet up` starts them."""
        given = (url.strip().rstrip("/") for url in (self.engine_url or "").split(","))
        return tuple(dict.fromkeys(url for url in given if url))

    @property
    def starts_engines(self) -> bool:
        """Whether `ratchet up` runs the engines, so that a full version can have one started for it."""
        return not self.engine_urls

    @property
    def adapter_rank_limit(self) -> int | None:
        """Highest rank that the engine serves; None: the embedded one takes what a recipe may ask for."""
        return self.engine_max_rank if self.engine == "vllm" else None

    @property
    def scores_prompts(self) -> bool:
        """Whether log-probabilities of a prompt may be asked for: they may end a vLLM of unknown flags."""
        return not self.engine_urls or self.engine_prompt_logprobs

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'ratchet.db'}"

    @property
    def resolved_broker_url(self) -> str:
        return self.broker_url or f"redis+socket://{self.home / 'valkey.sock'}"
