"""Whether an example's loss depends on that example alone, and which rows of a layer are its own: proved."""
