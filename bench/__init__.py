"""Measuring heads against plain decoding."""
