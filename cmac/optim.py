"""The optimizer and the momentum update of the key encoders, by torch or by NVIDIA Apex.

Both backends give the same numbers up to rounding and read each other's checkpoints. Apex walks flat memory and checks
little, so what it would compute wrongly without a word is refused here: parameters that are not float32, a gradient,
momentum buffer or key that lies in memory in another order than its parameter, a learning rate inside a CUDA graph.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

Backend = Literal["auto", "torch", "apex"]
"""`torch`: its fused and foreach operations. `apex`: NVIDIA Apex's FusedSGD and multi_tensor_axpby, on CUDA. `auto`:
torch, and the log says whether a usable Apex was found.
Choice: torch. By their memory traffic both need the same time, and no measurement has Apex ahead; torch's also go
into a CUDA graph and skip a step of overflown gradients without asking the device."""

_WAY_OUT = (
    "build NVIDIA Apex from source (APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
    "git+https://github.com/NVIDIA/apex.git; `pip install apex` brings another package), "
    "or set optimizer.backend to 'torch'"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule; the defaults are section 4.1's."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with momentum (the paper) or `adamw` (small models from scratch)."""
    learning_rate: float = 0.01
    """Peak learning rate. Choice: taken literally; GDT, whose schedule the paper shares, multiplies it by the number
    of GPUs (`learning_rate_per_rank`)."""
    learning_rate_per_rank: bool = False
    """Multiply the peak by the number of ranks."""
    weight_decay: float = 1e-5
    """Applied to all parameters."""
    momentum: float = 0.9
    """Of SGD; beta_1 of AdamW."""
    warmup_epochs: float = 10.0
    """Epochs over which the learning rate grows linearly from 0 to its peak ("gradual warm-up")."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up. Choice: constant, as GDT's Kinetics-400 script has it; the paper names none."""
    clip_gradient_norm: float = 0.0
    """Scale gradients down to this norm; 0 leaves them alone."""
    backend: Backend = "auto"
    """Who computes the step and the momentum update: `torch`, or NVIDIA `apex` (`sgd` only); `auto` is torch."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(
                f"optimizer.learning_rate is {self.learning_rate}, expected a finite value above 0"
            )
        for name in ("weight_decay", "warmup_epochs", "clip_gradient_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum is {self.momentum}, expected a value from 0 to below 1")
        if self.backend not in get_args(Backend):
            raise ValueError(
                f"optimizer.backend is {self.backend!r}, expected {' or '.join(get_args(Backend))}"
            )
        if self.backend == "apex" and self.name != "sgd":
            raise ValueError(
                f"optimizer.backend is 'apex', which is for optimizer.name 'sgd', not {self.name!r}; "
                "set optimizer.backend to 'torch'"
            )


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters; weight decay on every one of them, as section 4.1 states it.

    Build it when the model has its device and memory format. Change the learning rate by `set_learning_rate`.

    SGD's momentum buffers exist from the start, as zeros, which gives what torch gives (its first buffer is the
    gradient, and 0.9 * 0 + gradient is the gradient; dampening is 0). This way a parameter whose first gradient comes
    late harms nobody: torch's fused step cannot mix present and absent buffers, and Apex would set all buffers of the
    group back to the gradients. A first step skipped for overflow, too, leaves zeros, where torch's fused step leaves
    memory that nobody wrote.

    `load_state_dict` takes the state of either backend, captured or not: buffers are laid out as the parameters are,
    what says how to compute (`fused`, the tensor of a capturable learning rate) stays this optimizer's, the rest is
    the file's.

    With torch.amp.GradScaler (fp16), torch's fused steps on CUDA skip an overflown step by themselves. Apex's has no
    such argument, so GradScaler reads `found_inf` on the host: one synchronization per step.

    Args:
        parameters: the trained ones.
        config: name, learning rate, momentum, weight decay and backend.
        capturable: the step goes into a CUDA graph: the learning rate is a float32 scalar on the parameters' device,
            which a replay reads anew. AdamW needs one step before the capture. Works without CUDA, too.

    Raises:
        ValueError: backend is `apex` and there is no usable Apex, the step shall be capturable (Apex passes the
            learning rate by value, so a replay would never change it), or a parameter is none that Apex updates.
    """
    parameters = list(parameters)
    assert parameters, "nothing to optimize"
    device = parameters[0].device
    backend = choose_backend(config.backend, device)
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if backend == "apex":
        if capturable:
            raise ValueError(
                "optimizer.backend is 'apex', whose learning rate would be frozen in a CUDA graph; "
                "set optimizer.backend to 'torch', or train without CUDA graphs"
            )
        optimizer = _apex_sgd()(parameters, momentum=config.momentum, **common)
    else:
        if capturable:
            common["lr"] = torch.tensor(config.learning_rate, dtype=torch.float32, device=device)
        common["fused"] = device.type == "cuda"
        if config.name == "sgd":
            optimizer = torch.optim.SGD(parameters, momentum=config.momentum, **common)
        else:
            betas = (config.momentum, 0.999)
            capture = capturable and device.type == "cuda"
            optimizer = torch.optim.AdamW(parameters, betas=betas, capturable=capture, **common)
    _take_any_state(optimizer, momentum=config.name == "sgd")
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set it in all groups; where it is a tensor, in place, so that a captured step sees it. No host sync."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class MomentumUpdate(Protocol):
    """What `build_momentum_update` gives."""

    def step(self) -> None:
        """key = momentum * key + (1 - momentum) * query, in place, for all pairs; no host sync, may be captured."""


def build_momentum_update(
    queries: Sequence[Tensor], keys: Sequence[Tensor], momentum: float, backend: Backend = "auto"
) -> MomentumUpdate:
    """The update that moves each key towards its query, a few launches for all of them.

    Build it when the model has its device and memory format; pass the parameters themselves, they are updated in
    place.

    Args:
        queries, keys: pairs of equal shape.
        momentum: share of the key that stays, 0 to 1.
        backend: `torch` (any dtypes, devices and layouts) or `apex` (float32, one CUDA device, equal layouts).

    Raises:
        ValueError: momentum is out of range; backend is `apex` and there is no usable Apex, or a pair of tensors that
            it would not update, or in permuted order.
    """
    assert len(queries) == len(keys) > 0, (len(queries), len(keys))
    for query, key in zip(queries, keys):
        assert query.shape == key.shape, (query.shape, key.shape)
    if not 0 <= momentum <= 1:
        raise ValueError(f"model.momentum is {momentum}, expected a value from 0 to 1")
    if choose_backend(backend, keys[0].device) == "apex":
        return _ApexMomentumUpdate(queries, keys, momentum)
    return _TorchMomentumUpdate(queries, keys, momentum)


def choose_backend(backend: Backend, device: torch.device) -> Literal["torch", "apex"]:
    """What `backend` means for tensors on this device; the choice is logged once.

    Raises:
        ValueError: backend is none, or `apex` without a usable Apex; the message says why.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"optimizer.backend is {backend!r}, expected {' or '.join(get_args(Backend))}")
    if backend == "torch":
        _log_once("optimizer and momentum update: torch")
        return "torch"
    why_not = find_apex(device)
    if backend == "apex":
        if why_not:
            raise ValueError(f"optimizer.backend is 'apex', but {why_not}; {_WAY_OUT}")
        _log_once("optimizer and momentum update: NVIDIA Apex, checked against torch")
        return "apex"
    if why_not:
        _log_once(f"optimizer and momentum update: torch (auto); no usable NVIDIA Apex: {why_not}")
    else:
        _log_once(
            "optimizer and momentum update: torch (auto); a usable NVIDIA Apex was found, "
            "optimizer.backend 'apex' chooses it"
        )
    return "torch"


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def find_apex(device: torch.device | str | None = None) -> str | None:
    """Why NVIDIA Apex cannot be used on a device (default: CUDA if there is any); None if it can.

    Looks for the package without running it (the index has another one called apex), imports it with amp_C, and
    compares two steps of FusedSGD and a multi_tensor_axpby with torch. Draws no random numbers; waits for the device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "no package apex is installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        where = spec.origin or ", ".join(map(str, folders))
        return f"the installed apex ({where}) is not NVIDIA's but a namesake, as the Python package index has one"
    try:
        importlib.import_module("amp_C")
    except Exception as error:
        return f"NVIDIA Apex was built without CUDA extensions, or for another torch: import amp_C: {error}"
    try:
        return _difference_from_torch(torch.device(device))
    except Exception as error:
        return f"NVIDIA Apex does not work on {device}: {type(error).__name__}: {error}"


@torch.no_grad()
def _difference_from_torch(device: torch.device) -> str | None:
    """How Apex's results differ from torch's, if they do; raises whatever Apex raises."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier
    from apex.optimizers import FusedSGD

    values = torch.linspace(-1, 1, 24, dtype=torch.float32, device=device)
    start = [values[:7], values.view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)]
    expected, got = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    for parameters, build in ((expected, torch.optim.SGD), (got, FusedSGD)):
        optimizer = build(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
        for step in range(2):
            for parameter in parameters:
                parameter.grad = torch.cos(3 * parameter + step)
            optimizer.step()
    for one, other in zip(expected, got):
        if not torch.allclose(one, other, rtol=1e-5, atol=1e-6):
            return f"apex.optimizers.FusedSGD differs from torch by {(one - other).abs().max().item():.1e}"
    mixed = [tensor.clone() for tensor in start]
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    multi_tensor_applier(amp_C.multi_tensor_axpby, flag, [mixed, list(got), mixed], 0.75, 0.25, -1)
    for one, other, tensor in zip(mixed, got, start):
        if not torch.allclose(one, torch.lerp(tensor, other, 0.25), rtol=1e-5, atol=1e-6):
            return "amp_C.multi_tensor_axpby differs from torch"
    return None


class _TorchMomentumUpdate:
    def __init__(self, queries: Sequence[Tensor], keys: Sequence[Tensor], momentum: float) -> None:
        groups: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
        for query, key in zip(queries, keys):
            # One odd pair would send all tensors of its call the slow way, one by one.
            kind = (key.device, key.dtype, query.dtype, _same_order(query, key))
            group = groups.setdefault(kind, ([], []))
            group[0].append(key)
            group[1].append(query)
        self._groups = list(groups.values())
        self._weight = 1 - momentum

    @torch.no_grad()
    def step(self) -> None:
        for keys, queries in self._groups:
            torch._foreach_lerp_(keys, queries, self._weight)


class _ApexMomentumUpdate:
    def __init__(self, queries: Sequence[Tensor], keys: Sequence[Tensor], momentum: float) -> None:
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier

        for index, (query, key) in enumerate(zip(queries, keys)):
            _check_tensor(f"key {index}", key, keys[0].device)
            _check_tensor(f"query {index}", query, keys[0].device)
            _check_same_order(f"key {index}", key, "query", query)
        self._lists = [list(keys), list(queries), list(keys)]  # x, y, out
        self._apply, self._axpby = multi_tensor_applier, amp_C.multi_tensor_axpby
        # Set where a value is not finite; the kernel does not look at it, and neither do we.
        self._overflow = torch.zeros(1, dtype=torch.int32, device=keys[0].device)
        # Both factors become float32. 1 - momentum rounded by itself would not be what is missing to 1, and keys would
        # settle at a multiple of the queries (1.00006 at 0.999) that is not 1.
        kept = torch.tensor(momentum, dtype=torch.float32).item()
        self._factors = (kept, 1 - kept)

    @torch.no_grad()
    def step(self) -> None:
        self._apply(self._axpby, self._overflow, self._lists, *self._factors, -1)


@functools.cache
def _apex_sgd() -> type[torch.optim.Optimizer]:
    """FusedSGD that refuses what it would compute wrongly."""
    from apex.optimizers import FusedSGD

    class ApexSGD(FusedSGD):
        def __init__(self, parameters: list[nn.Parameter], **settings: Any) -> None:
            for index, parameter in enumerate(parameters):
                _check_tensor(f"parameter {index}", parameter, parameters[0].device)
            super().__init__(parameters, **settings)

        def zero_grad(self, set_to_none: bool = True) -> None:  # FusedSGD's takes no argument
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._check()
            super().step()
            return loss

        def _check(self) -> None:
            """Each step, as gradients are new each time: dtypes and strides, on the host, 0.6 us a parameter."""
            for group in self.param_groups:
                if isinstance(group["lr"], Tensor):
                    raise ValueError("the learning rate is a tensor, expected a float with backend 'apex'")
                for index, parameter in enumerate(group["params"]):
                    gradient = parameter.grad
                    if gradient is None:
                        continue
                    buffer = self.state[parameter].get("momentum_buffer")
                    if buffer is None:  # of a group that was added
                        buffer = torch.zeros_like(parameter, requires_grad=False)
                        self.state[parameter]["momentum_buffer"] = buffer
                    strides = parameter.stride()
                    if (
                        gradient.dtype is torch.float32 is buffer.dtype
                        and gradient.stride() == strides == buffer.stride()
                    ):
                        continue
                    name = f"parameter {index}"
                    _check_tensor(f"gradient of {name}", gradient, parameter.device)
                    _check_tensor(f"momentum buffer of {name}", buffer, parameter.device)
                    _check_same_order(name, parameter, "gradient", gradient)
                    _check_same_order(name, parameter, "momentum buffer", buffer)
            if self.param_groups[0]["params"][0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "a step of backend 'apex' cannot go into a CUDA graph: its learning rate would never change; "
                    "set optimizer.backend to 'torch'"
                )

    return ApexSGD


def _take_any_state(optimizer: torch.optim.Optimizer, momentum: bool) -> None:
    """Make `optimizer.load_state_dict` take what the other backend saved, and give SGD its buffers (`momentum`)."""
    implementation = {"fused", "foreach", "capturable", "differentiable"}
    rates = [group["lr"] for group in optimizer.param_groups]  # a tensor must stay the one that was captured

    def before(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        groups = []
        for saved, own in zip(state_dict["param_groups"], optimizer.param_groups):
            taken = {name: value for name, value in saved.items() if name in own}
            kept = {name: value for name, value in own.items() if name in implementation or name not in saved}
            groups.append({**taken, **kept})
        groups += state_dict["param_groups"][len(groups) :]  # too many: torch says so
        return {**state_dict, "param_groups": groups}

    def after(optimizer: torch.optim.Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            loaded = float(group["lr"])
            group["lr"] = rate.fill_(loaded) if isinstance(rate, Tensor) else loaded
            for index, parameter in enumerate(group["params"]):
                state = optimizer.state[parameter] if momentum else optimizer.state.get(parameter, {})
                if momentum and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
                for name, value in state.items():
                    if name == "step":  # of AdamW: a scalar
                        continue
                    if value.shape != parameter.shape:
                        raise ValueError(
                            f"{name} of parameter {index} has shape {tuple(value.shape)} in the state to load, "
                            f"expected {tuple(parameter.shape)}: it is another model's"
                        )
                    if value.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)

    after = torch.no_grad()(after)
    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    after(optimizer)


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Whether element i in memory of one is element i in memory of the other; strides of size-1 axes do not count."""
    return one.shape == other.shape and all(
        size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride())
    )


def _check_tensor(name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse what Apex skips without a word (dtypes, tensors without elements) or with a message that names nothing."""
    shape = tuple(tensor.shape)
    if tensor.dtype != torch.float32:
        raise ValueError(
            f"{name} of shape {shape} is {tensor.dtype}, expected torch.float32 with backend 'apex', which leaves "
            "others as they are; keep float32 weights under autocast, or set optimizer.backend to 'torch'"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} as the first, with backend 'apex'")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = tensor.is_contiguous() or (
        tensor.ndim in formats and tensor.is_contiguous(memory_format=formats[tensor.ndim])
    )
    if tensor.numel() == 0 or not dense:
        raise ValueError(
            f"{name} has shape {shape} and strides {tensor.stride()}, expected elements, contiguous or channels-last, "
            "with backend 'apex'; set optimizer.backend to 'torch'"
        )


def _check_same_order(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if not _same_order(tensor, other):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}, its {other_name} has shape "
            f"{tuple(other.shape)} and strides {other.stride()}, expected equal ones: backend 'apex' would mix up "
            "elements; choose the memory format before optimizer and momentum update are built, or set "
            "optimizer.backend to 'torch'"
        )
