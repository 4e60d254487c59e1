"""Wrong losses, which the laws must catch: the proof that the suite catches anything.

`textbook` correct losses, a method per step; `mutants` each with one step wrong; `kill_matrix` which law catches
which.
"""
