"""How charts of this package look."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_axes(height: float) -> tuple[Any, Any]:
    """A figure of the width that READMEs show, and its axes, for drawing without a screen.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(7.2, height), dpi=150)


def save_axes(figure: Any, axes: Any, path: Path, legend: str) -> None:
    """Finish a chart, with its legend at `legend`, and write it as PNG."""
    from matplotlib import pyplot as plt

    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc=legend)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
