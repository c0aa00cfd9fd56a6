"""Triton kernels, one op a file with its launchers; installed as `vsr1.kernels`. They import triton, torch
and each other only."""
