"""A backbone in the forms that other libraries load: ``python -m dino_xcit.export`` (docs/export.md)."""
