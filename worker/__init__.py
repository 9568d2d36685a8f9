"""Runs updates: the Celery app, the dispatcher, and the story from claim to serving."""
