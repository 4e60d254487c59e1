"""`voxloss bench`: how fast, and in how much memory, losses compute forward and backward.

One room per job: `cases` what is measured, `contenders` who competes, `plain` the best that plain torch can do,
`exact` what is right, `timing`, `memory`, `measure` one case from inputs to figures, `job` that in a process of
its own, `machine` where it ran, `results` what is kept, `run` all of it, `goals` what should be reached, `page`
and `plot` what is written; `gpu_resources` what the kernels take of a GPU that need not be there;
`head`, `head_time` and `head_memory` what a head with lazy logits saves; `gpu_report` the file that
`voxloss doctor --gpu` leaves, for the page.
"""
