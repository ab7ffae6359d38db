"""How long the stages take that a plan leaves out, from those that it carried out."""

from __future__ import annotations

from collections.abc import Mapping

from .compensation.gradient import EPOCHS
from .recipe import TRAINED, VIEWS, CompressionRecipe

# Forward passes over the images that the statistics take.
STATISTICS = 3.5
# Probing takes as long as that many refits (DeiT-tiny).
PROBING = 9


def expected_seconds(recipe: CompressionRecipe, small: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, under the names by which a run reports them.

    Refits take hardly less than the statistics. Training is three passes of the smaller model over the images and their
    views, half of that where it sees some tokens only, for which the dense model is asked once: once in all, or once a
    view.

    small: FLOPs of the smaller model as a share of the dense one's. seconds: of the statistics and the candidates.
    """
    forward = seconds["statistics"] / STATISTICS
    expected = {"surgery": seconds["candidates"]}
    if recipe.probe:
        expected["probes"] = PROBING * seconds["statistics"]
    if recipe.compensation != "none":
        expected["compensation"] = seconds["statistics"]
    if recipe.compensation in TRAINED:
        expected["gradient"] = (1 + VIEWS) * (1 + 1.5 * EPOCHS * small) * forward
    if recipe.compensation == "distill":
        expected["distillation"] = recipe.distill_epochs * (1 + 3 * small) * forward
    return expected
