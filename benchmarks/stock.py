"""What the training step is compared with where torch has no module for it: MoCo's own code. Needs torch alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmac.losses import Negatives


class ForLoopMomentumUpdate:
    """key = momentum * key + (1 - momentum) * query, parameter by parameter, as MoCo's `_momentum_update_key_encoder`
    has it. Arguments as `cmac.optim.build_momentum_update`."""

    def __init__(self, queries: Sequence[Tensor], keys: Sequence[Tensor], momentum: float) -> None:
        self._queries, self._keys, self._momentum = queries, keys, momentum

    @torch.no_grad()
    def step(self) -> None:
        """Update all keys."""
        for query, key in zip(self._queries, self._keys):
            key.data = key.data * self._momentum + query.data * (1.0 - self._momentum)


class SdpaContrastiveLoss(torch.autograd.Function):
    """Eq. (7) by torch's flash attention with the bank as keys and values: (query, key, banks, temperature) -> (B,).

    The logsumexp of attention is that of the logits, and its output, the weighted mean of the keys, is what the
    gradient needs. A bank is cut into parts that attention takes as a batch, as one head of a few hundred queries fills
    no GPU; parts, banks and the positive are merged by logsumexp. Attention masks nothing here, so ids are not looked
    at. float32 banks take the memory-efficient kernel, which has that type.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        banks: Sequence[Negatives],
        temperature: float,
    ) -> Tensor:
        attention = _attention(query.device, banks[0].keys.dtype)
        positive = (query * key).sum(dim=1) / temperature  # (B,)
        total, mean = positive, key  # logsumexp of logits so far, their softmax times the keys
        for bank in banks:
            parts = _num_parts(len(bank.keys), len(query))
            keys = bank.keys.view(parts, 1, -1, bank.keys.shape[1])  # (parts, 1, K / parts, D)
            queries = query.to(keys.dtype).expand(parts, 1, -1, -1)
            out, sums = attention(queries, keys, 1 / temperature)
            sums = sums[:, 0, : len(query)].float()  # (parts, B)
            bank_total = torch.logsumexp(sums, dim=0)  # (B,)
            weights = (sums - bank_total).exp()[..., None]  # (parts, B, 1)
            bank_mean = (out[:, 0].float() * weights).sum(dim=0)  # (B, D)
            merged = torch.logaddexp(total, bank_total)
            mean = mean * (total - merged).exp()[:, None] + bank_mean * (bank_total - merged).exp()[:, None]
            total = merged
        ctx.save_for_backward((mean - key) / temperature)
        return total - positive

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None, None


def _attention(
    device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """attention(queries, keys, scale) -> (output, logsumexp (N, 1, B or more)), values being the keys."""
    aten = torch.ops.aten
    if device.type != "cuda":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return lambda q, k, scale: flash(q, k, k, scale=scale)
    if dtype == torch.float32:
        efficient = aten._scaled_dot_product_efficient_attention
        return lambda q, k, scale: efficient(q, k, k, None, True, scale=scale)[:2]
    flash = aten._scaled_dot_product_flash_attention
    return lambda q, k, scale: flash(q, k, k, scale=scale)[:2]


def _num_parts(num_keys: int, num_queries: int) -> int:
    """Into how many equal parts to cut a bank: the largest divisor that gives about two programs of 128 queries to each
    of a large GPU's processors."""
    wanted = max(1, 264 * 128 // num_queries)
    return max(part for part in range(1, wanted + 1) if num_keys % part == 0)
