"""Phantoms whose Dice and IoU are known exactly, CT to train on, a real brain MRI; as NIfTI with true geometry.

A phantom's scores follow from its geometry, in `fractions.Fraction`; nothing is counted or rounded.
Start with `all_phantoms()` in memory, `write_phantoms(folder)` on disk, `write_ct_set(folder)` for a
set of labelled CT volumes to train on, `vessel_tree()` and `many_lesions()` for thin and for many structures,
`brain_mri()` for the MNI152 brain, `training_set(folder)` for which image belongs to which label map in a folder
of scans.
Nothing here imports torch or voxloss, so that the data are independent of the losses that they test.
"""

from voxloss_data.ct import write_ct_set
from voxloss_data.mni import BrainMRI, brain_mri
from voxloss_data.phantoms import (
    ImagePair,
    Phantom,
    SpherePhantom,
    all_phantoms,
    checkerboard,
    constant,
    half_volumes,
    inverse_checkerboards,
    nested_cubes,
    ramp,
    shifted_boxes,
    spheres,
    write_phantoms,
)
from voxloss_data.structures import Lesions, VesselTree, many_lesions, vessel_tree
from voxloss_data.training_sets import Scan, TrainingSet, training_set

__all__ = [
    "BrainMRI",
    "ImagePair",
    "Lesions",
    "Phantom",
    "Scan",
    "SpherePhantom",
    "TrainingSet",
    "VesselTree",
    "all_phantoms",
    "brain_mri",
    "checkerboard",
    "constant",
    "half_volumes",
    "inverse_checkerboards",
    "many_lesions",
    "nested_cubes",
    "ramp",
    "shifted_boxes",
    "spheres",
    "training_set",
    "vessel_tree",
    "write_ct_set",
    "write_phantoms",
]
