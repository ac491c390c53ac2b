"""Which version of a model was loaded."""

import hashlib
from pathlib import Path

from transformers import PreTrainedModel


def revision_of(model: PreTrainedModel, source: str, name: str, revision: str | None) -> str | None:
    """The hub's commit, or for a local checkpoint a hash of its weight files."""
    if not Path(source).is_dir():
        return getattr(revision, "resolved", None) or getattr(model.config, "_commit_hash", None)
    if name != source:  # the embedded model, whose folder is named by the hash of its file
        return Path(source).name
    return "local-" + hash_files(_weight_files(Path(source)))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


def hash_files(files: list[Path]) -> str:
    """SHA-256 over the contents of files, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
