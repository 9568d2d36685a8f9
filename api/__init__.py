"""HTTP: native routes, the OpenAI-compatible gateway and the dashboard."""
