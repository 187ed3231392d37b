"""The loaders that `benchmarks/loader_throughput.py` compares, one module for each library.

Each module has a function `open_stream(workload) -> Iterator[Batch]` (see `base`): an endless stream of batches, as
that library's users would write it. `CONTENDERS` lists them. Nothing here is imported by the package itself, and a
module is only imported in the process of its contender: the libraries bring FFmpegs of their own that do not always
bear each other.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Group = Literal["ceiling", "ours", "library", "ten-second", "ladder", "scaling"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the comparison."""

    name: str
    """As in the table, the rows and `--only`."""
    group: Group
    """What it is there for."""
    module: str
    """Module of `benchmarks.contenders` that has `open_stream`."""
    options: dict[str, Any] = field(default_factory=dict)
    """For open_stream, as Workload.options."""
    libraries: tuple[str, ...] = ()
    """Modules that must be importable, else the row says that they are not installed."""
    needs_gpu: bool = False
    """Runs with a CUDA device only."""
    needs_videos: bool = False
    """Reads the original videos."""
    content: Literal["clip", "recoded", "original", "none"] = "clip"
    """What it decodes, and so how near it must come to the reference: the shards' clips as they are, clips encoded
    once more in another format, the original videos, or nothing that could be compared."""
    does: str = ""
    """How it reads, decodes and augments, in one line."""
    quick: bool = False
    """Part of `--quick`."""
    cores: int | None = None
    """Cores it is pinned to, with as many workers; None: all of them."""


OUR_BACKENDS = ("portable", "dali-cpu-decode", "raw", "dali-gpu")

_MASKS = "torchaudio mel, frequency and time masks"

CONTENDERS: tuple[Contender, ...] = (
    Contender(
        name="decode only: SPDL threads",
        group="ceiling",
        module="decode_only",
        options={"engine": "spdl"},
        libraries=("spdl.io",),
        quick=True,
        does="spdl.io demux_video and decode_packets on clips in memory, one thread per core, no filter, "
        "nothing copied out",
    ),
    Contender(
        name="decode only: PyAV processes",
        group="ceiling",
        module="decode_only",
        options={"engine": "pyav"},
        quick=True,
        does="a container opened per clip in memory, one process per core, nothing copied out",
    ),
    Contender(
        name="decode only: ours",
        group="ceiling",
        module="decode_only",
        options={"engine": "ours"},
        quick=True,
        does="loaders.decode on clips in memory, one process per core, nothing copied out",
    ),
    *(
        Contender(
            name=f"ours: {backend}",
            group="ours",
            module="ours",
            options={"backend": backend},
            needs_gpu=backend == "dali-gpu",
            needs_videos=backend == "raw",
            content="original" if backend == "raw" else "clip",
            quick=True,
            does="loaders.build_loader: checksums, crop, flip, log-mel, time warp, masks, exact order",
        )
        for backend in OUR_BACKENDS
    ),
    Contender(
        name="spdl",
        group="library",
        module="spdl_pipeline",
        libraries=("spdl.io", "spdl.pipeline"),
        quick=True,
        does=f"PipelineBuilder: tar reading, decode threads with crop and flip filter, load_wav, {_MASKS}",
    ),
    Contender(
        name="spdl + our transforms",
        group="library",
        module="spdl_pipeline",
        options={"our_transforms": True},
        libraries=("spdl.io", "spdl.pipeline"),
        quick=True,
        does="the same pipeline with this project's draws, sparse mel filters, time warp and masks",
    ),
    Contender(
        name="webdataset + PyAV",
        group="library",
        module="webdataset_loader",
        options={"decoder": "pyav"},
        quick=True,
        does=f"DataLoader workers, one reformatter, one swscale thread, {_MASKS}",
    ),
    Contender(
        name="webdataset + PyAV to_ndarray",
        group="library",
        module="webdataset_loader",
        options={"decoder": "pyav-to-ndarray"},
        does=f"DataLoader workers, frame.to_ndarray('rgb24') of each frame, {_MASKS}",
    ),
    Contender(
        name="webdataset + torchcodec",
        group="library",
        module="webdataset_loader",
        options={"decoder": "torchcodec"},
        libraries=("torchcodec.decoders",),
        quick=True,
        does=f"DataLoader workers, VideoDecoder(approximate, 1 thread).get_frames_in_range, {_MASKS}",
    ),
    Contender(
        name="decord",
        group="library",
        module="clip_files",
        options={"decoder": "decord"},
        libraries=("decord",),
        does=f"clips as files, DataLoader workers, VideoReader(num_threads=1).get_batch, {_MASKS}",
    ),
    Contender(
        name="OpenCV",
        group="library",
        module="clip_files",
        options={"decoder": "opencv"},
        libraries=("cv2",),
        does=f"clips as files, DataLoader workers, VideoCapture(FFmpeg, 1 thread), crop before BGR to RGB, {_MASKS}",
    ),
    Contender(
        name="DALI, VP9 shards",
        group="library",
        module="dali_native",
        options={"shards": "vp9"},
        libraries=("nvidia.dali",),
        content="recoded",
        does="readers.webdataset, decoders.video on CPU, DALI spectrogram, mel and masks",
    ),
    Contender(
        name="DALI, MJPEG shards",
        group="library",
        module="dali_native",
        options={"shards": "mjpeg"},
        libraries=("nvidia.dali",),
        content="recoded",
        does="readers.webdataset, decoders.video on CPU, DALI spectrogram, mel and masks",
    ),
    Contender(
        name="torchcodec CUDA",
        group="library",
        module="torchcodec_cuda",
        libraries=("torchcodec.decoders",),
        needs_gpu=True,
        does="tars read in threads, VideoDecoder(device='cuda') in as many threads, mel and masks on the GPU",
    ),
    *(
        Contender(
            name=f"DALI mixed, {name}",
            group="library",
            module="dali_native",
            options={"shards": "h264", "device": "mixed", **threads},
            libraries=("nvidia.dali",),
            needs_gpu=True,
            does="readers.webdataset, decoders.video(device='mixed'), spectrogram, mel and masks on the GPU",
        )
        for name, threads in (("4 threads", {"threads": 4}), ("a thread per core", {}))
    ),
    Contender(
        name="10-s videos, AVID-CMA style",
        group="ten-second",
        module="ten_second",
        options={"style": "avid-cma"},
        needs_videos=True,
        content="original",
        does=f"DataLoader workers: seek, to_image of each frame, PIL resize and crop, sound resampled, {_MASKS}",
    ),
    Contender(
        name="10-s videos, GDT style",
        group="ten-second",
        module="ten_second",
        options={"style": "gdt"},
        needs_videos=True,
        content="original",
        does=f"DataLoader workers: seek with margin, to_rgb().to_ndarray() of each frame, torch resize, {_MASKS}",
    ),
    Contender(
        name="10-s videos, resize fixed",
        group="ten-second",
        module="ten_second",
        options={"style": "fixed"},
        needs_videos=True,
        content="original",
        quick=True,
        does=f"as AVID-CMA style, scaled and converted by one swscale call in one thread, {_MASKS}",
    ),
    *(
        Contender(
            name=f"ladder: {rung}",
            group="ladder",
            module="ladder",
            options={"rung": rung},
            content="none",
            quick=rung in ("read", "decode", "transforms"),
            needs_gpu=rung == "copy to device",
            does=does,
        )
        for rung, does in (
            ("synthetic batch", "one batch, handed out again and again"),
            ("read", "members read from the tars and checked, in worker processes, nothing handed over"),
            ("decode", "+ frames decoded and cut, in worker processes"),
            ("transforms", "+ flip, log-mel, time warp, masks, in worker processes"),
            (
                "workers for a GPU",
                "dali-cpu-decode's part for a GPU: YUV windows and samples, handed over",
            ),
            ("copy to device", "the portable loader, batches copied to the GPU"),
            ("step on one batch", "the training step on a synthetic batch: what it could take"),
            ("loader and step", "the portable loader with the training step behind it"),
        )
    ),
)


def scaling_contenders(num_cores: int) -> tuple[Contender, ...]:
    """The portable loader pinned to 1, 2, 4, ... and all cores, with as many workers."""
    counts = sorted({1, num_cores, *(2**power for power in range(1, 10) if 2**power < num_cores)})
    return tuple(
        Contender(
            name=f"scaling: {count} core{'s' if count > 1 else ''}",
            group="scaling",
            module="ours",
            options={"backend": "portable"},
            content="none",
            cores=count,
            does="the portable loader pinned to so many cores, as many workers",
        )
        for count in counts
    )
