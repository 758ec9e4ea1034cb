"""The gallery of the four designs: equal conditions, and what it leaves."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastdit import gallery


def test_the_designs_see_the_same(tmp_path, monkeypatch, capsys):
    seen: dict[str, list] = {}
    loss = gallery.Trainer._loss

    def watched(self, x, y):
        name = self.config.design["conditioning"]
        seen.setdefault(name, []).append((x, y, torch.get_rng_state()))
        return loss(self, x, y)

    monkeypatch.setattr(gallery.Trainer, "_loss", watched)
    monkeypatch.setattr(gallery, "SAMPLING_STEPS", 2)
    gallery.main(["--steps", "2", "--count", "10", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in gallery.DESIGNS)
    assert list(seen) == list(gallery.DESIGNS.values())
    first, *others = seen.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    width, height = Image.open(tmp_path / "gallery.png").size
    assert height == 20 + 4 * 50 + 2
    assert width > 10 * 50 + 100  # the names are longer than a digit
    assert Image.open(tmp_path / "gallery_loss.png").size == (840, 480)


def test_minutes_are_steps(monkeypatch):
    """A clock that moves half a second a step."""
    steps: list[int] = []
    monkeypatch.setattr(gallery.Trainer, "step", lambda self: steps.append(1))
    monkeypatch.setattr(gallery.time, "process_time", lambda: 0.5 * len(steps))
    assert gallery.steps_within("in-context", seconds=60) == 120
    assert gallery.steps_within("in-context", seconds=1e-9) == 1


def test_the_running_mean():
    assert gallery.running_mean([1.0, 3.0]).tolist() == [2.0]
    assert gallery.running_mean([float(i) for i in range(102)]).tolist() == pytest.approx(
        [49.5, 50.5, 51.5]
    )


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--steps", "0"]])
def test_mistakes(options, capsys):
    with pytest.raises(SystemExit):
        gallery.main(options)
    assert "allowed are numbers > 0" in capsys.readouterr().err
