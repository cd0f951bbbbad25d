"""One file per loss family: the mathematics, the checks and the composition of the primitives."""
