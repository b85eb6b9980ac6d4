"""Protocols and metrics; no names of data sets."""
