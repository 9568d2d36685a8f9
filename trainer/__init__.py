"""Self-distillation fine-tuning (SDFT) and its control; a process that knows no database and no HTTP."""
