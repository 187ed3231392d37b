"""The last step of frames: the reference by hand and against the CPU route, the kernel against the reference."""

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from loaders.augment import COLOR_OPERATIONS, ClipAugmentation, draw_augmentation, yuv_window_size
from loaders.config import AudioConfig, VideoConfig
from loaders.decode import decode_frames
from loaders.kernels.frames import finish_frames
from loaders.video_ops import (
    NUM_PARAMETERS,
    color_jitter,
    crop_frames,
    finish_frames_reference,
    flip_frames,
    frame_parameters,
    mean_grey,
    normalize_frames,
    yuv_windows_to_rgb,
)

MEAN, STD = 0.45, 0.225
ORDERS = [order for count in range(4) for order in itertools.permutations(COLOR_OPERATIONS, count)]
LARGEST_SHARE = 1 / 5000
"""Of values that may be one level apart: those that lie within float32 rounding of a half."""


def augmentation(top: int = 0, left: int = 0, crop_size: int = 8, **fields: object) -> ClipAugmentation:
    return ClipAugmentation(
        scaled_height=144, scaled_width=192, crop_top=top, crop_left=left, crop_size=crop_size, **fields
    )


# Exact in float32, and no multiple of them is a half: halves are rounded either way.
FACTORS = {
    "brightness": float(np.float32(1.37)),
    "contrast": float(np.float32(0.69)),
    "saturation": float(np.float32(1.31)),
}


def jittered(order: tuple[str, ...], **fields: object) -> ClipAugmentation:
    return augmentation(color_order=order, **FACTORS, **fields)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def yuv_noise(num_clips: int, num_frames: int, crop_size: int, seed: int = 0) -> torch.Tensor:
    window = yuv_window_size(crop_size)
    return noise(num_clips, num_frames, window * window * 3 // 2, seed=seed)


def rgb_of_pixel(y: int, u: int, v: int) -> list[float]:
    """R, G and B before rounding, from the definition of BT.601."""
    luma, cb, cr = (y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
    return [luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb]


def finished_by_hand(window: np.ndarray, clip: ClipAugmentation) -> np.ndarray:
    """float64 (H, W, 3), not rounded: one frame, pixel by pixel."""
    size, side = clip.crop_size, yuv_window_size(clip.crop_size)
    half = side // 2
    y = window[: side * side].reshape(side, side)
    u = window[side * side : side * side + half * half].reshape(half, half)
    v = window[side * side + half * half :].reshape(half, half)
    frame = np.zeros((size, size, 3))
    for row, column in itertools.product(range(size), range(size)):
        from_row = row + clip.crop_top % 2
        from_column = (size - 1 - column if clip.flip else column) + clip.crop_left % 2
        pixel = rgb_of_pixel(
            int(y[from_row, from_column]),
            int(u[from_row // 2, from_column // 2]),
            int(v[from_row // 2, from_column // 2]),
        )
        frame[row, column] = np.clip(np.rint(pixel), 0, 255)
    for name in clip.color_order:
        factor = getattr(clip, name)
        grey = frame @ (0.299, 0.587, 0.114)
        other = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey[..., None]}[name]
        frame = np.clip(factor * frame + (1 - factor) * other, 0, 255)
    return frame


def assert_rounded(result: np.ndarray, exact: np.ndarray) -> None:
    """result is exact rounded, either way where exact is a half."""
    assert np.abs(result - exact).max() <= 0.5 + 1e-4


def reference(pixels: torch.Tensor, clips: list, crop_size: int, **options: object) -> torch.Tensor:
    return finish_frames_reference(
        pixels, frame_parameters(clips), crop_size, **{"mean": MEAN, "std": STD, **options}
    )


# The parameters


def test_parameters_hold_offsets_flip_colors_in_order_and_validity():
    clip = augmentation(
        3, 6, flip=True, color_order=("contrast", "brightness"), contrast=0.75, brightness=1.25
    )
    parameters = frame_parameters([clip, None, augmentation(2, 7)])
    assert parameters.shape == (3, NUM_PARAMETERS) and parameters.dtype == torch.float32
    assert parameters[0].tolist() == [1, 0, 1, 2, 1, 0, 0.75, 1.25, 1, 1]
    assert parameters[1].tolist() == [0] * NUM_PARAMETERS
    assert parameters[2].tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert frame_parameters([]).shape == (0, NUM_PARAMETERS)


# The reference


@pytest.mark.parametrize(("crop_size", "expected"), [(1, 2), (2, 4), (13, 14), (112, 114), (128, 130)])
def test_window_holds_a_crop_at_either_offset(crop_size, expected):
    assert yuv_window_size(crop_size) == expected >= crop_size + 1


def test_yuv_primaries_are_rgb_primaries():
    pixels = [(16, 128, 128), (235, 128, 128), (81, 90, 240), (145, 54, 34), (41, 240, 110)]
    expected = [(0, 0, 0), (255, 255, 255), (254, 0, 0), (0, 255, 1), (0, 0, 255)]  # of BT.601
    for (y, u, v), rgb in zip(pixels, expected):
        yuv = torch.tensor([y] * 4 + [u, v], dtype=torch.uint8)
        assert (yuv_windows_to_rgb(yuv) == torch.tensor(rgb, dtype=torch.uint8)).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_reference_equals_the_definition_at_both_offsets_and_flipped(top, left, flip):
    for crop_size in (1, 7, 8):
        clip = augmentation(top, left, crop_size, flip=flip)
        pixels = yuv_noise(1, 2, crop_size)
        result = reference(pixels, [clip], crop_size)
        assert result.shape == (1, 3, 2, crop_size, crop_size) and result.dtype == torch.uint8
        assert result.permute(0, 2, 3, 4, 1).is_contiguous()
        for step in range(2):
            exact = finished_by_hand(pixels[0, step].numpy(), clip)
            assert_rounded(result[0, :, step].permute(1, 2, 0).numpy(), exact)


@pytest.mark.parametrize("order", ORDERS)
def test_reference_changes_colors_as_defined_in_any_order(order):
    clip = jittered(order, left=1, flip=True)
    pixels = yuv_noise(1, 2, 8, seed=1)
    result = reference(pixels, [clip], 8)
    for step in range(2):
        exact = finished_by_hand(pixels[0, step].numpy(), clip)
        assert_rounded(result[0, :, step].permute(1, 2, 0).numpy(), exact)


@pytest.mark.parametrize("order", ORDERS)
def test_reference_on_rgb_equals_flip_and_color_jitter(order):
    frames = noise(1, 3, 13, 13, 3)
    clip = jittered(order, top=3, left=5, crop_size=13, flip=True)  # offsets are not for RGB
    expected = color_jitter(flip_frames(frames[0]), order, **FACTORS)
    assert torch.equal(reference(frames, [clip], 13)[0].permute(1, 2, 3, 0), expected)


def test_reference_on_yuv_equals_crop_flip_and_color_jitter_of_its_rgb():
    pixels = yuv_noise(1, 2, 20)
    clip = jittered(("saturation", "contrast", "brightness"), top=1, crop_size=20, flip=True)
    frames = flip_frames(crop_frames(yuv_windows_to_rgb(pixels[0]), 1, 0, 20))
    expected = color_jitter(frames, clip.color_order, **FACTORS)
    assert torch.equal(reference(pixels, [clip], 20)[0].permute(1, 2, 3, 0), expected)


def test_what_lies_outside_the_crop_does_not_matter():
    """Rows and columns beyond the frame hold anything."""
    pixels = yuv_noise(1, 1, 8)
    other = pixels.clone()
    other[..., :100].view(10, 10)[8:] = 7
    other[..., :100].view(10, 10)[:, 8:] = 9
    for plane in (other[..., 100:125], other[..., 125:]):
        plane.view(5, 5)[4:] = 7
        plane.view(5, 5)[:, 4:] = 9
    clip = [jittered(("contrast",))]
    assert torch.equal(reference(pixels, clip, 8), reference(other, clip, 8))


@pytest.mark.parametrize("mean", [0.45, (0.43, 0.39, 0.37)])
def test_invalid_rows_are_mean_grey_and_leave_the_others_alone(mean):
    pixels = yuv_noise(3, 2, 8)
    clips = [jittered(ORDERS[-1]), None, augmentation(1, 1)]
    result = reference(pixels, clips, 8, mean=mean)
    assert torch.equal(result[::2], reference(pixels[::2], clips[::2], 8, mean=mean))
    expected = torch.tensor(mean_grey(mean), dtype=torch.uint8).view(3, 1, 1, 1)
    assert (result[1] == expected).all()
    assert mean_grey(0.45) == (115, 115, 115) and mean_grey((0.43, 0.39, 0.37)) == (110, 99, 94)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_other_dtypes_is_the_normalized_pixels(dtype):
    pixels, clips = yuv_noise(2, 1, 8), [jittered(ORDERS[-1]), None]
    result = reference(pixels, clips, 8, dtype=dtype)
    assert torch.equal(result, normalize_frames(reference(pixels, clips, 8), MEAN, STD, dtype))
    assert result.permute(0, 2, 3, 4, 1).is_contiguous()


# The choice


def test_auto_on_the_cpu_is_the_reference():
    pixels, parameters = yuv_noise(1, 1, 8), frame_parameters([jittered(ORDERS[-1])])
    result = finish_frames(pixels, parameters, 8, mean=MEAN, std=STD)
    assert torch.equal(result, finish_frames_reference(pixels, parameters, 8, mean=MEAN, std=STD))


def test_fused_on_the_cpu_says_what_is_missing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl is 'fused', but tensors are on cpu and TRITON_INTERPRET=1"):
        finish_frames(yuv_noise(1, 1, 8), frame_parameters([None]), 8, mean=MEAN, std=STD, impl="fused")


def test_without_triton_the_package_imports_and_fused_says_so():
    code = """
import importlib.abc, sys
class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, NoTriton())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import torch
from loaders.kernels.frames import finish_frames
pixels, parameters = torch.zeros(1, 1, 96, dtype=torch.uint8)[..., :6], torch.zeros(1, 10)
assert finish_frames(pixels, parameters, 1, mean=0.45, std=0.225).flatten().tolist() == [115] * 3
try:
    finish_frames(pixels, parameters, 1, mean=0.45, std=0.225, impl="fused")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Triton is not installed" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl is 'cuda', expected auto or reference or fused"),
        ({"dtype": torch.float64}, "dtype is torch.float64, expected one of torch.uint8"),
        ({"crop_size": 10}, r"pixels are torch.uint8 \(1, 1, 150\), expected torch.uint8 \(N, T, 216\)"),
        ({"parameters": torch.zeros(2, NUM_PARAMETERS)}, r"parameters are torch.float32 \(2, 10\), expected"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {"pixels": yuv_noise(1, 1, 8), "parameters": frame_parameters([None]), "crop_size": 8}
    with pytest.raises(ValueError, match=message):
        finish_frames(**{**arguments, "mean": MEAN, "std": STD, **change})


# The kernel

Finish = Callable[..., torch.Tensor]


def fused(**arguments: object) -> torch.Tensor:
    return finish_frames(**arguments, impl="fused")


@pytest.fixture
def interpreted(interpreter: Callable) -> Finish:
    """The kernel under Triton's interpreter."""

    def finish(pixels: torch.Tensor, parameters: torch.Tensor, crop_size: int, **options: object):
        return interpreter(fused, pixels=pixels, parameters=parameters, crop_size=crop_size, **options)

    return finish


@pytest.fixture
def on_gpu() -> Finish:
    """The kernel on the GPU, its result on the CPU."""

    def finish(pixels: torch.Tensor, parameters: torch.Tensor, crop_size: int, **options: object):
        result = finish_frames(pixels.cuda(), parameters.cuda(), crop_size, **options, impl="fused")
        assert result.is_cuda
        return result.cpu()

    return finish


def assert_same_pixels(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype == torch.uint8
    assert result.shape == expected.shape and result.stride() == expected.stride()
    apart = (result.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert apart.sum() <= max(1, LARGEST_SHARE * apart.numel())


def check_sizes(finish: Finish, num_clips: int, num_frames: int, crop_size: int, rgb: bool) -> None:
    """Against the reference, with what the loaders draw and an invalid row."""
    video, audio = VideoConfig(crop_size=crop_size, color_jitter=True), AudioConfig()
    clips = [
        draw_augmentation(video, audio, 0, crop_size, str(row), 144, 192, 101) for row in range(num_clips)
    ]
    if num_clips > 2:
        clips[1] = None
    pixels = yuv_noise(num_clips, num_frames, crop_size)
    if rgb:
        pixels = noise(num_clips, num_frames, crop_size, crop_size, 3)
    result = finish(pixels, frame_parameters(clips), crop_size, mean=MEAN, std=STD)
    assert_same_pixels(result, reference(pixels, clips, crop_size))


def check_orders(finish: Finish) -> None:
    """All orders, offsets and flips."""
    clips = [
        jittered(order, top=n % 2, left=n // 2 % 2, crop_size=13, flip=n % 3 == 0)
        for n, order in enumerate(ORDERS)
    ]
    pixels = yuv_noise(len(clips), 1, 13)
    result = finish(pixels, frame_parameters(clips), 13, mean=MEAN, std=STD)
    assert_same_pixels(result, reference(pixels, clips, 13))


def check_rgb(finish: Finish) -> None:
    """Pixels of all Y, U and V in steps of 7."""
    levels = torch.arange(0, 256, 7)
    y, u, v = (grid.flatten() for grid in torch.meshgrid(levels, levels, levels, indexing="ij"))
    side = 130
    count = -(-len(y) // 65**2)
    planes = [torch.zeros(count * 65**2, dtype=torch.uint8) for _ in range(3)]
    for plane, values in zip(planes, (y, u, v)):
        plane[: len(values)] = values.to(torch.uint8)
    y, u, v = (plane.view(count, 65, 65) for plane in planes)
    y = y.repeat_interleave(2, 1).repeat_interleave(2, 2)
    pixels = torch.cat([y.reshape(count, -1), u.reshape(count, -1), v.reshape(count, -1)], 1)[None]
    assert pixels.shape[-1] == side * side * 3 // 2
    for clip in (augmentation(0, 0, 128), augmentation(1, 1, 128, flip=True)):
        result = finish(pixels, frame_parameters([clip]), 128, mean=MEAN, std=STD)
        assert_same_pixels(result, reference(pixels, [clip], 128))


def check_normalized(
    finish: Finish, dtype: torch.dtype, tolerance: float, mean: float | tuple, std: float | tuple
) -> None:
    """Float results are the kernel's own pixels, normalized."""
    clips = [jittered(("saturation", "brightness", "contrast"), crop_size=13, flip=True), None]
    pixels, parameters = yuv_noise(2, 3, 13), frame_parameters(clips)
    frames = finish(pixels, parameters, 13, mean=mean, std=std)
    result = finish(pixels, parameters, 13, mean=mean, std=std, dtype=dtype)
    expected = normalize_frames(frames, mean, std)
    assert result.dtype == dtype and result.stride() == frames.stride()
    assert torch.allclose(result.float(), expected, rtol=tolerance, atol=1e-6)


SIZES = [
    (1, 1, 1, False),
    (3, 3, 13, False),
    (3, 1, 46, False),
    (1, 1, 128, False),
    (3, 1, 128, True),
    (1, 3, 13, True),
]
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
"""Relative tolerance: one unit in the last place; Triton's interpreter cuts bfloat16 off instead of rounding."""
STATISTICS = [(MEAN, STD), ((0.43, 0.39, 0.37), (0.228, 0.221, 0.217))]


@pytest.mark.parametrize("size", SIZES)
def test_interpreted_kernel_equals_the_reference_at_all_sizes(interpreted, size):
    check_sizes(interpreted, *size)


def test_interpreted_kernel_equals_the_reference_in_all_orders(interpreted):
    check_orders(interpreted)


def test_interpreted_kernel_makes_the_same_rgb(interpreted):
    check_rgb(interpreted)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("mean", "std"), STATISTICS)
def test_interpreted_kernel_normalizes_its_own_pixels(interpreted, dtype, tolerance, mean, std):
    check_normalized(interpreted, dtype, tolerance, mean, std)


def test_interpreted_kernel_gives_an_empty_batch(interpreted):
    result = interpreted(yuv_noise(0, 2, 13), frame_parameters([]), 13, mean=MEAN, std=STD)
    assert result.shape == (0, 3, 2, 13, 13)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (8, 32, 128, False), (5, 7, 112, False), (8, 32, 128, True)])
def test_kernel_equals_the_reference_at_all_sizes(on_gpu, size):
    check_sizes(on_gpu, *size)


@pytest.mark.gpu
def test_kernel_equals_the_reference_in_all_orders(on_gpu):
    check_orders(on_gpu)


@pytest.mark.gpu
def test_kernel_makes_the_same_rgb(on_gpu):
    check_rgb(on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("mean", "std"), STATISTICS)
def test_kernel_normalizes_its_own_pixels(on_gpu, dtype, tolerance, mean, std):
    check_normalized(on_gpu, dtype, tolerance, mean, std)


@pytest.mark.gpu
def test_auto_on_the_gpu_is_the_kernel_and_the_reference_runs_there_too():
    clips = [jittered(ORDERS[-1], crop_size=13), None]
    pixels, parameters = yuv_noise(2, 2, 13).cuda(), frame_parameters(clips)
    fused = finish_frames(pixels, parameters, 13, mean=MEAN, std=STD, impl="fused")
    assert torch.equal(finish_frames(pixels, parameters, 13, mean=MEAN, std=STD), fused)
    expected = finish_frames(pixels, parameters, 13, mean=MEAN, std=STD, impl="reference")
    assert expected.is_cuda
    assert_same_pixels(fused.cpu(), expected.cpu())


@pytest.mark.gpu
def test_kernel_reaches_beyond_2_to_the_31_bytes():
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("less than 6 GB of free GPU memory")
    pixels = yuv_noise(1, 32, 128).cuda()
    many = pixels.expand(1400, -1, -1).contiguous()
    clip = jittered(ORDERS[-1], crop_size=128)
    one = finish_frames(pixels, frame_parameters([clip]), 128, mean=MEAN, std=STD, impl="fused")
    result = finish_frames(many, frame_parameters([clip] * 1400), 128, mean=MEAN, std=STD, impl="fused")
    assert result.numel() > 2**31
    assert torch.equal(result[-1], one[0]) and torch.equal(result[700], one[0])


# The CPU route


def encode(frames: list[np.ndarray]) -> bytes:
    """mp4 of uint8 (H, W, 3) frames, coded as shards have it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "18", "preset": "veryfast", "bf": "0", "g": "32", "threads": "1"}
        stream = container.add_stream("libx264", rate=32, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for step, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            frame.pts, frame.time_base = step, Fraction(1, 32)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode_yuv_windows(video: bytes, top: int, left: int, crop_size: int) -> torch.Tensor:
    """uint8 (T, W * W * 3 // 2): the decoded planes around a crop; beyond the frame their edge is repeated."""
    side = yuv_window_size(crop_size)
    windows = []
    with av.open(io.BytesIO(video)) as container:
        for frame in container.decode(video=0):
            planes = []
            for plane, part in zip(frame.planes, (1, 2, 2)):
                rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
                rows = np.pad(rows[:, : plane.width], ((0, 2), (0, 2)), mode="edge")
                first_row, first_column = (top & ~1) // part, (left & ~1) // part
                window = rows[
                    first_row : first_row + side // part, first_column : first_column + side // part
                ]
                planes.append(window.reshape(-1))
            windows.append(np.concatenate(planes))
    return torch.from_numpy(np.stack(windows))


def check_cpu_route(frames: list[np.ndarray]) -> None:
    """swscale's RGB of a clip and ours from its planes: at least 40 dB."""
    video = encode(frames)
    for top, left, flip in ((0, 0, False), (7, 12, True), (16, 33, False)):
        clip = augmentation(top, left, 128, flip=flip)
        windows = decode_yuv_windows(video, top, left, 128)
        ours = reference(windows[None], [clip], 128)[0].permute(1, 2, 3, 0)  # (T, H, W, 3)
        theirs = torch.from_numpy(decode_frames(video, range(32), 144, window=(top, left, 128, 128)))
        theirs = flip_frames(theirs) if flip else theirs
        error = (ours.double() - theirs.double()).square().mean()
        psnr = 10 * torch.log10(255**2 / error)
        assert psnr >= 40, f"{psnr:.1f} dB at row {top}, column {left}"


def test_yuv_windows_give_the_pixels_of_the_cpu_route():
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.uniform(0, 255, (1, 3, 18, 24)))
    texture = torch.nn.functional.interpolate(coarse, size=(144, 192), mode="bicubic")[0].permute(1, 2, 0)
    texture = texture.numpy() + random.normal(0, 12, (144, 192, 3))
    check_cpu_route([np.roll(texture, step, 1).clip(0, 255).astype(np.uint8) for step in range(32)])


def test_yuv_windows_give_the_pixels_of_the_cpu_route_on_real_video(real_data: Path):
    videos = sorted((real_data / "av_videos").rglob("*.mp4"))
    if not videos:
        pytest.skip(f"no av_videos/**/*.mp4 in {real_data}")
    with av.open(str(videos[0])) as container:
        frames = itertools.islice(container.decode(video=0), 32)
        check_cpu_route([frame.to_ndarray(width=192, height=144, format="rgb24") for frame in frames])
