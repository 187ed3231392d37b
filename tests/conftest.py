"""Shared fixtures: where real data lies, and what a test does when hardware is missing."""

import concurrent.futures
import io
import logging
import multiprocessing
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gpu: needs a CUDA device (CMAC_REQUIRE_GPU=1 turns the skip into a failure)"
    )
    config.addinivalue_line("markers", "dali: needs nvidia-dali")
    config.addinivalue_line("markers", "slow: more than about ten seconds")
    # The networks under test are too small to share; more threads than cores make them wait for each other.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            if os.environ.get("CMAC_REQUIRE_GPU") == "1":
                pytest.fail("CMAC_REQUIRE_GPU=1 but torch sees no CUDA device")
            pytest.skip("no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """What a test printed, as text: names of files may be none, and pytest-xdist sends reports as UTF-8."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def exact_float32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU float32 means float32, not TensorFloat-32, which cuDNN takes for convolutions otherwise."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """train.main sets up the loggers of its process, which here is that of all tests."""
    loggers = [logging.getLogger(name) for name in ("cmac", "loaders", "loaders.kernels", "shards")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real media named by CMAC_DATA (default: ../shared/data beside the repository)."""
    folder = Path(os.environ.get("CMAC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CMAC_DATA to a folder of real videos")
    return folder


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Runs `function(*args, **kwargs)` in a process whose Triton kernels are interpreted on the CPU.

    A process of its own, as the variable must be set before Triton is imported. The function is a module's; arguments
    and result are what torch.load takes (tensors, numbers, strings, lists, dictionaries). What it raises is raised.
    """
    pytest.importorskip("triton")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        started = process.submit(os.getpid)
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        started.result()

        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return _loaded(process.submit(_interpret, function, _saved((args, kwargs))).result())

        yield call


def _interpret(function: Callable[..., Any], arguments: bytes) -> bytes:
    torch.set_num_threads(1)
    args, kwargs = _loaded(arguments)
    return _saved(function(*args, **kwargs))


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


class Compiled(NamedTuple):
    """What a kernel takes of a GPU."""

    shared_bytes: int
    """Shared memory per program; an sm_86 has 99 KiB, an A100 163, an H100 227."""
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Of registers, to memory: per thread, stores and loads."""


@pytest.fixture(scope="session")
def compile_for_gpu() -> Callable[..., Compiled]:
    """Compiles a Triton kernel to machine code; needs no GPU.

    call(kernel, signature, constants, architecture, num_warps=4, num_stages=3, aligned=False): signature maps the names
    of arguments to Triton's types ("*bf16", "i32", "fp32"), constants those of tl.constexpr to values; architecture is
    80, 86 or 90. aligned: all pointers are multiples of 16 bytes; else nothing is assumed of them, and the weaker code
    has to fit as well.
    """
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    def call(
        kernel: Any,
        signature: dict[str, str],
        constants: dict[str, Any],
        architecture: int,
        num_warps: int = 4,
        num_stages: int = 3,
        aligned: bool = False,
    ) -> Compiled:
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        ordered = {name: signature[name] for name in kernel.arg_names}
        pointers = [n for n, kind in enumerate(ordered.values()) if kind.startswith("*")]
        attributes = {(n,): [["tt.divisibility", 16]] for n in pointers} if aligned else {}
        source = ASTSource(kernel, ordered, constexprs=constants, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        report = _ptxas(compiled.asm["ptx"], architecture)
        return Compiled(
            compiled.metadata.shared,
            int(re.search(r"Used (\d+) registers", report)[1]),
            sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        )

    return call


def _ptxas(ptx: str, architecture: int) -> str:
    """What NVIDIA's assembler, which Triton brings, reports of a kernel."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    command = [str(ptxas), "-v", f"--gpu-name={target}", "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr
