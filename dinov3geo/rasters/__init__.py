"""Georeferencing and raster I/O. Knows no neural network."""
