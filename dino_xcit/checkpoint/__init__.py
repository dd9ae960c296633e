"""Checkpoint contents and folder, asynchronous saving, and resuming."""
