"""voxloss as the loss of nnU-Net v2's trainers: `docs/nnunet.md`.

`python -m voxloss.integrations.nnunet` lets nnU-Net find the trainers of `voxloss.integrations.nnunet.trainers`.
"""
