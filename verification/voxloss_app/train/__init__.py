"""`voxloss train` and `voxloss predict`: a segmentation network from a folder of images and label maps.

One room per job: `plan` what will be done and why, `volumes` the MONAI transforms, `network` what is trained and
by which steps, `loop` the epochs, `checkpoint` the saved state, `prediction` label maps on the images' own
grids, `rules` what options and plans may be, `lock` one run per folder, `ranks` distributed training, `run` the
commands.
"""

from voxloss_app.train.plan import Plan, TrainRequest, make_plan
from voxloss_app.train.run import predict_and_write, train_and_score

__all__ = ["Plan", "TrainRequest", "make_plan", "predict_and_write", "train_and_score"]
