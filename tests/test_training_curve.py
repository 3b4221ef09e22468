"""The training curve of `sprand finetune`: its smooth line does not lag, and its ticks are plain numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sprand.cli.finetune import report

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a curve, and gives its two panels."""

    def draw(losses, perplexities):
        monkeypatch.setattr(pyplot, "close", lambda figure: None)
        history = [{"method": "sprand", "step": step, "loss": loss} for step, loss in enumerate(losses)]
        history += [{"method": "sprand", "step": step, "eval_perplexity": value} for step, value in enumerate(perplexities)]
        task = SimpleNamespace(metric="perplexity", higher_is_better=False, eval=[0] * 8)
        report.plot(tmp_path / "training_curve.png", [history], task)
        figure = pyplot.gcf()
        figure.canvas.draw()
        return figure.axes

    yield draw
    monkeypatch.undo()
    pyplot.close("all")


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_a_falling_loss_is_smoothed_to_itself(drawn, count):
    falling = [5 - 0.1 * step for step in range(count)]
    left, _ = drawn(falling, [20.0])
    assert left.lines[1].get_ydata() == pytest.approx(falling)


def test_a_jagged_loss_is_smoothed(drawn):
    left, _ = drawn([3 - 0.02 * step + (0.5 if step % 2 else -0.5) for step in range(100)], [20.0])
    smooth = left.lines[1].get_ydata()
    assert max(abs(value - (3 - 0.02 * step)) for step, value in enumerate(smooth)) < 0.3


@pytest.mark.parametrize("perplexities", [[4.61, 4.4, 4.1], [2075.0, 90.0, 18.0]], ids=["near", "far"])
def test_ticks_are_plain_numbers(drawn, perplexities):
    _, right = drawn([1.0], perplexities)
    labels = [label.get_text() for label in right.get_yticklabels(which="both") if label.get_text()]
    assert "10^" not in "".join(labels)
    low, high = right.get_ylim()
    assert len([float(label) for label in labels if low <= float(label) <= high]) >= 3
