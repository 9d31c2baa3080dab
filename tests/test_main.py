"""The doctor: it runs, tells versions, and says so when something is broken."""

from __future__ import annotations

import pytest
import torch

import pyro_affine
from pyro_affine import __main__ as doctor


def test_doctor_tells_versions_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert pyro_affine.__version__ in text and torch.__version__ in text and "device       cpu" in text
    assert text.count("passed") == 3


def test_doctor_names_what_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(doctor, "_flow", broken)
    assert doctor.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert text.count("FAILED") == 2 and "RuntimeError: no such operator" in text


def test_other_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["nurse"])
    assert "doctor" in capsys.readouterr().err
