"""The two files that travel with a checkpoint: any rank plan, loaded where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_vit_lowrank.checkpoint import save_checkpoint
from hf_vit_lowrank.pixels import load_image_processor
from hf_vit_lowrank.remote.configuration_lowrank_vit import FACTORABLE, FORMAT_VERSION, LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import FEW_IMAGES, LowRankViTAttention, LowRankViTForImageClassification

# One process for all folders, since importing transformers takes seconds. -I leaves out the working directory and
# PYTHONPATH; the finder also hides an installed package.
WORKER = """
import importlib.abc, json, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vit_lowrank":
            raise ImportError("not installed here")

sys.meta_path.insert(0, Hidden())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

torch.set_num_threads(int(sys.argv[1]))
for line in sys.stdin:
    folder = json.loads(line)
    pixels = load_file(folder + "/pixels")["pixels"]
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
        for parameter in (*model.parameters(), *encoder.parameters()):
            parameter.data = parameter.data.clone()  # packed as in the file, products may differ in their last bit
        results = {"logits": model(pixels).logits, "tokens": encoder(pixels).last_hidden_state}
    save_file(results, folder + "/results")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    classes = [type(one) for one in (config, encoder, model)]
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    answer = {
        "classes": [one.__name__ for one in classes],
        "modules": [one.__module__ for one in classes],
        "training": model.training,
        "mlp_widths": config.mlp_widths,
        "image_processor": type(processor).__name__,
        "size": dict(processor.size),
    }
    print(json.dumps(answer), flush=True)
"""


class FreshProcess:
    def __init__(self, home: Path):
        self.errors = home / "stderr"
        environment = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
        with self.errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", WORKER, str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=home,
                env=environment,
            )

    def load(self, folder: Path, pixels: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What the Auto classes make of a folder, and the outputs on these pixels."""
        save_file({"pixels": pixels}, folder / "pixels")
        self._process.stdin.write(json.dumps(str(folder)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.errors.read_text()
        return json.loads(answer), load_file(folder / "results")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcess]:
    process = FreshProcess(tmp_path_factory.mktemp("fresh"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def image_processor(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("processor")
    values = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return load_image_processor(str(folder))


@st.composite
def configs(draw) -> LowRankViTConfig:
    """Small models of every kind, with ranks and widths drawn freely."""
    layers, heads, hidden, intermediate = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 12, 20
    layer = st.lists(st.integers(0, hidden), min_size=heads, max_size=heads).filter(any)
    ranks = st.lists(layer, min_size=layers, max_size=layers)
    token, value_output = draw(st.booleans()), draw(ranks)
    factors = st.dictionaries(st.sampled_from(FACTORABLE), st.integers(1, hidden))
    factor_ranks = draw(st.none() | st.lists(factors, min_size=layers, max_size=layers))
    widths = draw(st.lists(st.integers(1, intermediate), min_size=layers, max_size=layers))
    up_ranks = [
        0 if factor_ranks and "up" in factor_ranks[layer] else draw(st.integers(0, min(width - 1, hidden)))
        for layer, width in enumerate(widths)
    ]
    embedding = draw(st.none() | st.dictionaries(st.sampled_from(["projection", "positions"]), st.integers(1, hidden)))
    most = [
        0 if factor_ranks and "output" in factor_ranks[layer] else min(*heads, hidden - 1)
        for layer, heads in enumerate(value_output)
    ]
    return LowRankViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        image_size=draw(st.sampled_from([16, [16, 24]])),
        patch_size=8,
        num_channels=draw(st.integers(1, 3)),
        qkv_bias=draw(st.booleans()),
        use_distillation_token=token,
        use_distillation_head=token and draw(st.booleans()),
        num_labels=draw(st.integers(1, 4)),
        query_key_ranks=draw(ranks),
        value_output_ranks=value_output,
        mlp_widths=widths,
        up_ranks=up_ranks,
        factor_ranks=factor_ranks,
        bypass_ranks=draw(st.none() | st.lists(st.integers(0, hidden), min_size=layers, max_size=layers)),
        embedding_ranks=embedding,
        output_pivots=draw(st.none() | st.tuples(*(st.integers(0, pivots) for pivots in most)).map(list)),
        projection_pivots=draw(st.integers(0, min((embedding or {}).get("projection", 0), hidden - 1))),
        layer_norm_affine=draw(st.booleans()),
    )


def ragged_config(**fields) -> LowRankViTConfig:
    ranks = {"query_key_ranks": [[3, 7, 1], [4, 4, 4]], "value_output_ranks": [[2, 9, 5], [1, 0, 8]]}
    plan = {**ranks, "mlp_widths": [6, 11]}
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    return LowRankViTConfig(**{**sizes, "image_size": 16, "patch_size": 8, "num_labels": 4, **plan, **fields})


PIVOTED = {
    "output_pivots": [2, 0],
    "embedding_ranks": {"projection": 7},
    "projection_pivots": 6,
    "layer_norm_affine": False,
}


def make_model(config: LowRankViTConfig, attention: str = "sdpa") -> LowRankViTForImageClassification:
    torch.manual_seed(0)
    model = LowRankViTForImageClassification._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_pixels(config: LowRankViTConfig, batch: int = 2) -> torch.Tensor:
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    return torch.randn(batch, config.num_channels, *size, generator=torch.Generator().manual_seed(1))


def parameters_of_plan(config: LowRankViTConfig) -> int:
    """The count by hand, from the plan alone."""
    d, labels = config.hidden_size, config.num_labels
    height, width = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    prefix = 1 + config.use_distillation_token
    tokens = prefix + (height // config.patch_size) * (width // config.patch_size)
    values, embedding = config.num_channels * config.patch_size**2, config.embedding_ranks
    total = prefix * d + d
    total += embedding["projection"] * (values + d) if "projection" in embedding else values * d
    total += embedding["positions"] * (tokens + d) if "positions" in embedding else tokens * d
    for qk, vo, width in zip(config.query_key_ranks, config.value_output_ranks, config.mlp_widths, strict=True):
        total += sum(qk) * (2 * d + config.qkv_bias) + sum(vo) * 2 * d + d + width * (2 * d + 1) + d
    total += (2 * config.num_hidden_layers + 1) * 2 * d * config.layer_norm_affine
    total -= sum(sum(vo) * same for vo, same in zip(config.value_output_ranks, config.output_pivots, strict=True))
    total -= embedding.get("projection", 0) * config.projection_pivots
    for layer, factors in enumerate(config.factor_ranks):
        qk, vo = sum(config.query_key_ranks[layer]), sum(config.value_output_ranks[layer])
        inner = {"query_key_value": 2 * qk + vo, "output": vo}
        for name, rank in factors.items():
            size = inner.get(name, config.mlp_widths[layer])
            total += rank * (d + size) - d * size
        if "query_key_value" in factors:
            total += 2 * qk + vo - config.qkv_bias * qk
    total += sum(2 * d * rank for rank in config.bypass_ranks)
    for width, rank in zip(config.mlp_widths, config.up_ranks, strict=True):
        total += (rank * d + rank * (width - rank) - width * d) if rank else 0
    return total + (d + 1) * labels * (1 + config.use_distillation_head)


def reference_logits(model: LowRankViTForImageClassification, pixels: torch.Tensor) -> torch.Tensor:
    """The formulas written out in float64, head by head, from the stored tensors."""
    config, state = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.reduce.weight" in state:
            return linear(x @ state[f"{name}.reduce.weight"].T, f"{name}.expand")
        if f"{name}.read.weight" in state:
            first = linear(x, f"{name}.read")
            return torch.cat((first, linear(first, f"{name}.rest")), -1)
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    def pivoted(groups: list[torch.Tensor], pivots: int, name: str) -> torch.Tensor:
        first, rest = torch.stack([group[..., :pivots] for group in groups]).sum(0), state[f"{name}.rest.weight"]
        return torch.cat((first, torch.cat(groups, -1) @ rest.T), -1) + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"] if config.layer_norm_affine else scaled

    size = config.patch_size
    patches = pixels.double().unfold(2, size, size).unfold(3, size, size)  # batch, channel, row, column, size, size
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    state |= {name: tensor.flatten(1) for name, tensor in state.items() if tensor.dim() == 4}  # kernels
    x = linear(patches, "vit.embeddings.projection")
    if config.projection_pivots:
        x = pivoted([x], config.projection_pivots, "vit.embeddings.expand")
    for name in ("distillation_token", "cls_token"):
        if f"vit.embeddings.{name}" in state:
            x = torch.cat((state[f"vit.embeddings.{name}"].expand(len(x), 1, -1), x), 1)
    positions = state["vit.embeddings.position_embeddings"]
    x = x + (positions @ state["vit.embeddings.position_basis"] if "positions" in config.embedding_ranks else positions)
    for layer in range(config.num_hidden_layers):
        block = f"vit.blocks.{layer}"
        normed = norm(x, f"{block}.attention_norm")
        first_value = sum(config.query_key_ranks[layer])
        if "query_key_value" in config.factor_ranks[layer]:
            all_three = linear(normed, f"{block}.attention.query_key_value")
            queries, keys, values = all_three.tensor_split([first_value, 2 * first_value], -1)
        else:
            queries = linear(normed, f"{block}.attention.query")
            keys, values = linear(normed, f"{block}.attention.key_value").tensor_split([first_value], -1)
        contexts = []
        at, out_at = 0, 0
        for r_qk, r_vo in zip(config.query_key_ranks[layer], config.value_output_ranks[layer], strict=True):
            scores = queries[..., at : at + r_qk] @ keys[..., at : at + r_qk].transpose(1, 2)
            contexts.append(scores.softmax(-1) @ values[..., out_at : out_at + r_vo])
            at, out_at = at + r_qk, out_at + r_vo
        if config.output_pivots[layer]:
            x = x + pivoted(contexts, config.output_pivots[layer], f"{block}.attention.output")
        else:
            x = x + linear(torch.cat(contexts, -1), f"{block}.attention.output")
        normed = norm(x, f"{block}.mlp_norm")
        x = x + linear(torch.nn.functional.gelu(linear(normed, f"{block}.mlp.up")), f"{block}.mlp.down")
        if config.bypass_ranks[layer]:
            x = x + linear(normed, f"{block}.mlp.bypass")
    x = norm(x, "vit.norm")
    logits = linear(x[:, 0], "classifier")
    if config.use_distillation_head:
        logits = (logits + linear(x[:, 1], "distillation_classifier")) / 2
    return logits


# ---------------------------------------------------------------------------------------------------------- rank plans


@settings(max_examples=25, deadline=None)
@given(configs())
@torch.no_grad()
def test_any_plan_computes_what_the_formulas_say(config: LowRankViTConfig):
    pixels = make_pixels(config)
    model, eager = make_model(config), make_model(config, "eager")
    expected = reference_logits(model, pixels)
    with patch.object(LowRankViTAttention, "_is_fused", return_value=True):  # as on a GPU
        fused = model(pixels).logits
    for logits in (
        fused,
        model(pixels).logits,  # the last block for the read tokens only
        eager(pixels).logits,
        model(pixels, output_hidden_states=True).logits,  # the last block for all tokens
    ):
        torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=2e-5)
    full = model.vit(pixels).last_hidden_state
    read = model.vit(pixels, num_tokens_read=config.num_tokens_read).last_hidden_state
    assert read.shape[1] == config.num_tokens_read
    torch.testing.assert_close(read, full[:, : config.num_tokens_read], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_any_plan_loads_in_a_fresh_process(config, fresh, image_processor, tmp_path_factory):
    model, pixels = make_model(config), make_pixels(config)
    folder = tmp_path_factory.mktemp("plan") / "checkpoint"
    save_checkpoint(model, image_processor, folder, record={}, card="")
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == parameters_of_plan(config)
    answer, outputs = fresh.load(folder, pixels)
    with torch.no_grad():
        assert torch.equal(outputs["logits"], model(pixels).logits)
        assert torch.equal(outputs["tokens"], model.vit(pixels).last_hidden_state)
    assert answer["mlp_widths"] == config.mlp_widths


def test_auto_classes_in_a_fresh_process(fresh, image_processor, tmp_path: Path):
    folder = tmp_path / "with--dashes.and dots"
    save_checkpoint(make_model(ragged_config()), image_processor, folder, record={}, card="")
    answer, _ = fresh.load(folder, make_pixels(ragged_config()))
    assert answer["classes"] == ["LowRankViTConfig", "LowRankViTModel", "LowRankViTForImageClassification"]
    assert all(name.startswith("transformers_modules.") for name in answer["modules"])
    assert not answer["training"]
    assert answer["image_processor"].startswith("ViTImageProcessor")
    assert answer["size"] == {"height": 16, "width": 16}
    complaints = fresh.errors.read_text().lower()  # of this folder and those before it
    for words in ("newly initialized", "missing", "unexpected", "mismatch", "traceback", "not installed here"):
        assert words not in complaints


@settings(max_examples=25, deadline=None)
@given(configs())
def test_config_round_trip(config: LowRankViTConfig):
    again = LowRankViTConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()


def test_parameter_names_are_frozen():
    names = {name for name in make_model(ragged_config()).state_dict() if name.startswith("vit.blocks.0.")}
    whole = ("attention.query", "attention.output", "mlp.up", "mlp.down", "attention_norm", "mlp_norm")
    expected = {f"{name}.{kind}" for name in whole for kind in ("weight", "bias")} | {"attention.key_value.weight"}
    assert names == {f"vit.blocks.0.{name}" for name in expected}
    factored = make_model(ragged_config(factor_ranks=[{"query_key_value": 2}, {}], bypass_ranks=[2, 0]))
    expected -= {"attention.key_value.weight", "attention.query.weight", "attention.query.bias"}
    expected |= {f"attention.query_key_value.{name}" for name in ("reduce.weight", "expand.weight", "expand.bias")}
    expected |= {"mlp.bypass.reduce.weight", "mlp.bypass.expand.weight"}
    names = {name for name in factored.state_dict() if name.startswith("vit.blocks.0.")}
    assert names == {f"vit.blocks.0.{name}" for name in expected}
    names = {name for name in make_model(ragged_config(up_ranks=[2, 0])).state_dict() if ".0.mlp.up." in name}
    kinds = ("read.weight", "read.bias", "rest.weight", "rest.bias")
    assert names == {f"vit.blocks.0.mlp.up.{kind}" for kind in kinds}


# ---------------------------------------------------------------------------------------------------------- refusals


def test_newer_format_is_refused(image_processor, tmp_path: Path):
    save_checkpoint(make_model(ragged_config()), image_processor, tmp_path / "out", record={}, card="")
    path = tmp_path / "out" / "config.json"
    path.write_text(
        path.read_text().replace(f'"format_version": {FORMAT_VERSION}', f'"format_version": {FORMAT_VERSION + 1}')
    )
    with pytest.raises(ValueError, match="format_version 4, but the code knows only up to 3"):
        LowRankViTForImageClassification.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_key_ranks": [[3, 7, 1]]}, "query_key_ranks must hold 2 lists"),
        ({"value_output_ranks": [[3, 7], [1, 1]]}, "value_output_ranks must hold 2 lists.*of 3 ranks"),
        ({"query_key_ranks": [[3, 7, -1], [1, 1, 1]]}, "query_key_ranks must be whole numbers from 0 to 12"),
        ({"value_output_ranks": [[3, 7, 13], [1, 1, 1]]}, "value_output_ranks must be whole numbers from 0 to 12"),
        (
            {"value_output_ranks": [[3, 7, 1], [0, 0, 0]]},
            "value_output_ranks must leave at least one rank in each layer",
        ),
        ({"query_key_ranks": [[3, 7, 2.0], [1, 1, 1]]}, "must be whole numbers"),
        ({"query_key_ranks": [[3, 7, True], [1, 1, 1]]}, "must be whole numbers"),
        ({"mlp_widths": [6]}, "mlp_widths must hold 2 numbers"),
        ({"mlp_widths": [6, 21]}, "mlp_widths must be whole numbers from 1 to 20"),
        ({"factor_ranks": [{}]}, "factor_ranks must hold 2 dictionaries"),
        ({"factor_ranks": [{}, [3]]}, "factor_ranks must map names among query_key_value, .*, down to ranks"),
        ({"factor_ranks": [{}, {"key_value": 3}]}, "factor_ranks must map names"),
        ({"factor_ranks": [{}, {"output": 0}]}, "factor_ranks must be whole numbers from 1 to 12"),
        ({"factor_ranks": [{"up": 13}, {}]}, "factor_ranks must be whole numbers from 1 to 12"),
        ({"embedding_ranks": {"norm": 1}}, "embedding_ranks must map names among projection, positions"),
        ({"embedding_ranks": {"positions": 13}}, "embedding_ranks must be whole numbers from 1 to 12"),
        ({"embedding_ranks": [3]}, "embedding_ranks must map names"),
        ({"bypass_ranks": [1]}, "bypass_ranks must hold 2 numbers"),
        ({"bypass_ranks": [1, -1]}, "bypass_ranks must be whole numbers from 0 to 12"),
        ({"up_ranks": [1]}, "up_ranks must hold 2 numbers"),
        ({"up_ranks": [6, 0]}, "up_ranks must be whole numbers up to hidden_size and below the layer's width, not 6"),
        ({"up_ranks": [1, 0], "factor_ranks": [{"up": 3}, {}]}, "0 where the up weight is a product of two"),
        ({"output_pivots": [1]}, "output_pivots must hold 2 numbers"),
        ({"output_pivots": [3, 0]}, "output_pivots must be whole numbers up to the smallest rank"),
        ({"output_pivots": [2, -1]}, "output_pivots must be whole numbers"),
        (
            {"output_pivots": [1, 0], "factor_ranks": [{"output": 3}, {}]},
            "0 where the output weight is a product of two",
        ),
        ({"projection_pivots": 1}, "projection_pivots must be a whole number up to 0"),
        ({"projection_pivots": 4, "embedding_ranks": {"projection": 3}}, "projection_pivots must be .* up to 3"),
        ({"projection_pivots": 12, "embedding_ranks": {"projection": 12}}, "projection_pivots must be .* up to 11"),
        ({"layer_norm_affine": 1}, "layer_norm_affine must be true or false"),
        ({"use_distillation_head": True}, "needs use_distillation_token"),
    ],
)
def test_invalid_plans_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ragged_config(**fields)


@torch.no_grad()
def test_what_follows_from_sizes_is_made_again_on_loading(image_processor, tmp_path: Path):
    model, pixels = make_model(ragged_config(**PIVOTED)), make_pixels(ragged_config())
    save_checkpoint(model, image_processor, tmp_path / "out", record={}, card="")
    loaded = LowRankViTForImageClassification.from_pretrained(tmp_path / "out")
    with patch.object(LowRankViTAttention, "_is_fused", return_value=True):  # as on a GPU
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, atol=0, rtol=0)


@torch.no_grad()
def test_a_model_made_on_the_meta_device_can_be_filled():
    model, pixels = make_model(ragged_config(**PIVOTED)), make_pixels(ragged_config())
    with torch.device("meta"):
        empty = LowRankViTForImageClassification(ragged_config(**PIVOTED))
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(model.state_dict())
    with patch.object(LowRankViTAttention, "_is_fused", return_value=True):  # as on a GPU
        torch.testing.assert_close(filled(pixels).logits, model(pixels).logits, atol=0, rtol=0)


def test_an_accelerator_gets_what_its_fused_kernels_want(monkeypatch):
    """One head size for all, a multiple of 8, rows without gaps, no mask: flash attention asks for these on CUDA."""
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        calls.append((query, key, value, options))
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = make_model(ragged_config()).to("meta")
    model(torch.empty(2, 3, 16, 16, device="meta"))
    assert len(calls) == 2
    for *heads, options in calls:
        assert {tensor.shape[-1] % 8 for tensor in heads} == {0}
        assert len({tensor.shape[-1] for tensor in heads}) == 1
        assert {tensor.stride(-1) for tensor in heads} == {1}
        assert "attn_mask" not in options


# ------------------------------------------------------------------------------------------- compilers and precisions


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_compile_and_export_without_graph_break(attention):
    model, pixels = make_model(ragged_config(), attention), make_pixels(ragged_config())
    expected = model(pixels).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels).logits, expected)
    exported = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    more = make_pixels(ragged_config(), batch=5)
    torch.testing.assert_close(exported.module()(more).logits, model(more).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_load(dtype, image_processor, tmp_path: Path):
    model, pixels = make_model(ragged_config()), make_pixels(ragged_config())
    save_checkpoint(model, image_processor, tmp_path / "out", record={}, card="")
    half = LowRankViTForImageClassification.from_pretrained(tmp_path / "out", dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    logits = half(pixels).logits  # float32 pixels, as an image processor gives them
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), model(pixels).logits, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "is_single"), [(FEW_IMAGES - 1, True), (FEW_IMAGES, False)])
@torch.no_grad()
def test_few_images_attend_in_single_precision_on_a_processor(batch, is_single, dtype, monkeypatch):
    config = ragged_config()
    model, pixels = make_model(config, "eager"), make_pixels(config, batch=batch)
    expected = model(pixels, output_attentions=True)
    half, seen, product = model.to(dtype), set(), torch.bmm

    def watched(one, other):
        seen.update((one.dtype, other.dtype))
        return product(one, other)

    monkeypatch.setattr(torch, "bmm", watched)
    outputs = half(pixels, output_attentions=True)
    assert seen == {torch.float32 if is_single else dtype}
    assert {attention.dtype for attention in outputs.attentions} == {outputs.logits.dtype} == {dtype}
    torch.testing.assert_close(outputs.logits.float(), expected.logits, atol=0.15, rtol=0.05)


@torch.no_grad()
def test_export_in_half_precision_takes_any_number_of_images():
    model, batch = make_model(ragged_config()).bfloat16(), torch.export.Dim("batch", min=2)
    pixels = make_pixels(ragged_config()).bfloat16()
    exported = torch.export.export(model, (pixels,), dynamic_shapes=({0: batch},)).module()
    for images in (FEW_IMAGES - 1, FEW_IMAGES):
        more = make_pixels(ragged_config(), batch=images).bfloat16()
        torch.testing.assert_close(exported(more).logits, model(more).logits, atol=0.1, rtol=0.05)
