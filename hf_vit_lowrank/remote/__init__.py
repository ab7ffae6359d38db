"""The two files that are copied verbatim into every checkpoint."""
