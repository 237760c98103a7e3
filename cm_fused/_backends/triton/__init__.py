"""The Triton step."""
