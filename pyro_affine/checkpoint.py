"""Checkpoint files: written whole or not at all, checked before they are read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A line of its own ahead of torch's bytes, then their digest: torch.load does not notice a flipped bit.
_MAGIC = b"pyro_affine checkpoint 1\n"
_DIGEST_LENGTH = 64


def previous_path(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint before the present one is kept."""
    return Path(f"{os.fspath(path)}.previous")


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> bool:
    """Write a checkpoint so that a kill, a crash or a full disk at any moment leaves a whole one.

    The bytes go to a temporary file in the same folder and to the disk; then the present checkpoint becomes
    ``path.previous``, and the temporary file takes its name. When the disk refuses, a warning says so, the old
    files stay as they were, and the fit can go on.

    Args:
        path: the file; its folder must exist.
        state: tensors, numbers, strings, and lists and dicts of these.

    Returns:
        Whether the file was written.
    """
    target = Path(path)
    temporary = Path(f"{target}.writing")
    try:
        _write_through(temporary, _encode(state))
        if target.exists():
            os.replace(target, previous_path(target))
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        warnings.warn(
            f"checkpoint {target} was not written ({error}); training goes on, and the checkpoint from before is "
            "intact. Make room on the disk, or give another path.",
            RuntimeWarning,
            stacklevel=6,  # the call of the fit
        )
        return False
    return True


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read a checkpoint; None when there is none.

    When a kill came between the two renames of a write, ``path.previous`` is the newest whole one and is read.
    The file is loaded with ``weights_only=True``: it cannot run code.

    Raises:
        ValueError: if the file is not a checkpoint, or is cut short, or damaged. No file is changed.
    """
    source = Path(path)
    if not source.exists():
        source = previous_path(source)
        if not source.exists():
            return None
    content = source.read_bytes()
    problem = _damage(content)
    if problem:
        raise ValueError(f"checkpoint {source} {problem}. {_way_out(source)}")
    payload = io.BytesIO(content[len(_MAGIC) + _DIGEST_LENGTH + 1 :])
    state: dict[str, Any] = torch.load(payload, weights_only=True, map_location="cpu")
    return state


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names, shapes and dtypes of an architecture.

    >>> fingerprint({"loc": torch.zeros(2, 3)})
    {'loc': 'float32 (2, 3)'}
    """
    return {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}


def check_same(path: str | os.PathLike[str], what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that differs from what is being trained, and name what differs.

    Args:
        path: the file, for the message.
        what: what is compared: "architecture" or "arguments".
        saved: descriptions by name, from the file.
        here: descriptions by name, from this call.

    Raises:
        ValueError: if they are not equal.
    """
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if not names:
        return
    shown = [f"{n}: {saved.get(n, 'absent')} in the file, {here.get(n, 'absent')} here" for n in names[:5]]
    more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
    raise ValueError(
        f"checkpoint {path} is of another fit; its {what} must be the same, but: {'; '.join(shown)}{more}. "
        "Go on with what the file was made by, or give another path to start anew."
    )


def _encode(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getvalue()
    return _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage(content: bytes) -> str:
    if not content.startswith(_MAGIC):
        return "is not a checkpoint file, or its beginning is damaged"
    digest = content[len(_MAGIC) : len(_MAGIC) + _DIGEST_LENGTH]
    payload = content[len(_MAGIC) + _DIGEST_LENGTH + 1 :]
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        return "is damaged or cut short (its content does not match its digest)"
    return ""


def _way_out(source: Path) -> str:
    older = previous_path(source)
    if older.exists() and not _damage(older.read_bytes()):
        return f"The one before it, {older}, is whole: rename it to {source.name} to go on from there"
    return "Move the file away to start from the beginning"
