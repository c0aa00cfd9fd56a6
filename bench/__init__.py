"""Benchmarks, one file an op; each checks that the answers agree before it times them."""
