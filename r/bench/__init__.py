"""Benchmarks of cm_fused, and its demo."""
