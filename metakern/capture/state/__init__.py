"""Snapshots of what a pass may change, to be restored: tensors, attributes, random generators, state of the loss."""
