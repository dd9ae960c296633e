"""Ranks, run health, metrics, logging and atomic files."""
