"""What precision costs: state, time and held-out loss of every precision of the state."""
