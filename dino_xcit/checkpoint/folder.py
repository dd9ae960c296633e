"""The checkpoints of one run on disk: each with a manifest, the newest that is whole, which of them are kept.

OUTPUT_DIR/checkpoints/step00001200.pth    the state after that step
OUTPUT_DIR/checkpoints/step00001200.json   its manifest: size, SHA-256, epoch, metric; written after it, so a
                                           checkpoint with a manifest is complete
OUTPUT_DIR/checkpoint.pth                  another name of the newest
OUTPUT_DIR/best.pth                        another name of the best by --best-metric
OUTPUT_DIR/backbone.pth                    the evaluated backbone alone, of the newest
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

FOLDER, LATEST, BEST, BACKBONE = "checkpoints", "checkpoint.pth", "best.pth", "backbone.pth"
ANEW = ".starts-anew"
"""Inside the output directory from the start of a run with ``--resume never`` until earlier checkpoints are gone."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without reading it."""

    step: int
    """Steps done."""
    epoch: int
    """Epochs done."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""
    global_batch: int
    """Images a step."""
    world_size: int
    """Processes that trained it."""
    steps_per_epoch: int = 0
    """Of the run that wrote it. A run that is resumed with another batch counts other steps."""
    keep: bool = False
    """Whether it stays however old it is."""
    metric_name: str = ""
    """--best-metric, where it was measured."""
    metric: float | None = None
    """Its value; higher is better."""
    written: float = 0.0
    """Seconds since 1970."""

    stem: str = ""
    """Of its file, without the suffix; not stored."""

    @property
    def name(self) -> str:
        """The checkpoint's file."""
        return f"{self.stem}.pth"

    @property
    def progress(self) -> float:
        """Epochs done, the last in part: what orders checkpoints."""
        return self.step / (self.steps_per_epoch or 1)


class CheckpointFolder:
    """Writes, finds and prunes the checkpoints of a run. One process writes, see run_lock."""

    def __init__(self, output_dir: Path, keep_last: int = 2) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / FOLDER
        self.latest = output_dir / LATEST
        self._keep_last = keep_last
        self._verified: set[str] = set()
        """Files that were read back, as a whole, by this object."""

    # ---- writing

    def write(self, content: Mapping[str, Any], keep: bool = False) -> Manifest:
        """Write :func:`dino_xcit.checkpoint.state.content_of`, its manifest and its other names; then prune.

        A crash at any moment leaves the checkpoint before this one, or this one, whole and found by :meth:`newest`.

        Raises:
            OSError: it cannot be written; the others are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        step, steps_per_epoch = int(content["step"]), int(content.get("steps_per_epoch", 0))
        path = self.folder / f"step{step:08d}.pth"
        self._keep_other_run(path, steps_per_epoch)
        written = atomic.write_torch(path, dict(content))
        manifest = Manifest(
            step, int(content["epoch"]), written.size, written.sha256, int(content["global_batch"]),
            int(content["world_size"]), steps_per_epoch, keep, written=time.time(), stem=path.stem,
        )  # fmt: skip
        self._write_manifest(manifest)
        self._verified.add(manifest.name)
        self._give_names(path, content)
        self.prune()
        return manifest

    def _keep_other_run(self, path: Path, steps_per_epoch: int) -> None:
        """Give another name to a checkpoint of the same number of steps that was written with another batch."""
        manifest = _read_manifest(path.with_suffix(".json"))
        if isinstance(manifest, str) or manifest.steps_per_epoch in (0, steps_per_epoch):
            return
        if not path.exists():
            return
        other = path.with_stem(f"{path.stem}-{manifest.steps_per_epoch}")
        atomic.give_name(path, other)
        os.replace(path.with_suffix(".json"), other.with_suffix(".json"))

    def finish(self, path: Path, content: Mapping[str, Any]) -> None:
        """Do the rest of a save that was cut short after its manifest: ``path`` is the newest, and gets its names."""
        if not self.latest.exists() or not _same_bytes(path, self.latest):
            self._give_names(path, content)
        best = _best(self.manifests())
        if best and not (self.output_dir / BEST).exists():
            atomic.give_name(self.folder / best.name, self.output_dir / BEST)

    def _give_names(self, path: Path, content: Mapping[str, Any]) -> None:
        atomic.write_torch(self.output_dir / BACKBONE, dict(content["backbone"]))
        atomic.give_name(path, self.latest)

    def note_metric(self, step: int, name: str, value: float) -> None:
        """Add the measured --best-metric to a checkpoint's manifest; the best becomes ``best.pth``."""
        manifest = next((one for one in self.manifests() if one.step == step), None)
        if manifest is None:
            return
        manifest = dataclasses.replace(manifest, metric_name=name, metric=value)
        self._write_manifest(manifest)
        best = _best(self.manifests())
        if best == manifest:
            atomic.give_name(self.folder / best.name, self.output_dir / BEST)
        self.prune()

    def prune(self) -> None:
        """Remove all but the newest ``keep_last`` that are whole, those marked to be kept, and the best.

        A file counts as whole only after it was read and its hash compared: nothing is removed on trust.
        """
        whole = 0
        best = _best(self.manifests())
        for path, manifest in self._entries():
            if isinstance(manifest, str):
                continue  # who knows what it was: perhaps one to be kept, on a file system that is away for a moment
            if whole < self._keep_last:
                whole += self._is_whole(manifest)
            elif not (manifest.keep or manifest == best):
                # The manifest goes first: a file without one is no checkpoint, one without its file a false promise.
                path.unlink(missing_ok=True)
                path.with_suffix(".pth").unlink(missing_ok=True)
        for path in self.folder.glob("step*.pth"):
            if not path.with_suffix(".json").exists():  # a save that was cut short between the two
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every checkpoint: a run starts anew."""
        if self.folder.exists():
            for path in sorted(self.folder.glob("step*.json")) + sorted(self.folder.glob("step*.pth")):
                path.unlink(missing_ok=True)
        for name in (LATEST, BEST, ANEW):  # the last says that all are gone
            (self.output_dir / name).unlink(missing_ok=True)

    def _write_manifest(self, manifest: Manifest) -> None:
        values = dataclasses.asdict(manifest)
        del values["stem"]
        atomic.write_json((self.folder / manifest.name).with_suffix(".json"), values | {"checksum": _checksum(values)})

    def _is_whole(self, manifest: Manifest) -> bool:
        if manifest.name not in self._verified and why_damaged(self.folder / manifest.name, manifest) is None:
            self._verified.add(manifest.name)
        return manifest.name in self._verified

    # ---- finding

    def manifests(self) -> list[Manifest]:
        """Of all complete checkpoints, newest first; manifests that cannot be read are left out."""
        return [manifest for _, manifest in self._entries() if isinstance(manifest, Manifest)]

    def _entries(self) -> list[tuple[Path, Manifest | str]]:
        """Manifests by their files, newest first; a sentence for one that cannot be read."""
        found = [(path, _read_manifest(path)) for path in self.folder.glob("step*.json")]
        last = max((one for _, one in found if isinstance(one, Manifest)), key=lambda one: one.written, default=None)
        steps_per_epoch = (last and last.steps_per_epoch) or 1
        found = [(path, _with_steps_per_epoch(one, steps_per_epoch)) for path, one in found]

        def progress(entry: tuple[Path, Manifest | str]) -> float:
            path, manifest = entry
            if isinstance(manifest, Manifest):
                return manifest.progress
            digits = path.stem.removeprefix("step").partition("-")[0]
            return int(digits) / steps_per_epoch if digits.isdecimal() else 0.0

        return sorted(found, key=progress, reverse=True)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose bytes are those that were written, and sentences on what had to be passed over.

        ``(None, [])`` where the run has saved nothing yet. A ``checkpoint.pth`` alone, without manifests, is taken as
        it is, which is said: an earlier version wrote it, or somebody put it there.

        Raises:
            InputError: there are checkpoints, and all of them are damaged.
        """
        notices = []
        for _, manifest in self._entries():
            if isinstance(manifest, str):
                notices.append(manifest)
                continue
            file = self.folder / manifest.name
            damage = why_damaged(file, manifest)
            if damage is None:
                self._verified.add(manifest.name)
                if notices:
                    notices.append(f"going back to the checkpoint of step {manifest.step}")
                return file, notices + self._why_latest_is_passed_over(file)
            notices.append(f"{file} is damaged: {damage}")
        if notices:
            raise InputError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(notices[:3])}): bring one back from a copy, "
                "or start anew with --resume never"
            )
        if not self.latest.exists():
            return None, []
        return self.latest, [f"{self.latest} has no manifest in {self.folder}: whether it is whole cannot be known"]

    def _why_latest_is_passed_over(self, newest: Path) -> list[str]:
        """A sentence where ``checkpoint.pth`` is none of the files that the manifests speak of."""
        try:
            if not self.latest.exists() or os.path.samefile(self.latest, newest):
                return []
            digest = atomic.digest_of(self.latest)
        except OSError as error:
            return [f"{self.latest} cannot be read ({error.strerror}): using {newest}"]
        if any((m.size, m.sha256) == (digest.size, digest.sha256) for m in self.manifests()):
            return []  # a save was cut short before it got to this name
        return [f"{self.latest} is damaged or not of this run: using {newest}"]


def _with_steps_per_epoch(manifest: Manifest | str, steps_per_epoch: int) -> Manifest | str:
    """Versions before 0.2 did not write this number: theirs is that of the run now."""
    if isinstance(manifest, str) or manifest.steps_per_epoch:
        return manifest
    return dataclasses.replace(manifest, steps_per_epoch=steps_per_epoch)


def _same_bytes(file: Path, other: Path) -> bool:
    """Whether both hold the same; a copied directory has two files where the original has two names of one."""
    return os.path.samefile(file, other) or atomic.digest_of(file) == atomic.digest_of(other)


def why_damaged(file: Path, manifest: Manifest) -> str | None:
    """A clause, or None where the file is the one that was written."""
    try:
        size = file.stat().st_size
        if size != manifest.size:
            return f"it has {size:,} bytes, {manifest.size:,} were written"
        if atomic.digest_of(file).sha256 != manifest.sha256:
            return "its SHA-256 is not that of its manifest"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _read_manifest(path: Path) -> Manifest | str:
    """The manifest, or a sentence on why it cannot be used."""
    try:
        values = json.loads(path.read_bytes())
        if values.pop("checksum") == _checksum(values):
            known = {field.name for field in dataclasses.fields(Manifest)}  # an earlier version had others
            manifest = Manifest(**{name: value for name, value in values.items() if name in known}, stem=path.stem)
            if path.stem.partition("-")[0] == f"step{manifest.step:08d}":
                return manifest
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        pass
    return f"{path} is damaged: it is not the manifest that was written"


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _best(manifests: list[Manifest]) -> Manifest | None:
    """Of manifests, newest first, the best by the metric that was measured last; the later one of equals."""
    measured = [manifest for manifest in manifests if manifest.metric is not None]
    measured = [manifest for manifest in measured if manifest.metric_name == measured[0].metric_name]
    return max(measured, key=lambda m: (m.metric, m.progress), default=None)
