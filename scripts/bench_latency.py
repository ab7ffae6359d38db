"""How much faster and leaner the compressed model is than the dense one, and how near that comes to its FLOPs.

Dense is transformers' own class. Both run in one process and take turns, and medians are compared, so that a busy
machine slows both alike. Without --compressed the models have random weights in the shape of DeiT-base, with ranks that
differ from head to head and layer to layer as those of real plans do. Writes latency.json and latency.md into OUTPUT.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise, product
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassification, PreTrainedModel

from hf_vit_lowrank.bisection import last_that_fits
from hf_vit_lowrank.dense_layout import from_transformers
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.evaluation import count_flops, count_parameters, load_classifier, pick_device
from hf_vit_lowrank.plan_costs import plan_cost
from hf_vit_lowrank.precision import half_precision
from hf_vit_lowrank.quantised import quantise
from hf_vit_lowrank.rank_plan import stored
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification, pair

PRECISIONS = ("float32", "bfloat16", "int8")
ATTENTIONS = ("sdpa", "eager")
RANK_MULTIPLE = 8
# Shares of the dense sizes that query-key ranks, value-output ranks and widths of a real plan are spread over.
SPREADS = {"query_key_ranks": (0.1, 0.6), "value_output_ranks": (0.3, 1.0), "mlp_widths": (0.15, 0.8)}
WARM_UP = 2
LOADS = 15


@dataclass(frozen=True)
class Row:
    """One comparison. Milliseconds are medians for a batch, memory is weights and the most that tensors take at once.

    ceiling: dense FLOPs over compressed ones, of plain transformers' model and ours, padding counted.
    """

    source: str
    removed: float
    device: str
    precision: str
    attention: str
    compiled: bool
    batch: int
    dense_ms: float
    compressed_ms: float
    ceiling: float
    dense_bytes: int
    compressed_bytes: int

    @property
    def speed_up(self) -> float:
        return self.dense_ms / self.compressed_ms


def main(
    output: Annotated[Path, typer.Option(help="Folder for latency.json and latency.md.")],
    compressed: Annotated[Path | None, typer.Option(help="Folder of a compressed model, measured as it is.")] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model of --compressed: a hub id or a folder.")] = None,
    reductions: Annotated[str, typer.Option(help="Shares of the parameters removed (random weights).")] = "0.6,0.4",
    hidden_size: Annotated[int, typer.Option(help="Hidden size of the random weights: 768 is DeiT-base.")] = 768,
    up_rank: Annotated[
        float, typer.Option(help="Of up weights (random weights), as a share; 1: whole.", min=0.1, max=1)
    ] = 1.0,
    batches: Annotated[str, typer.Option(help="Images at once.")] = "1,8,32",
    precisions: Annotated[str, typer.Option(help=f"Of {', '.join(PRECISIONS)} (weights only).")] = ",".join(PRECISIONS),
    attentions: Annotated[str, typer.Option(help=f"Of {', '.join(ATTENTIONS)}.")] = ",".join(ATTENTIONS),
    compiled: Annotated[bool, typer.Option("--compile", help="Also under torch.compile.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda … (default: the best one here).")] = None,
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="Measured runs of each model.", min=1)] = 15,
    processor_time: Annotated[
        bool,
        typer.Option("--processor-time", help="Count processor time: one thread, on a machine that others use too."),
    ] = False,
) -> None:
    """Compare the compressed model with the dense one, everything else being equal."""
    if processor_time and threads > 1:
        raise UserError("--processor-time adds up all threads: use it with --threads 1.")
    if (compressed is None) != (dense is None):
        raise UserError("--compressed and --dense go together.")
    torch.set_num_threads(threads)
    where = pick_device(device)
    clock = time.process_time if processor_time else time.perf_counter
    kinds = [kind for kind in precisions.split(",") if _usable(kind, where)]
    cases = list(product(kinds, attentions.split(","), (False, True) if compiled else (False,)))
    if compressed is None:
        pairs = _random_pairs([float(part) for part in reductions.split(",")], hidden_size, up_rank)
    else:
        pairs = iter([(str(compressed.name), load_classifier(str(dense))[0], load_classifier(str(compressed))[0])])
    rows, loads = [], []
    for name, dense_model, small in pairs:
        loads.append({"source": name, **_loading(dense_model, small)})
        for case, batch in product(cases, [int(part) for part in batches.split(",")]):
            rows.append(_row(name, dense_model, small, *case, batch, where, rounds, clock))
            print(_line(rows[-1]), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "threads": threads,
        "clock": clock.__name__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "loading": loads,
        "rows": [{**asdict(row), "speed_up": row.speed_up, "of_ceiling": row.speed_up / row.ceiling} for row in rows],
    }
    (output / "latency.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (output / "latency.md").write_text(_table(rows, loads), encoding="utf-8")
    print(_table(rows, loads))


def _usable(precision: str, device: torch.device) -> bool:
    if precision not in PRECISIONS:
        raise UserError(f"'{precision}' is none of {', '.join(PRECISIONS)}.")
    if precision == "bfloat16" and device.type == "cpu" and not half_precision(device):
        print("bfloat16 left out: this processor has no instructions for it.", file=sys.stderr)
        return False
    if precision == "int8":
        try:
            quantise(nn.Sequential(nn.Linear(8, 8)), "int8")
        except UserError as error:
            print(f"int8 left out: {error}", file=sys.stderr)
            return False
    return True


# ----------------------------------------------------------------------------------------------------------- the models


def _random_pairs(
    reductions: list[float], hidden_size: int, up_rank: float
) -> Iterator[tuple[str, PreTrainedModel, PreTrainedModel]]:
    heads = hidden_size // 64
    shape = {"hidden_size": hidden_size, "num_attention_heads": heads, "intermediate_size": 4 * hidden_size}
    torch.manual_seed(0)
    dense = DeiTForImageClassification(DeiTConfig(num_labels=1000, **shape)).eval()
    whole = from_transformers(dense).config
    for reduction in reductions:
        config = uneven_config(whole, int((1 - reduction) * count_parameters(dense)), up_rank)
        yield f"random, hidden size {hidden_size}", dense, LowRankViTForImageClassification(config).eval()


def uneven_config(dense: LowRankViTConfig, limit: int, up_rank: float = 1.0) -> LowRankViTConfig:
    """Uneven sizes, the layers' sums multiples of `RANK_MULTIPLE`, of at most `limit` parameters in all.

    up_rank: of the up weights, as a share of their smaller side; 1 for whole ones.
    """
    generator = random.Random(0)
    layers, heads = dense.num_hidden_layers, dense.num_attention_heads
    head_size = dense.hidden_size // heads

    def shares(name: str, count: int) -> list[float]:
        return [generator.uniform(*SPREADS[name]) for _ in range(count)]

    query_key = [shares("query_key_ranks", heads) for _ in range(layers)]
    value_output = [shares("value_output_ranks", heads) for _ in range(layers)]
    widths = shares("mlp_widths", layers)

    def config(scale: float) -> LowRankViTConfig:
        fields = dense.to_dict()
        fields["query_key_ranks"] = [_ranks(layer, scale, head_size) for layer in query_key]
        fields["value_output_ranks"] = [_ranks(layer, scale, head_size) for layer in value_output]
        fields["mlp_widths"] = [sum(_ranks([share], scale, dense.intermediate_size)) for share in widths]
        smaller_sides = (min(width, dense.hidden_size) for width in fields["mlp_widths"])
        fields["up_ranks"] = [int(up_rank * side) if up_rank < 1 else 0 for side in smaller_sides]
        return stored(LowRankViTConfig.from_dict(fields))

    return config(last_that_fits(lambda scale: plan_cost(config(scale), "parameters") <= limit, 0.05, 1.0))


def _ranks(shares: list[float], scale: float, largest: int) -> list[int]:
    """Ranks of the heads of a layer whose sum is a multiple: `largest` each at scale 1, all the less the smaller."""
    wanted = [largest * scale ** (1 / (2 * share)) for share in shares]
    total = max(round(sum(wanted) / RANK_MULTIPLE), 1) * RANK_MULTIPLE
    bounds = [round(total * part / sum(wanted)) for part in accumulate(chain((0.0,), wanted))]
    return [end - start for start, end in pairwise(bounds)]


# --------------------------------------------------------------------------------------------------------- measurements


def _row(
    name: str,
    dense: PreTrainedModel,
    small: PreTrainedModel,
    precision: str,
    attention: str,
    compiled: bool,
    batch: int,
    device: torch.device,
    rounds: int,
    clock: Callable[[], float],
) -> Row:
    removed = 1 - count_parameters(small) / count_parameters(dense)
    models: list[Any] = []
    for model in (dense, small):
        model.config._attn_implementation = attention  # read in every forward pass
        models.append(_prepared(model, precision, device))
    ceiling = count_flops(dense.to(device)) / count_flops(small.to(device))
    pixels = torch.randn(batch, dense.config.num_channels, *pair(dense.config.image_size), device=device)
    pixels = pixels.to(torch.bfloat16) if precision == "bfloat16" else pixels
    peaks = [_peak_bytes(model, pixels) for model in models]
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"  # with CUDA graphs
        models = [torch.compile(model, mode=mode) for model in models]
    times = _race(models, pixels, rounds, clock)
    torch.compiler.reset()
    return Row(
        *(name, removed, device.type, precision, attention, compiled, batch),
        *(1e3 * statistics.median(seconds) for seconds in times),
        ceiling,
        *peaks,
    )


def _prepared(model: PreTrainedModel, precision: str, device: torch.device) -> nn.Module:
    """The model in this precision; its float32 original is left as it is."""
    model = model.to(device)
    if precision == "int8":
        return quantise(model, "int8")
    if precision == "bfloat16":
        half = type(model)._from_config(model.config, dtype=torch.bfloat16).eval()
        half.load_state_dict(model.state_dict())
        return half.to(device)
    return model


@torch.no_grad()  # torchao's int8 does not work in inference mode
def _race(models: list[Any], pixels: torch.Tensor, rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of every run of each model; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(WARM_UP + rounds):
        for model, own in zip(models, times, strict=True):
            start = clock()
            model(pixels).logits.float().cpu()  # the copy waits for the device
            if turn >= WARM_UP:
                own.append(clock() - start)
    return times


@torch.no_grad()
def _peak_bytes(model: nn.Module, pixels: torch.Tensor) -> int:
    """Weights, and the most that the tensors of one forward pass take at once."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if pixels.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(pixels)
        return weights + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        model(pixels)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return weights + max(accumulate(changes), default=0)


def _loading(dense: PreTrainedModel, small: PreTrainedModel) -> dict[str, float]:
    """Seconds of `from_pretrained` (medians, taking turns) and bytes of the weights."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("dense", "compressed")]
        times: list[list[float]] = [[], []]
        for model, folder in zip((dense, small), folders, strict=True):
            model.save_pretrained(folder)
        for _ in range(LOADS):
            for model, folder, own in zip((dense, small), folders, times, strict=True):
                start = time.perf_counter()
                type(model).from_pretrained(folder)
                own.append(time.perf_counter() - start)
        sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    dense_seconds, compressed_seconds = (statistics.median(own) for own in times)
    return {
        "dense_seconds": dense_seconds,
        "compressed_seconds": compressed_seconds,
        "dense_bytes": sizes[0],
        "compressed_bytes": sizes[1],
    }


# ----------------------------------------------------------------------------------------------------------- the tables


def _line(row: Row) -> str:
    how = f"{row.device} {row.precision} {row.attention}{' compiled' if row.compiled else ''}"
    return (
        f"| {row.source} | −{100 * row.removed:.0f} % | {how} | {row.batch} | {row.dense_ms:.1f} | "
        f"{row.compressed_ms:.1f} | {row.speed_up:.2f} | {row.ceiling:.2f} | {row.speed_up / row.ceiling:.2f} | "
        f"{row.dense_bytes / 1e6:.0f} | {row.compressed_bytes / 1e6:.0f} |"
    )


def _table(rows: list[Row], loads: list[dict[str, Any]]) -> str:
    head = (
        "| model | removed | how | batch | dense ms | ours ms | speed-up | FLOPs ceiling | of it | dense MB | ours MB |"
    )
    lines = [head, "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|", *map(_line, rows), ""]
    for load in loads:
        time_ratio = load["compressed_seconds"] / load["dense_seconds"]
        size_ratio = load["compressed_bytes"] / load["dense_bytes"]
        lines.append(
            f"Loading {load['source']}: {1e3 * load['compressed_seconds']:.0f} ms against "
            f"{1e3 * load['dense_seconds']:.0f} ms ({time_ratio:.2f}) for {size_ratio:.2f} of the bytes."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    try:
        typer.run(main)
    except (UserError, RunError) as error:
        sys.exit(f"Error: {error}")
