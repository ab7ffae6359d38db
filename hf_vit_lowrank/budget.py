"""How small: the limit that a recipe sets for a model, whether it can be reached, and the ranks that keep it."""

from __future__ import annotations

from collections.abc import Sequence

from .candidates.block import BlockCandidates
from .candidates.embedding import EmbeddingCandidates
from .dense import DenseSource, dense_parameters, matched_parameters
from .plan_costs import plan_cost
from .presets import smallest_parameters
from .rank_plan import RankPlan, budgeted_ranks, smallest_config, stream_size, unreachable, with_hidden_size
from .recipe import OURS, TRAINED, CompressionRecipe


def recipe_ranks(
    dense: DenseSource,
    candidates: Sequence[BlockCandidates],
    embedding: EmbeddingCandidates,
    recipe: CompressionRecipe,
) -> RankPlan:
    """The plan of this package's own method. Raises UserError where the size cannot be reached."""
    config, limit = dense.model.config, recipe_limit(dense, recipe)
    return budgeted_ranks(
        *(candidates, embedding, config, limit, recipe.cost, recipe.query_key_weight),
        multiple=recipe.rank_multiple,
        trained=recipe.compensation in TRAINED,
        native=recipe.native,
    )


def recipe_limit(dense: DenseSource, recipe: CompressionRecipe) -> int:
    """The most parameters or FLOPs that the recipe allows."""
    return _allowed(recipe, _whole(dense, recipe))


def recipe_stream(dense: DenseSource, recipe: CompressionRecipe) -> int:
    """Entries of the stream of the smaller model."""
    if not recipe.may_narrow:
        return dense.config.hidden_size
    return stream_size(dense.config, 1 - recipe_limit(dense, recipe) / _whole(dense, recipe))


def _whole(dense: DenseSource, recipe: CompressionRecipe) -> int:
    """Parameters or FLOPs of the dense model."""
    return plan_cost(dense.config, "flops", recipe.native) if recipe.cost == "flops" else dense.parameters


def _allowed(recipe: CompressionRecipe, whole: int) -> int:
    if recipe.max_parameters is not None:
        return recipe.max_parameters
    if recipe.match is not None:
        return matched_parameters(recipe.match)
    assert recipe.reduction is not None
    return int((1 - recipe.reduction) * whole)


def weight_bytes(source: str, recipe: CompressionRecipe, *, revision: str | None = None) -> int:
    """Bytes that the weights will take on disk, by the source's configuration alone; 0 where only the run can tell.

    Raises UserError where the source, or the model to match, cannot be used.
    """
    whole = dense_parameters(source, revision=revision)
    if recipe.min_agreement is not None or recipe.cost != "parameters":
        return 0
    return 4 * min(whole, _allowed(recipe, whole))


def check_reachable(dense: DenseSource, recipe: CompressionRecipe) -> None:
    """Before the long work. Raises UserError, with the smallest size, where the recipe asks for less."""
    multiple = recipe.rank_multiple if recipe.preset == OURS and not recipe.native else 1
    if recipe.preset == OURS:
        config, stream = dense.model.config, recipe_stream(dense, recipe)
        if stream < config.hidden_size:
            config = with_hidden_size(config, stream)
        smallest_sizes = smallest_config(config, multiple, recipe.cost, recipe.native)
        smallest = plan_cost(smallest_sizes, recipe.cost, recipe.native)
    else:
        smallest = smallest_parameters(recipe.preset, dense.model)
    if (limit := recipe_limit(dense, recipe)) < smallest:
        raise unreachable(limit, recipe.cost, smallest, multiple)
