"""The dashboard: server-rendered pages over the registry, refreshed in place by htmx."""

from api.dashboard.pages import router

__all__ = ["router"]
