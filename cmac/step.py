"""One optimization step of Eq. (8): momentum update, forward, backward, optimizer, queues. Needs torch alone."""

import dataclasses
import logging
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmac.collectives import KeyShuffle, num_ranks
from cmac.gradient_norms import GradientNorms, measure_parts, whole_norm
from cmac.model import CMAC, StepOutput
from cmac.optim import OptimizerConfig, build_momentum_update, build_optimizer, set_learning_rate

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]

LEAST_CUDNN = 91500

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStep:
    """A model with what trains it on one rank. Calling it takes one step; nothing in it waits for the device.

    Encoders compute in `precision`; weights, batch-norm statistics, attention, losses, optimizer and momentum update
    are float32. With torch.distributed it is wrapped in DistributedDataParallel.

    Args:
        model: moved to `device`.
        optimizer: what updates it, and by which library.
        device: where this rank computes.
        precision: of the encoders; fp16 scales the loss.
        channels_last: keep weights and activations channels-last.
        skip_nonfinite: a step whose loss or gradients are not finite on any rank changes nothing but the count
            `skipped_steps`; every step then waits for the device. With fp16 gradients may overflow, which loss scaling
            deals with, so there only the loss is looked at.

    Raises:
        ValueError: the options do not go together, or the machine lacks what one needs.
    """

    def __init__(
        self,
        model: CMAC,
        optimizer: OptimizerConfig,
        *,
        device: torch.device | str,
        precision: Precision = "fp32",
        channels_last: bool = True,
        skip_nonfinite: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.precision = precision
        self.compute = model.compute
        self.skip_nonfinite = skip_nonfinite
        self.skipped_steps = 0
        self._check(model)
        model = model.to(self.device)
        if model.config.batch_norm == "sync" and num_ranks() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if channels_last:
            use_channels_last(model)
        if self.compute.compile:
            from torch._functorch import config as compiler_config  # not there with torch alone

            # Measuring gradients runs a graph backward more than once, so its tensors must not be written over.
            compiler_config.donated_buffer = False
            for branch in (model.video, model.audio, model.key_video, model.key_audio):
                branch.encoder.compile(dynamic=False)
        self.model = model.train()
        self.clip_gradient_norm = optimizer.clip_gradient_norm
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.parameters, optimizer, capturable=self.compute.cuda_graph)
        self.momentum_update = build_momentum_update(
            *model.momentum_pairs(), model.config.momentum, optimizer.backend
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.forward: nn.Module = model
        if num_ranks() > 1:
            self.forward = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # queues are equal on all ranks, batch-norm statistics are each rank's own
                gradient_as_bucket_view=True,
            )
        self._graph = _StepGraph(self._run, self.device) if self.compute.cuda_graph else None
        self._said_why_not_measured = False

    def _check(self, model: CMAC) -> None:
        check_device(self.device, self.precision)
        if model.config.batch_norm == "sync" and num_ranks() > 1 and self.device.type != "cuda":
            raise ValueError("model.batch_norm is 'sync', which needs CUDA; on CPU use 'shuffle' or 'local'")
        if not self.compute.cuda_graph:
            return
        if self.device.type != "cuda" or num_ranks() > 1 or self.precision == "fp16":
            raise ValueError(
                f"compute.cuda_graph is True on {self.device.type} with {num_ranks()} rank(s) and precision "
                f"{self.precision}; it needs one CUDA device and bf16 or fp32: leave it out here"
            )
        if self.skip_nonfinite:
            raise ValueError(
                "compute.cuda_graph is True and nonfinite is 'skip', which decides on the host in each step; use "
                "nonfinite 'stop', or leave the graph out"
            )

    def __call__(
        self,
        frames: Tensor,
        log_mel: Tensor,
        video_ids: Tensor,
        valid: Tensor,
        *,
        learning_rate: float,
        shuffle_seed: int,
        second: tuple[Tensor, Tensor] | None = None,
        measure_gradients: bool = False,
    ) -> StepOutput:
        """Take one step on this rank's clips.

        Args:
            frames: (N, 3, T, H, W) on the device, uint8 or normalised.
            log_mel: (N, 1, F, S) on the device, normalised.
            video_ids: (N,) int64 on the device.
            valid: (N,) bool on the device; false rows count in nothing.
            learning_rate: of this step.
            shuffle_seed: the same on all ranks, another in each step; decides which rank computes which key.
            second: frames and log_mel of another clip of the same videos, for within-modal positives.
            measure_gradients: fill in `StepOutput.gradients`, the same on all ranks; two more backward passes where
                both losses are trained. The step is the same, bit for bit. Not with `compute.cuda_graph`, which says
                so once.

        Returns:
            Losses and figures of the step, on the device. With `compute.cuda_graph` the next step overwrites them.
        """
        set_learning_rate(self.optimizer, learning_rate)
        inputs = {"frames": frames, "log_mel": log_mel, "video_ids": video_ids, "valid": valid}
        if second is not None:
            inputs["second_frames"], inputs["second_log_mel"] = second
        shuffles = tuple(
            KeyShuffle.draw(len(frames), shuffle_seed + index, self.device)
            for index in range(self.model.num_shuffles())
        )
        if self._graph is not None:
            if measure_gradients and not self._said_why_not_measured:
                log.warning(
                    "gradient norms are not measured: compute.cuda_graph replays a step that has none"
                )
                self._said_why_not_measured = True
            return self._graph(inputs, shuffles)
        return self._run(inputs, shuffles, measure_gradients)

    def _run(
        self, inputs: dict[str, Tensor], shuffles: tuple[KeyShuffle, ...], measure_gradients: bool = False
    ) -> StepOutput:
        before = self._changed_by_forward() if self.skip_nonfinite else None
        if self.model.loss_config.contrastive:
            self.momentum_update.step()
        second = None
        if "second_frames" in inputs:
            second = inputs["second_frames"], inputs["second_log_mel"]
        with autocast(self.device, self.precision):
            output = self.forward(
                inputs["frames"], inputs["log_mel"], inputs["video_ids"], inputs["valid"], shuffles, second
            )
        parts = self._measure_parts(output) if measure_gradients else None
        self.scaler.scale(output.loss).backward()
        gradients = None if parts is None else self._gradient_norms(*parts)
        # Whoever keeps the losses is not to keep the graph behind them.
        losses = {name: getattr(output, name).detach() for name in ("loss", "contrastive", "consistency")}
        output = dataclasses.replace(output, **losses, gradients=gradients)
        if before is not None and not self._is_finite(output.loss):
            for tensor, value in before:
                tensor.copy_(value)
            self.optimizer.zero_grad(set_to_none=True)
            self.skipped_steps += 1
            return output
        if self.clip_gradient_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.enqueue(output)
        return output

    def _measure_parts(self, output: StepOutput) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(norm of the contrastive part, norm of the consistency part, cosine); None but where both are trained."""
        weight = self.model.loss_config.consistency_weight
        if not self.model.loss_config.contrastive or weight == 0:
            return None, None, None
        return measure_parts(
            output.contrastive, weight * output.consistency, self.parameters, self._loss_scale()
        )

    def _gradient_norms(
        self, contrastive: Tensor | None, consistency: Tensor | None, cosine: Tensor | None
    ) -> GradientNorms:
        """With the whole, from what backward left; a loss that is trained alone is the whole."""
        whole = whole_norm(self.parameters, self._loss_scale())
        if cosine is None:
            contrastive, consistency = (whole, None) if self.model.loss_config.contrastive else (None, whole)
        return GradientNorms(whole=whole, contrastive=contrastive, consistency=consistency, cosine=cosine)

    def _loss_scale(self) -> Tensor:
        return self.scaler.scale(torch.ones((), device=self.device))

    def _changed_by_forward(self) -> list[tuple[Tensor, Tensor]]:
        """What a step changes before its loss is known, with copies: key encoders and batch-norm statistics."""
        model = self.model
        queues = {id(buffer) for queue in (model.queue_v, model.queue_a) for buffer in queue.buffers()}
        tensors = [*model.momentum_pairs()[1], *(b for b in model.buffers() if id(b) not in queues)]
        return [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]

    def _is_finite(self, loss: Tensor) -> bool:
        """Whether all ranks may take this step; the same on all. Waits for the device."""
        finite = torch.isfinite(loss.detach())
        if self.precision != "fp16":
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            finite = finite & torch.isfinite(nn.utils.get_total_norm(gradients))
        finite = finite.int()
        if num_ranks() > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite.item())

    def state_dict(self) -> dict:
        """Model with queues and key encoders, optimizer, loss scaler."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`; learning rate, weight decay and the like stay this configuration's."""
        self.model.load_state_dict(state["model"])
        configured = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)
        if state["scaler"]:  # empty when the precision so far needed no loss scaling
            self.scaler.load_state_dict(state["scaler"])
        if self._graph is not None:
            self._graph = _StepGraph(self._run, self.device)


class _StepGraph:
    """Runs a step on copies of its inputs, a few times as it is and from then on as a CUDA graph."""

    WARMUP_STEPS = 3  # kernels are compiled and chosen, optimizer state comes to be

    def __init__(self, run: "TrainingStep._run", device: torch.device) -> None:
        self._run = run
        self._num_steps = 0
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: dict[str, Tensor], shuffles: tuple[KeyShuffle, ...]) -> StepOutput:
        self._num_steps += 1
        if self._num_steps <= self.WARMUP_STEPS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                output = self._run(inputs, shuffles)
            torch.cuda.current_stream().wait_stream(self._stream)
            return output
        tensors = [*inputs.values(), *(t for shuffle in shuffles for t in (shuffle.order, shuffle.inverse))]
        if self._graph is None:
            self._capture(inputs, shuffles, tensors)
        described, expected = (
            [(tuple(tensor.shape), tensor.dtype) for tensor in each] for each in (tensors, self._static)
        )
        if described != expected:
            raise ValueError(
                f"a batch has tensors {described}, the CUDA graph was made for {expected}; leave compute.cuda_graph "
                "out for batches that change"
            )
        for static, tensor in zip(self._static, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._output

    def _capture(
        self, inputs: dict[str, Tensor], shuffles: tuple[KeyShuffle, ...], tensors: list[Tensor]
    ) -> None:
        self._static = [tensor.clone() for tensor in tensors]
        names = list(inputs)
        static_inputs = dict(zip(names, self._static[: len(names)], strict=True))
        orders = self._static[len(names) :]
        static_shuffles = tuple(
            KeyShuffle(
                order=orders[2 * index],
                inverse=orders[2 * index + 1],
                send=shuffle.send,
                receive=shuffle.receive,
                num_sent=shuffle.num_sent,
                num_received=shuffle.num_received,
            )
            for index, shuffle in enumerate(shuffles)
        )
        graph = torch.cuda.CUDAGraph()
        # Loaders go on with their own CUDA work in other threads.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._output = self._run(static_inputs, static_shuffles)
        self._graph = graph


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """What encoders compute in `precision` under; each weight is to be used once inside."""
    return torch.autocast(
        device.type,
        dtype=_AUTOCAST[precision],
        enabled=precision != "fp32",
        cache_enabled=False,  # there is nothing to cache
    )


def check_device(device: torch.device, precision: Precision) -> None:
    """Raises ValueError for a precision that there is not, or a cuDNN that must not be relied on."""
    if precision not in _AUTOCAST:
        raise ValueError(f"precision is {precision!r}, expected {' or '.join(_AUTOCAST)}")
    if device.type == "cuda" and (torch.backends.cudnn.version() or 0) < LEAST_CUDNN:
        raise ValueError(
            f"cuDNN is {torch.backends.cudnn.version()}, expected at least {LEAST_CUDNN}: before, 3-D convolutions "
            "in bf16 were wrong or several times slower; install the torch that setup.py names"
        )


def use_channels_last(model: CMAC) -> None:
    """Store convolution weights channels-last, so that activations follow."""
    for module in (model.video, model.key_video, model.saliency_v):
        module.to(memory_format=torch.channels_last_3d)
    for module in (model.audio, model.key_audio, model.saliency_a):
        module.to(memory_format=torch.channels_last)
