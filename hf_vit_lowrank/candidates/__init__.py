"""Ways to make a piece of the network smaller: statistics and weights to an error curve, and a size to new weights."""
