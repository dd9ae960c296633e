"""The report of a run: one HTML file with verdict, curves, pictures and settings (docs/monitoring.md)."""
