"""Measurements: what a loss costs in time, memory and registers."""
