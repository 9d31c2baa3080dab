"""Files from anyone: nothing in them runs, and whatever is wrong with them is a ValueError that says so."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn

from pyro_affine import serialize
from pyro_affine.compose import ComposeFlow
from pyro_affine.flows import real_nvp
from pyro_affine.guides import AutoRealNVP
from pyro_affine.serialize import load, load_guide, save


def model() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


class RunsCode:
    """Pickled, it is a call: of the system if it were loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"format": "pyro_affine", "tree": x}], ids=["root", "inside"])
def test_a_pickle_that_runs_code_is_refused_unrun(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save(wrap(RunsCode(ran)), tmp_path / "zip.pt")
    torch.save(wrap(RunsCode(ran)), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(wrap(RunsCode(ran))))
    for name, words in {"zip": "it names (posix|nt).system", "old": "not a zip", "plain": "not a zip"}.items():
        for load_it in (load, lambda path: load_guide(path, model)):
            with pytest.raises(ValueError, match=f"{words}.*nothing of it was run"):
                load_it(tmp_path / f"{name}.pt")
    assert not ran.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert ran.exists()  # the file is as bad as it says


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], content: dict[str, Any] | None = None) -> Path:
    """The file with its tree changed and its digest right, as one who means harm would write it."""
    saved = torch.load(path, weights_only=True)
    tree = json.loads(saved["tree"])
    change(tree)
    saved |= {"tree": json.dumps(tree), **(content or {})}
    saved["digest"] = serialize._digest(saved["tree"], saved["tensors"])
    target = path.with_name("changed.pt")
    torch.save(saved, target)
    return target


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "flow.pt"
    spline = ComposeFlow([T.spline(3), T.AffineTransform(torch.ones(3), 2.0)])
    save(path, ComposeFlow([real_nvp(3, num_layers=2, hidden_dims=(4,)), spline]))
    return path


NOT_LISTED = [
    "builtins.eval",
    "builtins.exec",
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "torch.load",
    "torch.hub.load",
    "torch.nn.Module",
    "torch.nn.LSTM",
    "torch.nn.Linear.forward",
    "torch.jit.ScriptModule",
    "torch._ops.OpOverload",
    "functools.partial",
    "pyro_affine.flows.nn.Linear",
    "pyro_affine.serialize.os",
    "pyro_affine.flows.real_nvp",
    "pyro_affine.audit.AuditReport",
    "pyro_affine.guides.AutoContinuous",
    "pyro_affine.serialize.Path",
    "torch.distributions.constraints._DependentProperty",
    "",
]


@pytest.mark.parametrize("name", NOT_LISTED)
def test_a_tree_names_listed_classes_only(name: str, good: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["objects"][-1]["class"] = name

    def add(tree: dict[str, Any]) -> None:
        tree["objects"][0]["state"]["extra"] = {"class": name}

    for harm in (change, add):
        with pytest.raises(ValueError, match=f"it names '{name}', which is not on the list"):
            load(rewritten(good, harm))


@pytest.mark.parametrize("name", ["forward", "__class__", "_call", "__setstate__", "_forward_hooks", "state_dict"])
def test_a_tree_sets_no_method(name: str, good: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["objects"][0]["state"][name] = {"object": 1}

    with pytest.raises(ValueError, match=f"it sets '{name}' of a ComposeFlow"):
        load(rewritten(good, change))


def test_a_name_imports_nothing(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = asked.append
    monkeypatch.setitem(sys.modules, "lazy", lazy)

    def change(tree: dict[str, Any]) -> None:
        tree["objects"][-1]["class"] = "lazy.Layer"

    with pytest.raises(ValueError, match="not on the list"):
        load(rewritten(good, change))
    assert asked == []


@pytest.mark.parametrize(
    ("table", "words"),
    {"_modules": "Module", "_parameters": "Parameter", "_buffers": "Tensor"}.items(),
)
def test_tables_of_a_module_hold_what_they_are_for(table: str, words: str, good: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["objects"][0]["state"][table] = {"dict": [["x", 1.0]]}

    with pytest.raises(ValueError, match=f"{table} of a ComposeFlow must hold {words} objects"):
        load(rewritten(good, change))


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.pop(name)


def set_root(root: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.update(root=root)


def keep(tree: dict[str, Any]) -> None:
    """No change of the tree."""


def huge() -> dict[str, Any]:
    return {"tensors": {"flow.x": torch.zeros(1).expand(10**12)}}


NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any], str]] = {
    "no objects": (drop("objects"), {}, "not as save writes it"),
    "no root": (drop("root"), {}, "not as save writes it"),
    "root of another kind": (set_root([1, 2]), {}, "holds a list, which is no Module"),
    "unknown tag": (set_root({"call": "os.system"}), {}, "not as save writes it"),
    "two tags": (set_root({"list": [], "tuple": []}), {}, "cannot be loaded"),
    "no such object": (set_root({"object": 10**6}), {}, "not as save writes it"),
    "no such tensor": (set_root({"tensor": "flow.y"}), {}, "not as save writes it"),
    "deep": (set_root(json.loads("[" * 900 + "]" * 900)), {}, "cannot be loaded"),
    "unhashable key": (set_root({"dict": [[{"dict": []}, 1]]}), {}, "not as save writes it"),
    "tensors are none": (keep, {"tensors": {}}, "cannot be loaded"),
    "another kind": (keep, {"kind": "guide"}, "must hold a flow, got a guide; load_guide"),
    "another format": (keep, {"format": "other"}, "must be a file that save wrote, got another one"),
    "another version": (keep, {"version": 99}, "must be of version 1 of the format, got 99, written by"),
}


@pytest.mark.parametrize(("change", "content", "words"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_a_value_error(
    change: Callable[[dict[str, Any]], None], content: dict[str, Any], words: str, good: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        load(rewritten(good, change, content))


def test_other_files_are_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(real_nvp(2, num_layers=2).state_dict(), path)
    with pytest.raises(ValueError, match="a state_dict goes into load_state_dict"):
        load(path)
    for content in (b"", b"hello", b"PK\x03\x04", good.read_bytes()[:-100], good.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must be a file that save wrote"):
            load(path)


def test_a_flipped_bit_is_seen(good: Path, tmp_path: Path) -> None:
    tensors = torch.load(good, weights_only=True)["tensors"]
    content = bytearray(good.read_bytes())
    weights = next(t for t in tensors.values() if t.numel() > 5 and t.is_floating_point())
    content[content.find(weights.numpy().tobytes()) + 2] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load(path)


def test_a_file_unpacks_to_no_more_than_its_size(good: Path, tmp_path: Path) -> None:
    saved = torch.load(good, weights_only=True)
    path = tmp_path / "bomb.pt"
    torch.save({**saved, "tensors": {"flow.x": torch.zeros(1).expand(10**12)}}, path)
    with pytest.raises(ValueError, match="claim more numbers than it holds"):
        load(path)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) + bytes(10**6))
    with pytest.raises(ValueError, match="unpack to more than its size"):
        load(path)


VALUES: list[Any] = [None, True, -1, 10**20, 0.5, "x", "torch.nn.Linear", [], [1], {}, {"object": 0}, {"tuple": [[]]}]
VALUES += [{"class": "torch.nn.Linear"}, {"dtype": "torch.float32"}, {"method": "cuda"}, {"slice": [1]}, {"Size": [-1]}]
VALUES += [{"dict": [["a", 1]]}, {"constraint": "real"}, {"constraint": "sys"}, {"object": -1}, {"object": "0"}]


def mutate(tree: Any, source: random.Random) -> None:
    """Change, drop or add one thing at a random place of the tree."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = source.choice(keys)
        if isinstance(tree[key], (dict, list)) and tree[key] and source.random() < 0.9:
            tree = tree[key]
            continue
        action = source.random()
        if action < 0.6:
            tree[key] = copy.deepcopy(source.choice(VALUES))
        elif action < 0.8:
            del tree[key]
        elif isinstance(tree, dict):
            tree[source.choice([*VALUES_AS_KEYS, *keys])] = copy.deepcopy(source.choice(VALUES))
        else:
            tree.append(copy.deepcopy(source.choice(VALUES)))
        return


VALUES_AS_KEYS = ["forward", "__class__", "_modules", "_parameters", "training", "os", "tensor", "object"]


def test_a_random_change_of_the_tree_is_harmless(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise SystemExit("code of the file was run")

    for name in ("os.system", "subprocess.Popen.__init__", "builtins.eval", "builtins.exec"):
        monkeypatch.setattr(name, forbidden)
    source = random.Random(0)
    refused = 0
    saved = torch.load(good, weights_only=True)
    for _ in range(300):
        tree = json.loads(saved["tree"])
        for _ in range(source.randint(1, 3)):
            mutate(tree, source)
        try:
            loaded = from_tree(tree, saved, good)
        except ValueError:
            refused += 1
        else:
            assert isinstance(loaded, nn.Module)
    assert 50 < refused < 290  # neither all nor none: the changes reach the parts that matter


def from_tree(tree: Any, saved: dict[str, Any], path: Path) -> Any:
    text = json.dumps(tree)
    content = {**saved, "tree": text, "digest": serialize._digest(text, saved["tensors"])}
    changed = path.with_name("mutated.pt")
    torch.save(content, changed)
    return load(changed)


def test_a_changed_guide_file_is_refused(tmp_path: Path) -> None:
    guide = AutoRealNVP(model, num_layers=2)
    guide()
    save(tmp_path / "guide.pt", guide)
    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "which is no guide": lambda tree: tree["objects"][0].update({"class": "torch.nn.Linear"}),
        "it names 'os.system'": lambda tree: tree["objects"][0].update({"class": "os.system"}),
        "its latents must have": lambda tree: tree["sites"][0]["dict"].__setitem__(0, ["name", 3]),
        "it sets 'forward'": lambda tree: tree["objects"][0]["state"].update({"forward": 1}),
    }
    for words, change in changes.items():
        with pytest.raises(ValueError, match=words):
            load_guide(rewritten(tmp_path / "guide.pt", change), model)
