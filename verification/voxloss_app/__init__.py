"""The command `voxloss` and everything that a person sees: a room per command, and what the rooms share."""
