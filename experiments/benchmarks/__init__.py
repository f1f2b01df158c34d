"""Benchmarks: each measures time, memory or precision, and writes JSON and tables to results/."""
