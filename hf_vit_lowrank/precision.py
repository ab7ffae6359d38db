"""Where bfloat16 pays."""

from __future__ import annotations

import torch


def half_precision(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones, not by emulating them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
