"""A frozen backbone's features as arrays and pictures."""
