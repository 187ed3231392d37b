"""metrics.json and the report, from made-up clips whose figures are known beforehand."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cmac.evaluation import demo, report, videos, world
from cmac.evaluation.truth import Truth, TruthObject
from loaders.config import AudioConfig

CROP = 64
STEPS = 4
NUM_CLIPS = 24


def made_up_clips(with_truth: bool = True) -> world.ClipSet:
    """Clips whose trained maps are high on the sounding object in the easy part and anywhere in the hard
    one."""
    generator = torch.Generator().manual_seed(0)
    clips = world.ClipSet()
    maps = torch.rand(NUM_CLIPS, STEPS, 8, 8, generator=generator) * 0.1
    for index in range(NUM_CLIPS):
        part = ("easy", "hard")[index % 2]
        info = SimpleNamespace(
            key=f"clip_{index:02d}",
            video_id=f"{part}_{index // 4:06d}.mp4",
            start_seconds=float(index % 4),
            source_crop=(0.0, 0.0, 192.0, 144.0),
            frame_width=192,
            frame_height=144,
        )
        clips.clips.append(info)
        clips.crops.append(
            SimpleNamespace(
                scaled_width=96,
                scaled_height=72,
                crop_left=16,
                crop_top=4,
                crop_size=CROP,
                flip=index % 3 == 0,
            )
        )
        box = np.array([56.0, 20.0, 88.0, 52.0])  # crop: 12..28, 6..22, mirrored 36..52
        other = np.array([100.0, 90.0, 132.0, 122.0])
        objects = (
            TruthObject(category="bell <b>", sounding=True, moving=True, boxes=np.tile(box, (120, 1))),
            TruthObject(
                category="drum", sounding=False, moving=part == "hard", boxes=np.tile(other, (120, 1))
            ),
        )
        clips.truths.append(
            Truth(
                part=part,
                sound="on-screen",
                category="bell <b>" if index % 4 < 2 else "horn",
                fps=30.0,
                width=192,
                height=144,
                objects=objects,
                bands_hz=((800.0, 1200.0),) if index % 4 < 2 else ((3000.0, 4000.0),),
            )
            if with_truth
            else None
        )
        if part == "easy":
            maps[index, :, 1, 5 if index % 3 == 0 else 2] = 1.0
    embedding = torch.nn.functional.normalize(torch.randn(NUM_CLIPS, 16, generator=generator), dim=1)
    audio_maps = torch.rand(NUM_CLIPS, 9, 4, generator=generator)
    trained = world.EncodedClips(
        embedding_v=embedding,
        embedding_a=embedding,
        guided_v=maps,
        predicted_v=maps,
        guided_a=audio_maps,
        predicted_a=audio_maps,
    )
    flat = torch.full_like(maps, 0.5)
    untrained = world.EncodedClips(
        embedding_v=embedding,
        embedding_a=embedding.roll(1, 0),
        guided_v=flat,
        predicted_v=flat,
        guided_a=torch.full_like(audio_maps, 0.5),
        predicted_a=audio_maps,
    )
    clips.encoded = {"trained": trained, "untrained": untrained}
    clips.log_mel = torch.randn(NUM_CLIPS, 257, 101, generator=generator).half()
    return clips


def log_rows() -> list[dict]:
    rows = []
    for step in range(10, 310, 10):
        rows.append(
            {
                "step": step,
                "loss": 8.0 - step / 100,
                "loss_contrastive": 7.0 - step / 100,
                "loss_consistency": 1.0 / step,
                "accuracy_v2a": step / 600,
                "accuracy_a2v": step / 500,
                "clips_per_second": 50.0,
                "data_wait_fraction": 0.25,
                "train_seconds": step / 2,
            }
        )
    return rows


def media(key: str) -> demo.Media:
    phase = int(key[-2:])
    y, x = np.mgrid[0:144, 0:192]
    frames = np.stack(
        [
            np.stack([(x + 3 * index + 9 * phase) % 256, y, (x * y // 64) % 256], axis=-1)
            for index in range(32)
        ]
    )
    seconds = np.arange(24_000) / 24_000
    waveform = (0.3 * np.sin(2 * np.pi * (300 + 50 * phase) * seconds)).astype(np.float32)
    return demo.Media(frames=frames.astype(np.uint8), waveform=waveform, sample_rate=24_000)


def build(with_truth: bool) -> tuple[dict, str, bytes]:
    evaluation = world.evaluate_clips(made_up_clips(with_truth), AudioConfig(), seed=0)
    kind = "world" if with_truth else "videos"
    metrics = demo.build_metrics(
        evaluation, log_rows(), kind=kind, training_clips=not with_truth, commit="abc"
    )
    context = report.ReportContext(
        title="A run <&>",
        date="2026-01-01 00:00 UTC",
        facts=[("Command", "make demo"), ("Hardware", "two <cores>")],
        training_clips=not with_truth,
        has_truth=with_truth,
    )
    page, grid = report.build_report(evaluation, metrics, log_rows(), context, AudioConfig(), media)
    return metrics, page, grid


@pytest.fixture(scope="module")
def built() -> tuple[dict, str, bytes]:
    return build(with_truth=True)


@pytest.fixture(scope="module")
def built_videos() -> tuple[dict, str, bytes]:
    return build(with_truth=False)


class Page(HTMLParser):
    """Checks that tags are closed in order and collects what refers to something."""

    void = {"meta", "link", "img", "br", "hr", "input", "line", "polyline", "source"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.references += [
            (tag, name, value or "")
            for name, value in attributes
            if name in ("src", "href", "poster", "srcset")
        ]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_figures_are_those_that_the_made_up_maps_must_give(built):
    metrics = built[0]
    for kind in ("guided", "predicted"):
        figure = metrics[f"{kind}_pointing_easy"]
        assert figure["value"] == 1.0 and figure["time_mean"] == 1.0
        assert figure["chance"] == pytest.approx(16 * 16 / 64**2)
        assert figure["untrained"] == pytest.approx(figure["chance"])  # a flat map points anywhere
        assert figure["center"] == 0.0
        assert metrics[f"{kind}_prefers_sounding_easy"]["value"] == 1.0
        assert metrics[f"{kind}_prefers_sounding_easy"]["untrained"] == 0.5
        assert metrics[f"{kind}_pointing_hard"]["value"] < 0.5
    for direction in ("v2a", "a2v"):
        figure = metrics[f"retrieval_{direction}_r1"]
        assert figure["value"] == 1.0 and figure["untrained"] < 0.5
        assert figure["num_clips"] == NUM_CLIPS // 2  # the easy part
        assert figure["chance"] == pytest.approx(2 / NUM_CLIPS)
        assert figure["category_only"] == pytest.approx(2 * 2 / NUM_CLIPS)  # two kinds, equally often


def test_metrics_have_the_promised_keys(built):
    metrics = json.loads(json.dumps(built[0], allow_nan=False))
    for key in (*demo.LOCALISATION_KEYS, *demo.RETRIEVAL_KEYS):
        figure = metrics[key]
        for name in ("value", "chance", "untrained"):
            assert 0 <= figure[name] <= 1, (key, name)
        assert figure["num_clips"] > 0
        low, high = figure["interval"]
        assert 0 <= low <= figure["value"] <= high <= 1
        assert ("center" in figure) == ("pointing" in key)
    assert metrics["train_seconds"] == 150.0
    assert metrics["clips_per_second"] == 50.0
    assert metrics["data_wait_fraction"] == 0.25


def test_own_videos_get_retrieval_and_no_localisation_figures(built_videos):
    metrics, page, _ = built_videos
    assert metrics["kind"] == "videos" and metrics["evaluated_on_training_clips"]
    assert not [key for key in metrics if "pointing" in key or "prefers" in key or "band_share" in key]
    assert metrics["retrieval_v2a_r1"]["num_clips"] == NUM_CLIPS
    text = "".join(parse(page).text)
    assert "These are the clips that the network was trained on" in text
    assert "hard part" not in text


@pytest.mark.parametrize("kind", ["built", "built_videos"])
def test_page_is_well_formed_and_fetches_nothing(kind, request):
    html = request.getfixturevalue(kind)[1]
    page = parse(html)
    assert page.references, "the page shows no picture"
    assert {value[:5] for _, _, value in page.references} == {"data:"}
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", html)
    assert "@import" not in html and "url(" not in html and "<script" not in html


def test_page_escapes_what_comes_from_outside(built):
    html = built[1]
    assert "bell &lt;b&gt;" in html and "bell <b>" not in html
    assert "two &lt;cores&gt;" in html and "A run &lt;&amp;&gt;" in html


def test_page_says_figures_beside_chance_and_both_losses_apart(built):
    text = " ".join("".join(parse(built[1]).text).split())
    for words in ("Contrastive loss", "Attention consistency loss", "Accuracy of the contrastive task"):
        assert words in text
    assert "100.0 %" in text
    assert "waiting for data" in text and "50.0 clips/s" in text
    assert "at chance" in text


def test_names_that_are_not_utf8_are_shown_with_question_marks(tmp_path):
    clips = made_up_clips(with_truth=False)
    for info in clips.clips:
        info.video_id = "caf\udce9.mp4"  # a Latin-1 file name as the file system gives it
    evaluation = world.evaluate_clips(clips, AudioConfig(), seed=0)
    demo.write_text(tmp_path / "page.html", report.describe(evaluation, 0))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "caf?.mp4 at 0.0 s"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_bad_clips_are_told():
    clips = made_up_clips()
    clips.num_bad = 3
    evaluation = world.evaluate_clips(clips, AudioConfig(), seed=0)
    metrics = demo.build_metrics(evaluation, [], kind="world", training_clips=False, commit=None)
    context = report.ReportContext(title="t", date="d", facts=[], training_clips=False, has_truth=True)
    page, _ = report.build_report(evaluation, metrics, [], context, AudioConfig(), media)
    assert metrics["num_bad_clips"] == 3 and "3 clips could not be read" in page
    assert "Nothing was logged" in page  # no log, no curves, still a page


def data_uris(html: str, media_type: str) -> list[bytes]:
    found = re.findall(rf"data:{media_type};base64,([A-Za-z0-9+/=]+)", html)
    return [base64.b64decode(content, validate=True) for content in found]


def test_clips_in_the_page_play_with_sound(built):
    clips = data_uris(built[1], "video/mp4")
    assert len(clips) == 6
    for content in clips:
        with av.open(io.BytesIO(content)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
            container.seek(0)
            samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio)])
        assert len(frames) == 32 * report.REPEATS and frames[0].shape == (284, 768, 3)
        assert abs(len(samples) / 24_000 - report.REPEATS) < 0.1
        assert 0.1 < np.abs(samples).max() < 0.5


def test_every_picture_in_the_page_opens(built):
    tiles = data_uris(built[1], "image/jpeg")
    assert len(tiles) == 8 * len(report.GRID_ROWS) + 6
    for content in tiles:
        Image.open(io.BytesIO(content)).load()
    grid = Image.open(io.BytesIO(built[2]))
    assert grid.format == "PNG" and grid.width > 8 * report.TILE and grid.height > 6 * report.TILE


def test_shown_clips_run_from_good_to_bad():
    evaluation = world.evaluate_clips(made_up_clips(), AudioConfig(), seed=0)
    margins = {score.placed.index: score.margins["guided"] for score in evaluation.scores}
    shown = demo.choose_shown(evaluation, (95, 65, 35, 5))
    assert [item.name.split(",")[0] for item in shown] == ["easy"] * 4 + ["hard"] * 4
    for part in (shown[:4], shown[4:]):
        values = [margins[item.index] for item in part]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("interval", "key", "words", "tone"),
    [
        ([0.51, 0.6], "predicted_pointing_easy", "above chance, but not above the untrained network", "flat"),
        ([0.55, 0.7], "guided_prefers_sounding_hard", "above chance", "good"),
        ([0.45, 0.56], "guided_prefers_sounding_hard", "not distinguishable from chance", "flat"),
        ([0.45, 0.56], "predicted_prefers_sounding_hard", "at chance, as it must be", "good"),
        ([0.55, 0.7], "predicted_prefers_sounding_hard", "above chance: look for a leak", "odd"),
        ([0.2, 0.4], "guided_prefers_sounding_easy", "below chance", "odd"),
    ],
)
def test_verdict_follows_the_interval(interval, key, words, tone):
    figure = {"interval": interval, "chance": 0.5, "untrained": 0.52, "num_clips": 10}
    assert report.verdict(key, figure) == (words, tone)


def test_log_of_a_resumed_and_killed_run_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = ['{"step": 10, "loss": 2}', '{"step": 20, "loss": 9}', '{"step": 20, "loss": 1}', '{"step": 30,']
    path.write_text("\n".join(rows))
    assert demo.column(demo.read_log(path), "loss") == [2.0, 1.0]
    assert demo.read_log(tmp_path / "none") == []
    nothing = dict.fromkeys(("train_seconds", "clips_per_second", "data_wait_fraction"))
    assert demo.training_figures([]) == nothing


def test_map_follows_the_frames_it_was_made_from():
    maps = np.array([0.0, 1.0])[:, None, None] * np.ones((2, 3, 3))
    course = videos.map_per_frame(maps, 8)[:, 0, 0]
    # The steps' middles are at 2 and 6 of 8 frames; frame j has its middle at j + 0.5.
    np.testing.assert_allclose(course, [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])


@pytest.mark.parametrize("width", [1280, 400])
def test_chromium_shows_the_page_and_plays_its_clips(built, tmp_path, width):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    probe = (
        "<script>addEventListener('load', () => { const v = [...document.querySelectorAll('video')];"
        "const done = () => document.title = 'ready ' + v.filter(e => e.readyState >= 1 &&"
        " e.videoWidth === 768 && !e.error).length"
        " + ' wide ' + (document.documentElement.scrollWidth > innerWidth);"
        "v.forEach(e => e.addEventListener('loadedmetadata', done)); done(); });</script></body>"
    )
    path = tmp_path / "report.html"
    path.write_text(built[1].replace("</body>", probe), encoding="utf-8")
    result = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", result.stdout).group(1)
    assert title == "ready 6 wide false"
