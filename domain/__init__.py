"""Words of Ratchet: plain shapes shared by every room. Standard library and pydantic only."""
