"""Client of the inference engine (vLLM's HTTP API), adapter validation, routes and the swap controller."""
