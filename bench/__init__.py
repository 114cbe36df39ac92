"""Measuring heads against plain decoding, and the target that demo, benchmarks and examples share."""
