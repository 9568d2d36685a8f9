"""The store that the settings name."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from artifacts.cache import VersionCache
from artifacts.store import ArtifactStore
from artifacts.version_store import VersionStore
from domain.errors import InvalidInput
from domain.settings import Settings


def open_store(settings: Settings) -> VersionStore:
    """Folders below the home, or what RATCHET_ARTIFACTS_URL names; nothing is read or written yet.

    Raises InvalidInput for a URL that is neither `s3://bucket/prefix` nor `file:///absolute/path`.
    """
    if settings.artifacts_url is None:
        return ArtifactStore(settings.artifacts_dir)
    parts = urlsplit(settings.artifacts_url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return ArtifactStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        from artifacts.object_store import ObjectStore  # its client is not for every process to load

        cache = VersionCache(settings.artifacts_cache_dir, settings.artifacts_cache_bytes)
        return ObjectStore(settings.artifacts_url, cache)
    raise InvalidInput(
        f"'{settings.artifacts_url}' is neither s3://bucket/prefix nor file:///absolute/path.",
        param="RATCHET_ARTIFACTS_URL",
    )
