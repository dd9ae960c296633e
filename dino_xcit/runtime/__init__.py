"""The processes of a run, its health, its metrics, and files that are complete or absent."""
