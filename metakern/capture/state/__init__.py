"""What a pass may change, kept at one moment and put back: tensors, attributes, random numbers, loss state."""
