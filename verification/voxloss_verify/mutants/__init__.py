"""Mutation testing: incorrect losses, which the laws must detect.

`textbook` correct losses, a method per step; `mutants` each with one step wrong; `kill_matrix` which law detects
which.
"""
