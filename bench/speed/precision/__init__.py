"""The costs of precision: state, time and held-out loss of every precision of the state."""
