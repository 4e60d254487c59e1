"""`voxloss score`: label maps against references; `scores` counts, `table` prints and writes."""
