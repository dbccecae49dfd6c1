"""Proof that each example's loss depends on that example alone, and of which rows of a layer are its own."""
