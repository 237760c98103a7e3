"""The state of a parameter: what it has, how it is made, loaded and tracked."""
