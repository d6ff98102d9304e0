"""A training step on the meta device: what it would compute and hold on a GPU, found by running it without storage.

Tensors of the meta device have shapes and no content, so the real loss and its backward pass run in seconds at any
size. Autocast does nothing there, and attention is spelled out as products; both are put right here, because they
decide memory: under bf16 autocast products work on bf16 copies and norms in float32, and a GPU's attention never
keeps its scores.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from training.loop import Precision, Task

# What autocast does on CUDA devices: products in the lower precision, sums and norms in float32 (torch documentation,
# "Automatic Mixed Precision", op-specific behaviour).
LOWERED = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum"}
LOWERED |= {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
LOWERED |= {"scaled_dot_product_attention"}
KEPT_FULL = {"layer_norm", "group_norm", "softmax", "log_softmax", "exp", "expm1", "log", "log1p", "rsqrt", "softplus"}
KEPT_FULL |= {"pow", "__pow__", "__rpow__", "sum", "prod", "cumsum", "norm", "cosine_similarity"}
KEPT_FULL |= {"mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "cross_entropy", "nll_loss"}

Arithmetic = Literal["bf16", "tf32", "float32"]
WeightCopy = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StepCost:
    """One micro-batch of `num_clips` clips, forward and backward, found on the meta device.

    `peak_bytes` is the largest sum of what lives at one moment besides weights, their bf16 copies, gradients of
    parameters and optimiser; `weight_copy_bytes` are those copies, which autocast keeps from forward to backward.
    Operations are told apart by the arithmetic that a GPU does them in: torch lets convolutions of float32 use TF32.
    """

    num_clips: int
    forward_flops: int
    step_flops_by: Mapping[Arithmetic, int]
    peak_bytes: int
    weight_copy_bytes: int

    @property
    def step_flops(self) -> int:
        """Operations in any arithmetic."""
        return sum(self.step_flops_by.values())


def step_cost(task: Task, model: nn.Module, precision: Precision, num_clips: int) -> StepCost:
    """Run one step of `model` (on the meta device) and count; 2 operations per multiply-add."""
    ledger = _Ledger(model)
    batch = task.example(num_clips)
    with (
        ledger,
        _grads_freed(model),
        as_on_gpu(precision, on_weight_copy=ledger.weight_copy),
    ):
        loss = task.loss(model, batch, torch.device("meta"))["loss"]
        forward = sum(ledger.flops.values())
        with torch.autocast("cpu", enabled=False):
            _backward(loss)
    return StepCost(num_clips, forward, dict(ledger.flops), ledger.peak, sum(ledger.weight_copies.values()))


@contextlib.contextmanager
def as_on_gpu(
    precision: Precision, *, fused_attention: bool = True, on_weight_copy: WeightCopy | None = None
) -> Iterator[None]:
    """Within it, calls on meta tensors return and keep what they would under autocast on a GPU.

    Regions that switch autocast off keep their precision. `on_weight_copy` makes the bf16 copy of a weight.
    """
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        _OnGpu(fused_attention=fused_attention, on_weight_copy=on_weight_copy or _lowered),
    ):
        yield


def _backward(loss: torch.Tensor) -> None:
    """`loss.backward()`, which torch would run outside our mode, recomputed blocks included; the engine is not."""
    start = torch.ones_like(loss)
    _engine_run_backward((loss,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _lowered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16)


class _OnGpu(TorchFunctionMode):
    def __init__(self, *, fused_attention: bool, on_weight_copy: WeightCopy) -> None:
        super().__init__()
        self._fused = fused_attention
        self._copy = on_weight_copy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in LOWERED:
                args, kwargs = tree_map(self._lower, (args, kwargs))
            elif name in KEPT_FULL:
                args, kwargs = tree_map(_raise, (args, kwargs))
        if self._fused and name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        base = value if value._base is None else value._base
        is_weight = isinstance(base, nn.Parameter) and base.requires_grad
        return self._copy(value) if is_weight else _lowered(value)


def _raise(value: Any) -> Any:
    is_lower = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_lower else value


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """The fused kernel where GPUs have one; anything but plain attention of four axes is left to torch."""
    scale = options.pop("scale", None)
    plain = all(not option for option in (*rest, *options.values()))  # no mask, no dropout, not causal, not grouped
    if not plain or query.ndim != 4:
        return nn.functional.scaled_dot_product_attention(query, key, value, *rest, scale=scale, **options)
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, None, True, scale=scale)[0]


class _Ledger(TorchDispatchMode):
    """Operations of what runs within, and bytes of the storages it makes, as long as they live.

    Torch's own counter mode has the same formulas but holds on to the outputs of modules.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: Counter[Arithmetic] = Counter()
        self.peak = 0
        self.weight_copies: dict[Any, int] = {}  # by weight: autocast copies one once, however often it is used
        self._live = 0
        self._paused = False
        self._known: Any = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[_arithmetic(func, args)] += formula(*args, **kwargs, out_val=made)
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self._enter(value.untyped_storage())
        return made

    def weight_copy(self, weight: torch.Tensor) -> torch.Tensor:
        """The bf16 copy of a weight (or of a part of it), counted apart."""
        self._paused = True
        try:
            made = _lowered(weight)
        finally:
            self._paused = False
        whole = weight if weight._base is None else weight._base
        self.weight_copies[id(whole), weight.storage_offset(), made.numel()] = made.numel() * made.element_size()
        return made

    def _enter(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        if self._paused or storage.device.type != "meta":
            return
        size = storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._leave, size).atexit = False

    def _leave(self, size: int) -> None:
        self._live -= size


def _arithmetic(func: Any, args: Any) -> Arithmetic:
    dtype = next(value.dtype for value in tree_leaves(args) if isinstance(value, torch.Tensor))
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if "convolution" in func._overloadpacket.__name__ else "float32"


@contextlib.contextmanager
def _grads_freed(model: nn.Module) -> Iterator[None]:
    """Gradients of parameters vanish when complete: they are counted with the optimiser, not as activations."""
    handles = [
        parameter.register_post_accumulate_grad_hook(_drop_grad)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop_grad(parameter: torch.Tensor) -> None:
    parameter.grad = None
