"""Wall clock, MACs, memory and the rows of a comparison."""
