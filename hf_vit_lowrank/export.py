"""A checkpoint in another form: an ONNX file, or a folder that transformers' own classes load without remote code."""

from __future__ import annotations

import json
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .checkpoint import PREPROCESSOR, check_target, find_record, save_checkpoint
from .dense_layout import to_transformers, why_not_uniform
from .disk import overlap
from .embeddings import whole_positions, whole_projection
from .errors import RunError, UserError, as_user_error, reason
from .evaluation import count_flops, count_parameters, load_classifier
from .model_card import model_card
from .narrowing import widened
from .pivoting import unpivoted
from .plan_costs import plan_cost
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, pair

LARGEST_ONNX_FILE = 2 << 30  # bytes, a limit of protobuf


def export_onnx(folder: str | Path, file: str | Path, *, overwrite: bool = False) -> None:
    """Write the classifier of a checkpoint folder as an ONNX file: `pixel_values` (batch, channels, height, width) in,
    `logits` (batch, labels) out, float32, any batch.

    The file's metadata hold the text of preprocessor_config.json and config.json, under these names.

    Raises:
        UserError: onnx or onnxscript is not installed, `folder` is no checkpoint, the file exists (without
            `overwrite`) or would be larger than 2 GB.
        RunError: the exporter or the disk failed.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'hf-vit-lowrank[ecosystem]'.")
    target = _free_file(file, Path(folder), overwrite)
    model, _ = _loaded(folder)
    if 4 * count_parameters(model) > LARGEST_ONNX_FILE:
        raise UserError(f"An ONNX file holds at most 2 GB, and '{folder}' has {count_parameters(model):,} parameters.")
    try:
        program = _onnx_program(model)
        for name in (PREPROCESSOR, "config.json"):
            if (Path(folder) / name).is_file():
                program.model.metadata_props[name] = (Path(folder) / name).read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            program.save(Path(temporary, target.name), external_data=False)
            Path(temporary, target.name).replace(target)
    except Exception as error:  # the exporter's own errors are of many classes
        raise RunError(f"'{folder}' could not be written as ONNX ({reason(error)}).") from error


def export_native(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> PreTrainedModel:
    """Write a checkpoint whose plan is uniform (one rank for all heads, one MLP width, whole weights, no bypass) as one
    of transformers' own class with that head size and width; returns the model.

    Raises:
        UserError: `folder` is no checkpoint, its plan is not uniform (says where), see also `check_target`.
        RunError: writing failed.
    """
    model, image_processor = _opened(folder, output, overwrite)
    why_not = why_not_uniform(model.config)
    if why_not:
        raise UserError(
            f"'{folder}' does not fit transformers' own classes: {why_not}; use --dense, or compress with --native."
        )
    native = to_transformers(unpivoted(model))
    return _saved(native, image_processor, folder, output, "native", _dense_flops(model.config), overwrite)


def export_dense(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> PreTrainedModel:
    """Write a checkpoint in the dense architecture of transformers, with the same logits; returns the model.

    Raises:
        UserError: `folder` is no checkpoint, see `densified` for what cannot be, see also `check_target`.
        RunError: writing failed.
    """
    model, image_processor = _opened(folder, output, overwrite)
    dense = to_transformers(densified(model))
    return _saved(dense, image_processor, folder, output, "dense", _dense_flops(model.config), overwrite)


@torch.no_grad()
def densified(model: LowRankViTForImageClassification) -> LowRankViTForImageClassification:
    """The same function at full size and with whole weights; exact but for rounding.

    Factors are multiplied out, and missing ranks and hidden units are filled up with zeros. A bypass of rank q becomes
    2q hidden units, f(Yx) and f(-Yx), where the activation has f(t) - f(-t) = t: GELU, SiLU and ReLU do.

    Raises:
        UserError: a bypass has no room among the units that were removed, or the activation is another one.
    """
    model = unpivoted(model)
    if model.config.hidden_size < model.config.dense_hidden_size:
        model = widened(model, model.config.dense_hidden_size)
    config, state = model.config, model.state_dict()
    whole = LowRankViTForImageClassification(_full_config(config)).eval()
    size = whole.config.query_key_ranks[0][0]
    inner = ("vit.blocks.", "vit.embeddings.position", "vit.embeddings.projection")
    converted = {name: tensor for name, tensor in state.items() if not name.startswith(inner)}
    converted |= _whole_embeddings(model, whole)
    for layer in range(config.num_hidden_layers):
        own = f"vit.blocks.{layer}."
        block = {name.removeprefix(own): tensor for name, tensor in state.items() if name.startswith(own)}
        ranks = config.query_key_ranks[layer], config.value_output_ranks[layer]
        filled = {name: tensor for name, tensor in block.items() if "_norm." in name}
        filled |= _full_attention(block, *ranks, size) | _full_mlp(block, layer, config)
        if not whole.config.qkv_bias:
            del filled["attention.query.bias"]
        converted |= {own + name: tensor for name, tensor in filled.items()}
    whole.load_state_dict(converted)
    return whole


def _full_config(config: LowRankViTConfig) -> LowRankViTConfig:
    ranks = [rank for layer in (*config.query_key_ranks, *config.value_output_ranks) for rank in layer]
    size = max(config.hidden_size // config.num_attention_heads, *ranks)
    sizes = [[size] * config.num_attention_heads for _ in range(config.num_hidden_layers)]
    whole = {"query_key_ranks": sizes, "value_output_ranks": [list(layer) for layer in sizes]}
    shrunk = dict.fromkeys(("mlp_widths", "factor_ranks", "up_ranks", "bypass_ranks", "embedding_ranks"))
    # One weight for queries, keys and values has a bias, whatever the other layers have.
    bias = {"qkv_bias": config.qkv_bias or any("query_key_value" in ranks for ranks in config.factor_ranks)}
    return LowRankViTConfig.from_dict({**config.to_dict(), **whole, **shrunk, **bias})


def _whole_embeddings(
    model: LowRankViTForImageClassification, whole: LowRankViTForImageClassification
) -> dict[str, Tensor]:
    weight, bias = whole_projection(model.vit.embeddings)
    projection: Any = whole.vit.embeddings.projection
    return {
        "vit.embeddings.position_embeddings": whole_positions(model.vit.embeddings)[None].float(),
        "vit.embeddings.projection.weight": weight.float().view_as(projection.weight),
        "vit.embeddings.projection.bias": bias.float(),
    }


def _full_attention(
    block: dict[str, Tensor], query_key: list[int], value_output: list[int], size: int
) -> dict[str, Tensor]:
    sizes = [sum(query_key), sum(query_key), sum(value_output)]
    output, output_bias = _weight(block, "attention.output"), _bias(block, "attention.output")
    if "attention.query.weight" in block:
        weight = torch.cat((block["attention.query.weight"], block["attention.key_value.weight"]))
        query_bias = block.get("attention.query.bias", output_bias.new_zeros(sizes[0]))
    else:
        weight = _weight(block, "attention.query_key_value")
        # A key's bias cancels in the softmax; a value's passes it unchanged.
        query_bias, _, value_bias = _bias(block, "attention.query_key_value").split(sizes)
        output_bias = output_bias + output @ value_bias
    query, key, value = weight.split(sizes)
    return {
        "attention.query.weight": _full_heads(query, query_key, size),
        "attention.query.bias": _full_heads(query_bias, query_key, size),
        "attention.key_value.weight": torch.cat(
            (_full_heads(key, query_key, size), _full_heads(value, value_output, size))
        ),
        "attention.output.weight": _full_heads(output.mT, value_output, size).mT,
        "attention.output.bias": output_bias,
    }


def _full_heads(rows: Tensor, ranks: list[int], size: int) -> Tensor:
    """(sum of ranks, …) to (heads · size, …): zeros after the rows of each head."""
    heads = [torch.cat((head, head.new_zeros(size - len(head), *head.shape[1:]))) for head in rows.split(ranks)]
    return torch.cat(heads)


def _full_mlp(block: dict[str, Tensor], layer: int, config: LowRankViTConfig) -> dict[str, Tensor]:
    up, down = _weight(block, "mlp.up"), _weight(block, "mlp.down")
    up_bias, down_bias = _bias(block, "mlp.up"), _bias(block, "mlp.down")
    if config.bypass_ranks[layer]:
        _check_bypass(layer, config)
        reduce, expand = block["mlp.bypass.reduce.weight"], block["mlp.bypass.expand.weight"]
        up, down = torch.cat((up, reduce, -reduce)), torch.cat((down, expand, -expand), 1)
        up_bias = torch.cat((up_bias, up_bias.new_zeros(2 * len(reduce))))
    missing = config.intermediate_size - len(up)
    return {
        "mlp.up.weight": nn.functional.pad(up, (0, 0, 0, missing)),
        "mlp.up.bias": nn.functional.pad(up_bias, (0, missing)),
        "mlp.down.weight": nn.functional.pad(down, (0, missing)),
        "mlp.down.bias": down_bias,
    }


def _check_bypass(layer: int, config: LowRankViTConfig) -> None:
    rank, width = config.bypass_ranks[layer], config.mlp_widths[layer]
    inputs = torch.linspace(-20, 20, 1001)
    function = ACT2FN[config.hidden_act]
    if not torch.allclose(function(inputs) - function(-inputs), inputs, atol=1e-5):
        raise UserError(
            f"The bypass around the MLP of block {layer} cannot become hidden units with activation "
            f"'{config.hidden_act}': compress without bypasses (--native)."
        )
    if width + 2 * rank > config.intermediate_size:
        raise UserError(
            f"The bypass of rank {rank} around the MLP of block {layer} needs {2 * rank} hidden units, but beside "
            f"{width} only {config.intermediate_size - width} of {config.intermediate_size} are free."
        )


def _weight(block: dict[str, Tensor], name: str) -> Tensor:
    """The weight of a linear map, multiplied out where it is stored as two."""
    if f"{name}.weight" in block:
        return block[f"{name}.weight"]
    return (block[f"{name}.expand.weight"].double() @ block[f"{name}.reduce.weight"].double()).float()


def _bias(block: dict[str, Tensor], name: str) -> Tensor:
    return block[f"{name}.bias"] if f"{name}.bias" in block else block[f"{name}.expand.bias"]


# ------------------------------------------------------------------------------------------------- reading and writing


def _opened(folder: str | Path, output: str | Path, overwrite: bool) -> tuple[LowRankViTForImageClassification, Any]:
    """The classifier and the image processor of a folder, after a look at where the export is to go."""
    if overlap(folder, output):
        raise UserError(f"'{output}' is the checkpoint itself, holds it or lies in it: choose another folder.")
    check_target(output, 0, overwrite=overwrite)
    model, image_processor = _loaded(folder)
    if not isinstance(model, LowRankViTForImageClassification):
        raise UserError(f"'{folder}' already holds transformers' own {type(model).__name__}, without remote code.")
    return model, image_processor


def _dense_flops(config: LowRankViTConfig) -> int:
    """Of the dense model as transformers computes it."""
    whole_stream = {"hidden_size": config.dense_hidden_size, "output_pivots": None, "projection_pivots": 0}
    return plan_cost(_full_config(LowRankViTConfig.from_dict({**config.to_dict(), **whole_stream})), "flops", True)


def _saved(
    model: PreTrainedModel,
    image_processor: Any,
    folder: str | Path,
    output: str | Path,
    form: str,
    dense_flops: int,
    overwrite: bool,
) -> PreTrainedModel:
    source = Path(folder)
    record = {key: value for key, value in (find_record(source) or {}).items() if key != "files"}
    sizes = {"parameters": count_parameters(model), "flops": count_flops(model), "dense_flops": dense_flops}
    record |= {"exported": form, "remote_code": False, **sizes}
    if "source" in record:
        record["reduction"] = 1 - sizes["parameters"] / record["source"]["parameters"]
    preprocessor = source / PREPROCESSOR
    save_checkpoint(
        model,
        image_processor,
        output,
        record=record,
        card=_card(source, model, record),
        preprocessor_config=preprocessor.read_bytes() if preprocessor.is_file() else None,
        overwrite=overwrite,
    )
    return model


def _card(source: Path, model: PreTrainedModel, record: dict[str, Any]) -> str:
    if record["exported"] == "native" and "source" in record:
        return model_card(record)
    name = " ".join(source.resolve().name.replace("`", "").split())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-classification\n---\n\n"
        f"# `{name}`, {record['exported']}\n\n"
        f"The checkpoint `{name}` as transformers' own `{type(model).__name__}`, written by hf-vit-lowrank: the same "
        f"function without remote code, {count_parameters(model):,} parameters.\n"
    )


def _loaded(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise UserError(f"'{folder}' is no checkpoint folder: it has no config.json.")
    with as_user_error(f"config.json of '{folder}' could not be read"):
        quantised = bool(json.loads(config.read_text(encoding="utf-8")).get("quantization_config"))
    if quantised:
        raise UserError(f"'{folder}' is quantised: export the checkpoint that it was made of.")
    return load_classifier(str(folder))


def _free_file(file: str | Path, source: Path, overwrite: bool) -> Path:
    target = Path(file).resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"'{file}' cannot be written: it is a folder, or its folder does not exist.")
    if source.resolve() in target.parents:
        raise UserError(f"'{file}' lies in the checkpoint itself, which is never written to: choose another place.")
    if target.exists() and not overwrite:
        raise UserError(f"'{file}' exists: choose another name, or pass --overwrite.")
    return target


# ---------------------------------------------------------------------------------------------------------------- ONNX


class _Logits(nn.Module):
    """The classifier with nothing but its logits."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values, return_dict=True).logits


def _onnx_program(model: PreTrainedModel) -> Any:
    pixels = torch.zeros(2, model.config.num_channels, *pair(model.config.image_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program: Any = torch.onnx.export(
            _Logits(model).eval(),
            (pixels,),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with the folders of this machine
    return program
