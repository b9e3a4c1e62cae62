"""How long a training step will take, roughly: for the estimate printed before a run, and for its budget."""

from __future__ import annotations

from .shapes import MODELS

EFFICIENCY = 0.6  # of the measured matrix-product rate, over a whole step
BUILD_S = 3.0
COMPILE_S = {"cuda": 12.0, "cpu": 15.0}
MODE = {"eager": 1.0, "checkpointed": 1.4, "compiled": 0.8}
KIND = {"floor": 1.0, "losia-pro": 1.05, "lora": 1.2, "lora-peft": 1.4, "dora": 1.65, "full": 1.45}


def step_seconds(
    model: str, layers: int, batch: int, length: int, method: str, mode: str, rate: float
) -> float:
    """Flops of the frozen network's forward and backward over a share of ``rate``, times what the method and
    the mode cost about."""
    shape = MODELS[model]
    matrices = shape.parameters(layers) - (0 if shape.tied else shape.vocabulary * shape.hidden)
    dense = 4 * matrices * batch * length
    causal = 3.5 * 2 * batch * length**2 * shape.heads * shape.head_dim * layers
    return (dense + causal) / (EFFICIENCY * rate) * MODE[mode] * KIND[kind(method)]


def row_seconds(step: float, steps: int, mode: str, device: str) -> float:
    """A whole measurement: building the model, compiling it, and the steps."""
    return BUILD_S + (COMPILE_S[device] if mode == "compiled" else 0.0) + steps * step


def kind(method: str) -> str:
    """Which of ``KIND`` a method's name belongs to."""
    name = method.split("+")[0]
    return next(k for k in sorted(KIND, key=len, reverse=True) if name.startswith(k))
