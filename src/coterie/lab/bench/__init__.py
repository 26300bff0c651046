"""Benchmarks of layers, forwards and answers, against a memory read and other libraries."""
