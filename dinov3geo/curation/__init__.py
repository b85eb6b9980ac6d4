"""Which chips of a large pool to train on: clusters, near-duplicates, neighbours of given images."""
