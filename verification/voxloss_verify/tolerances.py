"""Every tolerance of the suite and of the tests, by dtype; the same on every machine.

Keys are names of the *input's* dtype.
"""

from __future__ import annotations

# Absolute distance of a loss in [0, 1] from the exact value. Float64: a few hundred ulp. Float32: rounding of
# the probabilities (2⁻²⁴ each, averaging out) and of a pairwise block sum, summed on in float64. Half: the sums
# are float32's, and the oracle takes the rounded inputs.
LOSS = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6}

# The same where all voxels are alike: the additions of a row of 1024 numbers in float32, and the logarithms, are
# then rounded alike, and their errors do not average out.
LOSS_OF_A_CONSTANT_VOLUME = {
    "float64": 1e-12,
    **dict.fromkeys(("float32", "float16", "bfloat16"), 128 * 2.0**-25),
}

# Largest distance of a gradient from the exact one, relative to its largest element. Half: the result itself
# is rounded to 11 or 8 bits.
GRADIENT = {"float64": 1e-10, "float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# Distance from MONAI's value and gradient where both compute the same formula in that dtype.
PARITY = {"float64": 1e-10, "float32": 1e-5}

# A value this far off is that of the formula, computed in float32 somewhere: for guesses at what a loss is, only.
ROUNDING = 2e-6

# Rounding of one number that a pass computes with: what it makes of a logit, a logarithm, a row of voxels.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-24, "bfloat16": 2.0**-24}
# The smallest float16 above 0: two gradients that are rounded to float16 are no closer.
FLOAT16_SMALLEST = 2.0**-24
