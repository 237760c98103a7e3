"""The optimizers' base: options, state dicts and the dispatch of a step."""
