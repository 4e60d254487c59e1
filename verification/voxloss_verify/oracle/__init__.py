"""What a loss ought to be: the independent witness, which imports neither voxloss nor torch.

`claims` what a loss declares of itself; `volumes` what it is tried on, `generated` by Hypothesis; `sums` exact
sums and scores; `exact` the value and gradient that follow from them, with `entropy` for means over voxels and
`confusion` for losses of all four entries of a confusion matrix.
"""
