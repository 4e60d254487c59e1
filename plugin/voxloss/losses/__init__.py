"""The losses: a formula over the sums of one pass each, as modules. `from voxloss import …` has them all.

`base` what every loss shares; on it `region` (a formula per class) and `voxelwise` (a mean over voxels: cross
entropy, focal); on `region` the overlap losses and those of the whole confusion matrix; on both the compounds.
"""
