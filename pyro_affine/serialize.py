"""Save and load of a fitted flow or guide: one file that says what it is, and that cannot run code.

The file is a dict written by ``torch.save``; anyone can look into it with ``torch.load(weights_only=True)``:
``format``, ``version``, ``kind`` ("flow" or "guide"), ``written_by`` (versions), ``tree`` (the architecture as
JSON, see ``blueprint``), ``tensors`` (by name) and ``digest``. Loading reads the dict with ``weights_only=True``,
checks the digest, since torch does not notice a flipped bit, and makes objects of listed classes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn

from pyro_affine.blueprint import Reader, Writer
from pyro_affine.checkpoint import _sync_folder, _write_through
from pyro_affine.saved_guide import guide_from_model, guide_sites, guide_state

_FORMAT = "pyro_affine"
_VERSION = 1


def save(path: str | os.PathLike[str], flow: nn.Module) -> None:
    """Save a flow, or a guide that has been fitted: its architecture and its weights, for ``load`` or ``load_guide``.

    The file is written whole or not at all: a crash or a full disk leaves the one from before as it was.

    Args:
        path: the file; its folder must exist.
        flow: a ``NormalizingFlow``, a transform or conditional transform that is a Module, a conditioner, or a
            guide such as ``AutoRealNVP`` that has been called once. Classes of your own need ``register_class``.
            A guide's model is code and stays out, and so do functions among its options.

    Raises:
        ValueError: naming the attribute, for what a file cannot hold: a function, an unknown class, a hook.
        OSError: if the disk refuses.

    >>> import tempfile
    >>> from pyro_affine.flows import real_nvp
    >>> flow = real_nvp(3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/flow.pt", flow)
    ...     again = load(f"{folder}/flow.pt")
    >>> torch.equal(flow(torch.ones(3)), again(torch.ones(3)))
    True
    """
    if not isinstance(flow, nn.Module):
        raise ValueError(
            f"save takes a path, then a flow or guide that is a Module, got a {type(flow).__name__}; put a plain "
            "transform into ComposeFlow([transform])"
        )
    writer = Writer()
    if isinstance(flow, AutoContinuous):
        kind, tree = "guide", {"root": writer.object(flow, "guide", guide_state(flow))}
        tree["sites"] = writer.value(guide_sites(flow), "sites")
    else:
        kind, tree = "flow", {"root": writer.object(flow, "flow")}
    text = json.dumps({**tree, "objects": writer.objects, "kinds": writer.kinds})
    content = {"format": _FORMAT, "version": _VERSION, "kind": kind, "written_by": _versions(), "tree": text}
    content |= {"tensors": writer.tensors, "digest": _digest(text, writer.tensors)}
    _write(Path(path), content)


def load(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> Any:
    """The flow in a file written by ``save``: the same density, to the last bit on the same kind of device.

    Safe for a file from anyone: it cannot run code, and only listed classes are made (see ``known_classes``).

    Args:
        path: the file.
        map_location: device of the tensors.

    Returns:
        What was saved: parameters, buffers, dtypes, training mode and frozen parameters as they were.

    Raises:
        ValueError: if ``save`` did not write the file, if it is damaged, of another version of the format, holds
            a guide, or names a class that is not on the list.
        OSError: if there is no such file.
    """
    tree, tensors = _read(path, "flow", "load_guide(path, model) reads it")
    with _blaming(path):
        flow = Reader(tree["objects"], tree["kinds"], tensors, map_location).value(tree["root"])
        if not isinstance(flow, nn.Module):
            raise ValueError(f"it holds a {type(flow).__name__}, which is no Module")
        return flow


def load_guide(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    map_location: str | torch.device = "cpu",
) -> Any:
    """The guide in a file written by ``save``, ready to use: the same log-densities and draws to the last bit.

    The model is run once, at the values where the guide was set up, and its latents are compared with those in
    the file. As safe as ``load``.

    Args:
        path: the file.
        model: the model that the guide was fitted to.
        args, kwargs: arguments of the model.
        map_location: device of the tensors.

    Returns:
        The guide, of the class that was saved.

    Raises:
        ValueError: as ``load``; and if the model's latents are not those that the guide was fitted to, naming the
            first that differs in name, order, shape or support.
        OSError: if there is no such file.

    >>> import tempfile
    >>> import pyro.distributions as dist
    >>> from pyro_affine.guides import AutoRealNVP
    >>> def model():
    ...     pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> guide = AutoRealNVP(model)
    >>> _ = guide()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/guide.pt", guide)
    ...     again = load_guide(f"{folder}/guide.pt", model)
    >>> torch.equal(guide.median()["z"], again.median()["z"])
    True
    """
    tree, tensors = _read(path, "guide", "load(path) reads it")
    with _blaming(path):
        reader = Reader(tree["objects"], tree["kinds"], tensors, map_location)
        sites, cls = _checked_sites(reader.value(tree["sites"])), reader.class_of(tree["root"])
        if not issubclass(cls, AutoContinuous):
            raise ValueError(f"it holds a {cls.__name__}, which is no guide")
    guide = guide_from_model(cls, model, sites, args, kwargs or {})
    with _blaming(path):
        reader.fill(tree["root"], guide)
    return guide


def _checked_sites(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for site in sites:
        names = {"name": str, "shape": tuple, "unconstrained shape": tuple, "support": str, "start": Tensor}
        if not all(isinstance(site[name], kind) for name, kind in names.items()):
            raise ValueError(f"its latents must have {', '.join(names)}, got {site}")
    return sites


def _versions() -> dict[str, str]:
    package = sys.modules[__name__.partition(".")[0]]
    return {"pyro_affine": package.__version__, "pyro": pyro.__version__, "torch": str(torch.__version__)}


def _write(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = Path(f"{path}.writing")
    try:
        _write_through(temporary, buffer.getvalue())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _read(path: str | os.PathLike[str], kind: str, otherwise: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tree and tensors of a file that is whole and of this kind."""
    data = Path(path).read_bytes()
    content = _unpickled(path, data)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"{path} must be a file that save wrote, got another one; a state_dict goes into load_state_dict, a "
            "checkpoint into the fit that wrote it"
        )
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} must be of version {_VERSION} of the format, got {content.get('version')!r}, written by "
            f"{content.get('written_by')}; load it with that version of pyro_affine, or save it anew with this one"
        )
    with _blaming(path):
        _require_tensors(content["tensors"], len(data))
        if _digest(content["tree"], content["tensors"]) != content["digest"]:
            raise ValueError("its content does not match its digest, so it is damaged")
        tree: dict[str, Any] = json.loads(content["tree"])
        found = content["kind"]
    if found != kind:
        raise ValueError(f"{path} must hold a {kind}, got a {found}; {otherwise}")
    return tree, content["tensors"]


def _unpickled(path: str | os.PathLike[str], data: bytes) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch also reads formats that are never ours
            if sum(entry.file_size for entry in archive.infolist()) > len(data):
                raise ValueError("it would unpack to more than its size")
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else str(error).partition(". ")[0]
        raise ValueError(
            f"{path} must be a file that save wrote, but {reason}; nothing of it was run. It is of another kind, "
            "damaged or cut short: get it anew from where it was written"
        ) from error


def _require_tensors(tensors: Mapping[str, Any], num_bytes: int) -> None:
    """Plain tensors, and no more numbers than the file has room for: a view can claim any shape."""
    for name, tensor in tensors.items():
        if type(name) is not str or type(tensor) is not Tensor or tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got a {type(tensor).__name__}")
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) > num_bytes:
        raise ValueError("its tensors claim more numbers than it holds")


@contextlib.contextmanager
def _blaming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a tree that makes no sense leads to is an error of the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be loaded, it is not as save writes it ({reason})") from error


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # a clone: one entry of stride 0 counts as contiguous, yet its bytes cannot be viewed
        data = tensor.flatten().clone(memory_format=torch.contiguous_format)
        digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
