"""A whole step as a program: compiled by torch, or captured as a CUDA graph."""
