"""The embedded inference engine: one base model, many adapters, vLLM's HTTP API. Knows nothing of Ratchet."""
