"""Ways to win back what shrinking lost, from cheap to dear."""
