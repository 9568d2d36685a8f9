"""Version files and base models on disk; torch-free."""
