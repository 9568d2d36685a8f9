"""SDFT training on torch, peft and transformers: a process of its own that knows no database and no HTTP."""
