"""Random recipes, configurations, rank plans and damaged files: all is right, or refused in one sentence."""

from __future__ import annotations

import json
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_faults import NAMES, make_pictures, make_source
from test_remote import configs, make_model

from hf_vit_lowrank.checkpoint import load_checkpoint, save_checkpoint
from hf_vit_lowrank.dense import load_dense
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.evaluation import load_classifier
from hf_vit_lowrank.image_decoding import UnreadableImageError, decode_image
from hf_vit_lowrank.pixels import load_image_processor
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig

QUICK = settings(max_examples=60, deadline=10_000, suppress_health_check=list(HealthCheck))
JUNK = st.one_of(
    st.sampled_from([10**9, 10**18, -1, 0, 1, 2, 1.5, 1e308, float("nan"), float("inf"), True, None]),
    st.sampled_from(["", "x", "../../x", "\n", [], {}, [[]], [10**9], {"a": 1}, [None, None]]),
    st.integers(),
    st.text(max_size=5),
)


def in_one_sentence(error: Exception) -> None:
    said = str(error)
    assert said.strip()
    assert "\n" not in said.strip()
    assert said.rstrip().endswith((".", ")"))


# ------------------------------------------------------------------------------------------------------------- recipes


@settings(QUICK, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*CompressionRecipe.__dataclass_fields__, "typo"]),
        JUNK | st.sampled_from([0.5, "mixed-rank", "svd", "closed-form", "none", "gradient", "distill", "flops"]),
        max_size=5,
    )
)
def test_a_recipe_is_valid_and_survives_json_or_is_refused(values):
    try:
        recipe = CompressionRecipe.from_dict(values)
    except UserError as error:
        in_one_sentence(error)
    else:
        again = CompressionRecipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False)))
        assert again == recipe
        assert again.fingerprint() == recipe.fingerprint()


# ------------------------------------------------------------------------------------------------ plans and config.json


@pytest.fixture(scope="module")
def image_processor(tmp_path_factory):
    return load_image_processor(str(make_source(tmp_path_factory.mktemp("fuzz") / "dense")))


@settings(QUICK, max_examples=15)
@given(configs())
def test_any_plan_saves_and_loads_exactly(image_processor, tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("plan") / "out"
    model = make_model(config)
    save_checkpoint(model, image_processor, folder, record={}, card="")
    again, _, _ = load_checkpoint(folder)
    plan = ("query_key_ranks", "value_output_ranks", "mlp_widths", "factor_ranks", "bypass_ranks", "embedding_ranks")
    plan += ("up_ranks", "output_pivots", "projection_pivots", "layer_norm_affine")
    assert all(getattr(again.config, name) == getattr(config, name) for name in plan)
    state = again.state_dict()
    assert all((state[name] == values).all() for name, values in model.state_dict().items())


def _damaged(values: Any, path: list[int], junk: Any) -> Any:
    """`values` with one of its leaves, or a branch of it, replaced."""
    if not path or not isinstance(values, (dict, list)) or not values:
        return junk
    keys = sorted(values) if isinstance(values, dict) else range(len(values))
    key = keys[path[0] % len(keys)]
    copy = values.copy()
    copy[key] = _damaged(values[key], path[1:], junk)
    return copy


@settings(QUICK, max_examples=300)
@given(configs(), st.lists(st.integers(0, 50), min_size=1, max_size=3), JUNK)
def test_a_damaged_plan_is_refused_or_still_a_plan(config, path, junk):
    fields = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    fields |= {"intermediate_size": config.intermediate_size, "image_size": config.image_size, "format_version": 1}
    fields |= {"query_key_ranks": config.query_key_ranks, "value_output_ranks": config.value_output_ranks}
    fields |= {"mlp_widths": config.mlp_widths, "factor_ranks": config.factor_ranks}
    fields |= {"embedding_ranks": config.embedding_ranks, "bypass_ranks": config.bypass_ranks}
    fields |= {"up_ranks": config.up_ranks, "output_pivots": config.output_pivots}
    fields |= {"projection_pivots": config.projection_pivots}
    fields |= {"layer_norm_affine": config.layer_norm_affine, "patch_size": config.patch_size}
    damaged = _damaged(fields, path, junk)
    try:
        LowRankViTConfig(**damaged)
    except ValueError as error:
        in_one_sentence(error)


def _resident_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@pytest.fixture(scope="module", params=["dense", "compressed"])
def checkpoint(request, tmp_path_factory, image_processor) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / request.param
    if request.param == "dense":
        return make_source(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = LowRankViTConfig(**sizes, image_size=16, patch_size=8, id2label=dict(enumerate(NAMES)))
    save_checkpoint(make_model(config), image_processor, folder, record={}, card="")
    (folder / "compression.json").unlink()  # whose hashes would refuse everything
    return folder


@settings(QUICK, max_examples=80)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=3), JUNK)
@example([0, 0], "\n")
def test_a_damaged_config_json_is_refused_or_loads_and_never_costs_memory(checkpoint, path, junk):
    original = (checkpoint / "config.json").read_text()
    before = _resident_megabytes()
    try:
        (checkpoint / "config.json").write_text(json.dumps(_damaged(json.loads(original), path, junk)))
        for load in (load_classifier, load_dense):
            try:
                load(str(checkpoint))
            except UserError as error:
                in_one_sentence(error)
    finally:
        (checkpoint / "config.json").write_text(original)
    assert _resident_megabytes() - before < 200


# -------------------------------------------------------------------------------------------------------- damaged files


def _damage(data: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    kind, at = seed % 4, chance.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + chance.randbytes(8) + data[at + 8 :]
    if kind == 2:
        return data[:at] + data[at + chance.randrange(1, 100) :]
    return chance.randbytes(len(data) // 2)


@pytest.mark.parametrize("seed", range(16))
def test_damaged_checkpoints_are_refused(seed, tmp_path):
    """A dense checkpoint has no hashes: what was only flipped inside a tensor may load."""
    source = make_source(tmp_path / "dense")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        folder = Path(shutil.copytree(source, tmp_path / name))
        file = folder / name
        file.write_bytes(_damage(file.read_bytes(), seed))
        for load in (load_dense, load_classifier):
            try:
                load(str(folder))
            except UserError as error:
                in_one_sentence(error)
            else:
                assert seed % 4 in (1, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_images_are_unreadable_or_rgb(kind, tmp_path):
    make_pictures(tmp_path / "one", 1)
    image = Image.open(tmp_path / "one" / "000.png").resize((40, 30))
    image.save(tmp_path / "image", kind)
    data = (tmp_path / "image").read_bytes()
    for seed in range(40):
        try:
            decoded = decode_image(_damage(data, seed))
        except UnreadableImageError as error:
            in_one_sentence(UserError(f"{error}."))
        else:
            assert decoded.mode == "RGB"
            assert np.asarray(decoded).dtype == np.uint8
