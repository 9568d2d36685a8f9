"""Benchmarks: started by `ratchet bench`, each a process of its own; not part of the product's wheel."""
