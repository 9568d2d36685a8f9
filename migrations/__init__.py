"""Alembic migrations of the ledger, found through this package wherever it is installed."""
