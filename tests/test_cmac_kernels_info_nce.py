"""Eq. (7) as a kernel, against the reference in float64: under Triton's interpreter, on a GPU, and for GPUs."""

import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmac.losses import Negatives, contrastive_loss, contrastive_loss_reference
from cmac.queue import EMPTY, KeyQueue

TEMPERATURE = 0.07


class Tolerance(NamedTuple):
    """Absolute."""

    loss: float
    """Losses are about 5."""
    gradient: float
    """Of the length of the difference; gradients are up to 28 long."""


# bfloat16 rounds by up to 2 ** -8 of a number. Banks are compared as they are stored, so it is queries and weights that
# count. Tensor cores drop what does not fit when they add, which the interpreter does not: it comes to 2e-6.
TOLERANCES = {"float32": Tolerance(3e-5, 2e-4), "bfloat16": Tolerance(3e-2, 3e-1)}
DTYPES = ["float32", "bfloat16"]


class Case(NamedTuple):
    num_queries: int
    num_keys: tuple[int, ...]
    dim: int


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def draw(case: Case, dtype: str, seed: int = 0) -> dict[str, Any]:
    """Arguments: some keys near a query, some of its video, some slots empty and full of what is no number."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (unit(generator, case.num_queries, case.dim) for _ in range(2))
    key = F.normalize(key + query, dim=1)
    video_ids = torch.randint(0, 7, (case.num_queries,), generator=generator)
    video_ids += (video_ids % 2) << 40  # ids that differ above 32 bits
    negatives = []
    for count in case.num_keys:
        keys = unit(generator, count, case.dim)
        near = torch.randint(case.num_queries, (count // 3,), generator=generator)
        keys[: count // 3] = F.normalize(keys[: count // 3] + query[near], dim=1)
        order = torch.randperm(count, generator=generator)
        ids = torch.randint(EMPTY, 7, (count,), generator=generator)
        ids += (torch.rand(count, generator=generator) < 0.5) * (ids >= 0) * (1 << 40)
        keys = keys[order].to(getattr(torch, dtype))
        keys[ids == EMPTY] = torch.tensor([float("nan"), float("inf")], dtype=keys.dtype).repeat(case.dim)[
            : case.dim
        ]
        negatives.append((keys, ids))
    grad = torch.randn(case.num_queries, generator=generator)
    return {"query": query, "key": key, "video_ids": video_ids, "negatives": negatives, "grad": grad}


class Result(NamedTuple):
    loss: Tensor
    correct: Tensor
    gradient: Tensor


def run(
    query: Tensor,
    key: Tensor,
    video_ids: Tensor,
    negatives: list[tuple[Tensor, Tensor]],
    grad: Tensor,
    impl: str = "fused",
    temperature: float = TEMPERATURE,
    architecture: int = 0,
) -> list[Tensor]:
    """[loss, correct, gradient of the query]; with an architecture in the tiling of that one."""
    leaf = query.detach().clone().requires_grad_()
    banks = [Negatives(keys, ids) for keys, ids in negatives]
    with pytest.MonkeyPatch.context() as patch:
        if architecture:
            patch.setattr("cmac.kernels.info_nce_triton._describe", lambda device: (architecture, 2))
        loss, correct = contrastive_loss(leaf, key, video_ids, banks, temperature, impl)
    loss.backward(grad.to(loss.dtype))
    assert not correct.requires_grad and leaf.grad.dtype == query.dtype
    return [loss.detach(), correct, leaf.grad]


def expected(arguments: dict[str, Any], **options: Any) -> Result:
    exact = {**arguments, "query": arguments["query"].double(), "key": arguments["key"].double()}
    return Result(*run(**exact, impl="reference", **options))


Fused = Callable[..., Result]


@pytest.fixture
def interpreted(interpreter: Callable) -> Fused:
    """The kernel under Triton's interpreter."""

    def fused(arguments: dict[str, Any], **options: Any) -> Result:
        return Result(*interpreter(run, **arguments, **options))

    return fused


@pytest.fixture
def on_gpu() -> Fused:
    """The kernel on the GPU, its result on the CPU."""

    def fused(arguments: dict[str, Any], **options: Any) -> Result:
        there = {name: value.cuda() for name, value in arguments.items() if name != "negatives"}
        there["negatives"] = [(keys.cuda(), ids.cuda()) for keys, ids in arguments["negatives"]]
        return Result(*(tensor.cpu() for tensor in run(**there, **options)))

    return fused


def check(fused: Fused, case: Case, dtype: str, **options: Any) -> None:
    arguments = draw(case, dtype)
    assert_close(fused(arguments, **options), arguments, TOLERANCES[dtype])


def margin(query: Tensor, key: Tensor, video_ids: Tensor, negatives: list, grad: Tensor) -> Tensor:
    """(B,) float64: by how much the logit of the positive exceeds all others."""
    keys, ids = (torch.cat(parts) for parts in zip(*negatives))
    excluded = (ids == EMPTY) | (ids == video_ids[:, None])
    keys = keys.double().masked_fill((ids == EMPTY)[:, None], 0)
    others = (query.double() @ keys.T).masked_fill(excluded, float("-inf"))
    return ((query.double() * key.double()).sum(1) - others.amax(1)) / TEMPERATURE


def assert_close(got: Result, arguments: dict[str, Any], tolerance: Tolerance) -> None:
    exact, clear = expected(arguments), margin(**arguments).abs() > tolerance.loss
    assert got.loss.dtype == torch.float32 and got.correct.dtype == torch.bool
    loss_error = (got.loss - exact.loss).abs().max().item()
    gradient_error = (got.gradient.double() - exact.gradient.double()).norm(dim=1).max().item()
    print(f"error of loss {loss_error:.1e}, of gradient {gradient_error:.1e}")
    assert loss_error <= tolerance.loss and gradient_error <= tolerance.gradient
    assert torch.equal(got.correct[clear], exact.correct[clear])


CASES = [
    Case(1, (1,), 1),
    Case(1, (1, 1), 16),
    Case(3, (37,), 12),
    Case(7, (150, 61), 45),
    Case(31, (101, 257), 64),
    Case(17, (5, 331), 256),
    Case(67, (193, 129), 100),
    Case(33, (64, 96), 128),
]


# Under the interpreter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_equals_the_reference_at_all_sizes(interpreted, case, dtype):
    check(interpreted, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [13, 29, 61, 131])
def test_interpreted_kernel_equals_the_reference_in_the_tilings_of_a_large_gpu(
    interpreted, num_queries, dtype
):
    check(interpreted, Case(num_queries, (157, 90), 24), dtype, architecture=90)


def check_half_precision_queries(fused: Fused) -> None:
    arguments = draw(Case(9, (70, 33), 32), "float32")
    arguments["query"], arguments["key"] = (arguments[name].to(torch.bfloat16) for name in ("query", "key"))
    tolerance = Tolerance(1e-5, 28 * 2**-8)  # the gradient itself is rounded to bfloat16
    assert_close(fused(arguments), arguments, tolerance)


def check_nothing_to_compare(fused: Fused) -> None:
    """Every slot is empty, or of the queries' own video."""
    arguments = draw(Case(5, (40, 21), 16), "bfloat16")
    arguments["video_ids"][:] = 3
    for _, ids in arguments["negatives"]:
        ids[:] = EMPTY
    (keys, ids), _ = arguments["negatives"]
    ids[7], keys[7] = 3, 0.25
    got = fused(arguments)
    assert torch.equal(got.loss, torch.zeros(5)) and got.correct.all()
    assert torch.equal(got.gradient, torch.zeros(5, 16))


def check_low_temperature(fused: Fused) -> None:
    """Logits to 1,000 and beyond: no overflow, and a positive that loses by far."""
    arguments = draw(Case(11, (90, 33), 20), "float32")
    arguments["key"][0] = -arguments["query"][0]
    exact = expected(arguments, temperature=0.001)
    got = fused(arguments, temperature=0.001)
    assert exact.loss[0] > 1000
    # An error of 1e-6 in a similarity is 1e-3 in a logit, and 1e-3 of the gradient.
    torch.testing.assert_close(got.loss.double(), exact.loss, atol=1e-3, rtol=0)
    torch.testing.assert_close(got.gradient.double(), exact.gradient, atol=2.0, rtol=0)
    assert exact.gradient.abs().max() > 500


def check_broken_query(fused: Fused) -> None:
    """A query that is no number spoils its own row, and no other."""
    arguments = draw(Case(6, (50,), 16), "float32")
    clean = fused(arguments)
    arguments["query"][2, 5] = float("nan")
    got = fused(arguments)
    others = [0, 1, 3, 4, 5]
    assert got.loss[2].isnan() and got.gradient[2].isnan().all() and not got.correct[2]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, clean))


def check_layout(fused: Fused) -> None:
    """Rows with gaps, and tensors that start anywhere."""
    arguments = draw(Case(6, (50, 20), 9), "bfloat16")
    for name in ("query", "key"):
        arguments[name] = torch.stack([arguments[name]] * 2, 2)[..., 0]
    (keys, ids), other = arguments["negatives"]
    keys = torch.cat([keys[:1], keys])[1:]
    arguments["negatives"] = [(keys, torch.cat([ids[:1], ids])[1:]), other]
    assert keys.data_ptr() % 16 and not arguments["query"].is_contiguous()
    assert_close(fused(arguments), arguments, TOLERANCES["bfloat16"])


def test_interpreted_kernel_takes_queries_in_half_precision(interpreted):
    check_half_precision_queries(interpreted)


def test_interpreted_kernel_gives_zero_where_there_is_nothing_to_compare_with(interpreted):
    check_nothing_to_compare(interpreted)


def test_interpreted_kernel_stands_low_temperatures(interpreted):
    check_low_temperature(interpreted)


def test_interpreted_kernel_keeps_a_broken_query_to_its_row(interpreted):
    check_broken_query(interpreted)


def laid_out(device: str) -> None:
    """In one process: a tensor that is sent loses its layout."""
    check_layout(lambda arguments: Result(*(t.cpu() for t in run(**_to(arguments, device)))))


def _to(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    if device == "cpu":
        return arguments
    negatives = [(keys.cuda(), ids.cuda()) for keys, ids in arguments["negatives"]]
    tensors = {name: value.cuda() for name, value in arguments.items() if name != "negatives"}
    return {**tensors, "negatives": negatives}


def test_interpreted_kernel_takes_any_layout(interpreter):
    interpreter(laid_out, "cpu")


def trajectory(impl: str, steps: int, device: str, dtype: str) -> list[float]:
    """Losses of a linear encoder that learns what of its input to ignore, with a queue of its own."""
    generator = torch.Generator().manual_seed(0)
    things = torch.randn(60, 6, generator=generator)
    encoder = nn.Linear(12, 16)
    with torch.no_grad():
        encoder.weight.copy_(torch.randn(16, 12, generator=generator) / 4)
        encoder.bias.zero_()
    encoder.to(device)
    queue = KeyQueue(50, 16, getattr(torch, dtype)).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        ids = torch.randint(60, (8,), generator=generator)
        noise = 2 * torch.randn(2, 8, 6, generator=generator)
        views = [torch.cat([things[ids], part], 1) for part in noise]
        query, key = (F.normalize(encoder(view.to(device)), dim=1) for view in views)
        ids = ids.to(device)
        bank = Negatives(queue.keys, queue.video_ids)
        loss = contrastive_loss(query, key.detach(), ids, [bank], 0.2, impl).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.enqueue(key.detach(), ids)
        losses.append(loss.item())
    return losses


def check_trajectory(fused: Callable[..., list[float]], device: str, dtype: str, tolerance: float) -> None:
    ours = torch.tensor(fused("fused", 200, device, dtype))
    theirs = torch.tensor(trajectory("reference", 200, "cpu", dtype))
    assert ours[0] == 0 and theirs[-20:].mean() < theirs[10:30].mean() - 0.5  # it learns
    print(
        f"losses {theirs[10:30].mean():.2f} -> {theirs[-20:].mean():.2f}, apart {(ours - theirs).abs().max():.1e}"
    )
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_interpreted_kernel_trains_as_the_reference_does_for_200_steps(interpreter):
    check_trajectory(lambda *args: interpreter(trajectory, *args), "cpu", "float32", 1e-3)


# The choice


def test_without_rows_there_is_nothing_to_launch(interpreted):
    got = interpreted(_no_rows())
    assert got.loss.shape == got.correct.shape == (0,) and got.gradient.shape == (0, 8)


def _no_rows() -> dict[str, Any]:
    arguments = draw(Case(2, (5,), 8), "float32")
    return {name: value if name == "negatives" else value[:0] for name, value in arguments.items()}


def test_fused_on_the_cpu_says_what_is_missing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl is 'fused', but tensors are on cpu and TRITON_INTERPRET=1"):
        run(**draw(Case(2, (5,), 8), "float32"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 257}, "embeddings have 257 dimensions; expected model.embedding_dim at most 256"),
        ({"query": torch.float64}, "query is torch.float64; expected at most float32"),
        ({"banks": (torch.float16,)}, "banks of negatives are torch.float16; expected all torch.float32 or"),
        (
            {"banks": (torch.float32, torch.bfloat16)},
            "banks of negatives are torch.bfloat16 and torch.float32; expected all",
        ),
    ],
)
def test_what_the_kernel_lacks_auto_leaves_to_the_reference_and_fused_refuses(change, message, caplog):
    dim, dtypes = change.get("dim", 8), change.get("banks", (torch.float32,))
    arguments = draw(Case(3, (5,) * len(dtypes), dim), "float32")
    arguments["query"] = arguments["query"].to(change.get("query", torch.float32))
    banks = [Negatives(keys.to(dtype), ids) for (keys, ids), dtype in zip(arguments["negatives"], dtypes)]
    arguments = [arguments["query"], arguments["key"], arguments["video_ids"], banks, TEMPERATURE]
    with pytest.raises(ValueError, match=f"impl is 'fused', but {re.escape(message)}.*impl 'auto'"):
        contrastive_loss(*arguments, "fused")
    with caplog.at_level(logging.WARNING, "cmac.losses"):
        for _ in range(2):
            got = contrastive_loss(*arguments)
    assert torch.equal(got.loss, contrastive_loss_reference(*arguments).loss)
    assert [message in record.getMessage() for record in caplog.records] == [True]


def test_shares_end_together_and_fit_in_memory():
    pytest.importorskip("triton")
    from cmac.kernels.info_nce_triton import choose_share

    def programs(tiles: tuple[int, ...], row_blocks: int, each: int) -> int:
        return row_blocks * sum(-(-bank // each) for bank in tiles)

    # The paper's queues at 2 x 128 queries, and 2 x 1,024 on long ones: one round of programs, most of the GPU busy.
    for tiles, row_blocks, max_shares in (((235, 235), 2, 80), ((1024, 1024), 16, 10)):
        each = choose_share(tiles, row_blocks, 132, max_shares)
        assert 0.9 * 132 <= programs(tiles, row_blocks, each) <= 132
    assert choose_share((7, 1), 1000, 132, 1) == 7  # memory for no more than one share of each bank
    assert choose_share((1,), 1, 132, 1000) == 1
    each = choose_share((2048, 2048), 1, 132, 10)
    assert programs((2048, 2048), 1, each) <= 10


# For GPUs, without one

SPILLED = {("bf16", 64): 32, ("fp32", 32): 16, ("fp32", 64): 64, ("fp32", 128): 120}
"""Bytes per thread, stores and loads, by dtype and rows; 0 where it is not named."""
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""What a program may have."""


@pytest.mark.parametrize("architecture", [80, 86, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("num_queries", [16, 32, 64, 256])
def test_sweep_fits_gpus_at_the_papers_256_dimensions(compile_for_gpu, architecture, dtype, num_queries):
    """With pointers to multiples of 16 bytes, which `_readable` ensures."""
    from cmac.kernels.info_nce_triton import _sweep, choose_tiling

    tiling = choose_tiling(num_queries, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], architecture)
    signature = {
        **dict.fromkeys(("query", "maxima", "sums", "weighted"), "*fp32"),
        **dict.fromkeys(("video_ids", "ids_0", "ids_1"), "*i64"),
        **dict.fromkeys(("keys_0", "keys_1"), f"*{dtype}"),
        **dict.fromkeys(("num_queries", "num_keys_0", "num_keys_1", "num_shares_0", "num_shares"), "i32"),
        "scale": "fp32",
    }
    constants = {
        "DIM": 256, "PADDED_DIM": 256, "ROWS": tiling.rows, "KEYS": tiling.keys, "TILES": 8,
        "SPLIT": dtype == "fp32", "INTERPRETED": False,
    }  # fmt: skip
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    compiled = compile_for_gpu(_sweep, signature, constants, architecture, **options, aligned=True)
    assert compiled.shared_bytes <= SHARED[architecture]
    assert compiled.spilled_bytes <= SPILLED.get((dtype, tiling.rows), 0)


@pytest.mark.parametrize("architecture", [80, 86, 90])
@pytest.mark.parametrize("shares", [16, 64, 256])
def test_combine_fits_gpus(compile_for_gpu, architecture, shares):
    from cmac.kernels.info_nce_triton import _combine

    signature = {
        **dict.fromkeys(("query", "key", "maxima", "sums", "weighted", "loss", "gradient"), "*fp32"),
        "correct": "*i1",
        "num_shares": "i32",
        **dict.fromkeys(("scale", "inverse_temperature"), "fp32"),
    }
    constants = {"DIM": 256, "PADDED_DIM": 256, "COLUMNS": 64, "SHARES": shares}
    compiled = compile_for_gpu(_combine, signature, constants, architecture)
    assert compiled.spilled_bytes == 0 and compiled.shared_bytes <= 16 * 1024


# On a GPU

GPU_CASES = [*CASES, Case(256, (15_000, 15_000), 256), Case(300, (4097,), 256), Case(2048, (3001, 7), 256)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernel_equals_the_reference_at_all_sizes(on_gpu, case, dtype):
    check(on_gpu, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [13, 29, 61, 131])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_the_reference_in_all_tilings(on_gpu, num_queries, dtype):
    check(on_gpu, Case(num_queries, (157, 90), 24), dtype)


@pytest.mark.gpu
def test_kernel_takes_queries_in_half_precision(on_gpu):
    check_half_precision_queries(on_gpu)


@pytest.mark.gpu
def test_kernel_gives_zero_where_there_is_nothing_to_compare_with(on_gpu):
    check_nothing_to_compare(on_gpu)


@pytest.mark.gpu
def test_kernel_stands_low_temperatures(on_gpu):
    check_low_temperature(on_gpu)


@pytest.mark.gpu
def test_kernel_keeps_a_broken_query_to_its_row(on_gpu):
    check_broken_query(on_gpu)


@pytest.mark.gpu
def test_kernel_takes_any_layout():
    laid_out("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_kernel_trains_as_the_reference_does_for_200_steps(dtype, tolerance):
    check_trajectory(trajectory, "cuda", dtype, tolerance)


@pytest.mark.gpu
def test_auto_on_the_gpu_is_the_kernel(on_gpu):
    arguments = draw(Case(9, (50, 30), 32), "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(on_gpu(arguments, impl="auto"), on_gpu(arguments)))


@pytest.mark.gpu
def test_kernel_reaches_beyond_2_to_the_31_numbers():
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("less than 8 GB of free GPU memory")
    count = 2**31 // 256 + 1000
    keys = torch.zeros(count, 256, dtype=torch.bfloat16, device="cuda")
    ids = torch.full((count,), EMPTY, device="cuda")
    keys[-1, 3], ids[-1] = 1, 5
    query = F.one_hot(torch.tensor([3, 4]), 256).float().cuda()
    own = torch.tensor([1, 2]).cuda()
    got = contrastive_loss(query, query.flip(0), own, [Negatives(keys, ids)], 1.0, "fused").loss
    torch.testing.assert_close(got.cpu(), torch.tensor([1 + torch.e, 2.0]).log())


@pytest.mark.gpu
def test_kernel_stores_no_matrix_of_similarities():
    queue = F.normalize(torch.randn(65_536, 256, device="cuda"), dim=1).to(torch.bfloat16)
    bank = Negatives(queue, torch.arange(len(queue), device="cuda"))
    query = F.normalize(torch.randn(2048, 256, device="cuda"), dim=1).requires_grad_()
    ids = torch.arange(2048, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contrastive_loss(query, query.detach(), ids, [bank, bank], 0.07).loss.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20  # one matrix would be 512 MiB


@pytest.mark.gpu
def test_kernel_is_captured_in_a_graph():
    arguments = _to(draw(Case(32, (100, 90), 64), "bfloat16"), "cuda")
    expected_result = run(**arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(**arguments)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(result, expected_result))
