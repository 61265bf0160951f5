"""The device of a job: one question, one answer, a clear line when there is no GPU."""

from __future__ import annotations

import pytest
import torch

from rad.devices import chosen


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAD_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen() == "cuda" and chosen("cpu") == "cpu" and chosen("cuda:1") == "cuda:1"
    monkeypatch.setenv("RAD_DEVICE", "cpu")
    assert chosen() == "cpu" and chosen("cuda") == "cuda"


@pytest.mark.parametrize(("asked", "variable"), [("cuda", None), ("auto", "cuda")])
def test_a_gpu_that_is_not_there(
    asked: str, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if variable:
        monkeypatch.setenv("RAD_DEVICE", variable)
    else:
        monkeypatch.delenv("RAD_DEVICE", raising=False)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        chosen(asked)


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="it is one of auto, cpu"):
        chosen("tpu")
