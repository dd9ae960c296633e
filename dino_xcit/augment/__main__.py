"""``python -m dino_xcit.augment preview SRC``."""

from dino_xcit.preview import command

if __name__ == "__main__":
    command()
