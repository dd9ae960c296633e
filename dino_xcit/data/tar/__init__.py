"""Images in tar archives: what an archive holds (members), which of it is one image (samples), reading it (source)."""

from dino_xcit.data.tar.source import TarSource, open_tar

__all__ = ["TarSource", "open_tar"]
