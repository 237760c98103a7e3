"""How a step's time and memory grow: with elements, tensors, groups, slots and threads."""
