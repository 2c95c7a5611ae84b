"""Rotations of a model's residual stream, folded into the weights beside it: the same function, with fewer outliers to round."""
