"""Checkpoints of a run on disk: manifests, verification and pruning.

OUTPUT_DIR/checkpoints/step00001200.pth    state after step 1200
OUTPUT_DIR/checkpoints/step00001200.json   manifest: size, SHA-256, epoch, scores; written last, so a checkpoint with a
                                           manifest is complete
OUTPUT_DIR/checkpoint.pth                  hard link to the newest checkpoint
OUTPUT_DIR/best.pth                        hard link to the best checkpoint by --best-metric
OUTPUT_DIR/best-labelfree.pth              hard link to the best checkpoint by a metric that needs no labels
OUTPUT_DIR/backbone.pth                    evaluated backbone of the newest checkpoint
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

FOLDER, LATEST, BACKBONE = "checkpoints", "checkpoint.pth", "backbone.pth"
BEST, BEST_LABELFREE = "best.pth", "best-labelfree.pth"
ANEW = ".starts-anew"
"""Marker in the output directory while ``--resume never`` still has to delete earlier checkpoints."""


class Score(NamedTuple):
    """A metric of a checkpoint; higher is better."""

    metric: str
    value: float


@dataclass(frozen=True)
class Manifest:
    """Metadata of a checkpoint."""

    step: int
    """Completed steps."""
    epoch: int
    """Completed epochs."""
    size: int
    """File size in bytes."""
    sha256: str
    """Hash of the file."""
    global_batch: int
    """Images per step."""
    world_size: int
    """Number of ranks."""
    steps_per_epoch: int = 0
    """Steps per epoch when it was written; resuming with another global batch changes this number."""
    keep: bool = False
    """Whether pruning keeps it permanently."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """By link to the best checkpoint, such as ``best.pth``."""
    written: float = 0.0
    """Unix time."""

    stem: str = ""
    """File name without suffix; not stored in the manifest."""

    @property
    def name(self) -> str:
        """File name of the checkpoint."""
        return f"{self.stem}.pth"

    @property
    def progress(self) -> float:
        """Completed epochs as a fraction; the sort key of checkpoints."""
        return self.step / (self.steps_per_epoch or 1)


class CheckpointFolder:
    """Writes, finds and prunes the checkpoints of a run. Only one process may write (see run_lock)."""

    def __init__(self, output_dir: Path, keep_last: int = 2) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / FOLDER
        self.latest = output_dir / LATEST
        self._keep_last = keep_last
        self._verified: set[str] = set()
        """Files whose hash this object has checked."""

    # ---- writing

    def write(self, content: Mapping[str, Any], keep: bool = False) -> Manifest:
        """Write a checkpoint from :func:`dino_xcit.checkpoint.state.content_of`, its manifest and links; then prune.

        After a crash at any moment, :meth:`newest` finds either this checkpoint or the previous one.

        Raises:
            OSError: the checkpoint cannot be written; earlier checkpoints are unchanged.
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
        """Rename a checkpoint with the same step but another number of steps per epoch, instead of overwriting it."""
        manifest = _read_manifest(path.with_suffix(".json"))
        if isinstance(manifest, str) or manifest.steps_per_epoch in (0, steps_per_epoch):
            return
        if not path.exists():
            return
        other = path.with_stem(f"{path.stem}-{manifest.steps_per_epoch}")
        atomic.give_name(path, other)
        os.replace(path.with_suffix(".json"), other.with_suffix(".json"))

    def finish(self, path: Path, content: Mapping[str, Any]) -> None:
        """Complete an interrupted save of the newest checkpoint ``path`` by creating the missing links."""
        if not self.latest.exists() or not _same_bytes(path, self.latest):
            self._give_names(path, content)
        for link, best in _best(self.manifests()).items():
            target = self.output_dir / link
            if not target.exists() or not _same_bytes(self.folder / best.name, target):
                atomic.give_name(self.folder / best.name, target)

    def _give_names(self, path: Path, content: Mapping[str, Any]) -> None:
        atomic.write_torch(self.output_dir / BACKBONE, dict(content["backbone"]))
        atomic.give_name(path, self.latest)

    def note_scores(self, step: int, scores: Mapping[str, Score]) -> None:
        """Store scores in the manifest of a step, and let the links for which it is the best point to it."""
        manifest = next((one for one in self.manifests() if one.step == step), None)
        if manifest is None:
            return
        manifest = dataclasses.replace(manifest, scores=dict(scores))
        self._write_manifest(manifest)
        for link, best in _best(self.manifests()).items():
            if best == manifest:
                atomic.give_name(self.folder / best.name, self.output_dir / link)
        self.prune()

    def prune(self) -> None:
        """Remove all checkpoints except the newest ``keep_last`` intact ones, those marked with ``keep``, and the best.

        A checkpoint counts as intact only after its hash was checked.
        """
        intact = 0
        best = _best(self.manifests()).values()
        for path, manifest in self._entries():
            if isinstance(manifest, str):
                continue  # the checkpoint may be one to keep, and the read error may be temporary
            if intact < self._keep_last:
                intact += self._is_intact(manifest)
            elif not (manifest.keep or manifest in best):
                # Remove the manifest first: a file without a manifest is ignored, the reverse is reported as damage.
                path.unlink(missing_ok=True)
                path.with_suffix(".pth").unlink(missing_ok=True)
        for path in self.folder.glob("step*.pth"):
            if not path.with_suffix(".json").exists():  # the save was interrupted before its manifest
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all checkpoints, for a fresh start."""
        if self.folder.exists():
            for path in sorted(self.folder.glob("step*.json")) + sorted(self.folder.glob("step*.pth")):
                path.unlink(missing_ok=True)
        for name in (LATEST, BEST, BEST_LABELFREE, ANEW):  # the marker last, when all checkpoints are removed
            (self.output_dir / name).unlink(missing_ok=True)

    def _write_manifest(self, manifest: Manifest) -> None:
        values = dataclasses.asdict(manifest)
        del values["stem"]
        atomic.write_json((self.folder / manifest.name).with_suffix(".json"), values | {"checksum": _checksum(values)})

    def _is_intact(self, manifest: Manifest) -> bool:
        if manifest.name not in self._verified and why_damaged(self.folder / manifest.name, manifest) is None:
            self._verified.add(manifest.name)
        return manifest.name in self._verified

    # ---- finding

    def manifests(self) -> list[Manifest]:
        """Return the readable manifests, newest first."""
        return [manifest for _, manifest in self._entries() if isinstance(manifest, Manifest)]

    def _entries(self) -> list[tuple[Path, Manifest | str]]:
        """Return (path, manifest) pairs, newest first; a sentence replaces an unreadable manifest."""
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
        """Return the newest intact checkpoint, and warnings about damaged ones.

        Returns ``(None, [])`` if there is no checkpoint. A ``checkpoint.pth`` without manifests (copied, or from an
        earlier version) is returned with a warning.

        Raises:
            InputError: all checkpoints are damaged.
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
                    notices.append(f"falling back to the checkpoint of step {manifest.step}")
                return file, notices + self._check_latest(file)
            notices.append(f"{file} is damaged: {damage}")
        if notices:
            raise InputError(
                f"no checkpoint in {self.folder} is intact ({'; '.join(notices[:3])}): restore one from a backup, "
                "or start from scratch with --resume never"
            )
        if not self.latest.exists():
            return None, []
        return self.latest, [f"{self.latest} has no manifest in {self.folder}: it cannot be verified"]

    def _check_latest(self, newest: Path) -> list[str]:
        """Return a warning if ``checkpoint.pth`` matches no manifest."""
        try:
            if not self.latest.exists() or os.path.samefile(self.latest, newest):
                return []
            digest = atomic.digest_of(self.latest)
        except OSError as error:
            return [f"{self.latest} cannot be read ({error.strerror}): using {newest}"]
        if any((m.size, m.sha256) == (digest.size, digest.sha256) for m in self.manifests()):
            return []  # a save was interrupted before it updated the link
        return [f"{self.latest} is damaged or from another run: using {newest}"]


def _with_steps_per_epoch(manifest: Manifest | str, steps_per_epoch: int) -> Manifest | str:
    """Fill in the number that versions before 0.2 did not store."""
    if isinstance(manifest, str) or manifest.steps_per_epoch:
        return manifest
    return dataclasses.replace(manifest, steps_per_epoch=steps_per_epoch)


def _same_bytes(file: Path, other: Path) -> bool:
    """Whether both files have the same content; in a copied directory, hard links have become separate files."""
    return os.path.samefile(file, other) or atomic.digest_of(file) == atomic.digest_of(other)


def why_damaged(file: Path, manifest: Manifest) -> str | None:
    """Return a clause that describes the damage, or None if the file matches its manifest."""
    try:
        size = file.stat().st_size
        if size != manifest.size:
            return f"it has {size:,} bytes, expected {manifest.size:,}"
        if atomic.digest_of(file).sha256 != manifest.sha256:
            return "its SHA-256 differs from its manifest"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _read_manifest(path: Path) -> Manifest | str:
    """Return the manifest, or a sentence if it is damaged."""
    try:
        values = json.loads(path.read_bytes())
        if values.pop("checksum") == _checksum(values):
            known = {field.name for field in dataclasses.fields(Manifest)}  # earlier versions had other fields
            manifest = Manifest(**{name: value for name, value in values.items() if name in known}, stem=path.stem)
            scores = {link: Score(*score) for link, score in manifest.scores.items()}
            manifest = dataclasses.replace(manifest, scores=scores)
            if path.stem.partition("-")[0] == f"step{manifest.step:08d}":
                return manifest
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        pass
    return f"{path} is damaged: its checksum does not match"


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _best(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return the best manifest for each link, by the most recently measured metric; ties go to the newer one."""
    best = {}
    for link in (BEST, BEST_LABELFREE):
        measured = [one for one in manifests if link in one.scores]
        measured = [one for one in measured if one.scores[link].metric == measured[0].scores[link].metric]
        if measured:
            best[link] = max(measured, key=lambda one: (one.scores[link].value, one.progress))
    return best
