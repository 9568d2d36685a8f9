"""Where this installation keeps its state and finds its services; every field is RATCHET_<NAME>."""

import os
from functools import cached_property
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


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
    engine_url: str | None = None
    """A running inference server; default: the engines that `ratchet up` registers."""
    artifacts_url: str | None = None
    """Where versions' files are kept: `s3://bucket/prefix` or `file:///path`; default: folders in `home`."""
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
    trainer_processes: int = Field(default=1, ge=1)
    """That train together, one for each GPU; a CPU is used better by the threads of one."""
    trainer_silence_seconds: float = Field(default=1800.0, gt=0)
    """A trainer that reports nothing for so long hangs: it is killed, and the update tried again."""
    trainer_sharded: bool = False
    """Share the trainer's weights out over its processes (FSDP) instead of a copy in each."""
    engine_threads: int = Field(default_factory=half_the_cores, ge=1)
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
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'ratchet.db'}"

    @property
    def resolved_broker_url(self) -> str:
        return self.broker_url or f"redis+socket://{self.home / 'valkey.sock'}"
