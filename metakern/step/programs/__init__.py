"""Whole steps as programs: compiled by torch, or captured as CUDA graphs."""
