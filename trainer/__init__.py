"""Self-distillation fine-tuning (SDFT) and its controls; a process that knows no database, nor our HTTP."""
