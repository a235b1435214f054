from __future__ import annotations

from types import SimpleNamespace

from nnunet_sauron.trainers import throttled


def test_pictures_are_drawn_now_and_then_and_after_the_last_epoch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(throttled.time, "monotonic", lambda: clock[0])
    trainer, drawn = SimpleNamespace(current_epoch=0, num_epochs=10), []
    draw = throttled.Throttled(trainer, lambda folder: drawn.append((folder, trainer.current_epoch)))
    for epoch in range(10):
        trainer.current_epoch, clock[0] = epoch, 7.0 * epoch
        draw("here")
    assert drawn == [("here", 0), ("here", 3), ("here", 6), ("here", 9)]
    draw("here")  # always at the end, however soon
    assert drawn[-1] == ("here", 9) and len(drawn) == 5
