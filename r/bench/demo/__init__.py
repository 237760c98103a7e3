"""Train two models with AdamCM beside torch's AdamW: ``python -m bench.demo``."""
