"""Maps of windows blended over time and laid over pictures, and the page that plays them in a real browser."""

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from headless_browser import Browser

from cmac.evaluation import pictures, videos, viewer

NAME = "cat \"&' <img src=x onerror=document.title=1> $(reboot) \u202e"


def window(start: float, value: float = 0.5, **maps: np.ndarray) -> viewer.Window:
    """A second whose maps are `value` everywhere."""
    flat = {
        "guided_v": np.full((4, 3, 3), value),
        "predicted_v": np.full((4, 3, 3), value),
        "guided_a": np.full((5, 2), value),
        "predicted_a": np.full((5, 2), value),
        "log_mel": np.full((101, 8), value),
    }
    return viewer.Window(
        start_seconds=start,
        end_seconds=start + 1,
        region=(0.25, 0.0, 0.5, 1.0),
        flip=False,
        **{**flat, **maps},
    )


def ramp(start: float, seconds: float, steps: int = 32) -> np.ndarray:
    """Values that are the time itself, for a map of one cell."""
    return (start + (np.arange(steps) + 0.5) / steps * seconds).reshape(-1, 1, 1)


def test_a_course_that_is_linear_in_time_stays_so_over_overlapping_windows():
    starts = (0.0, 0.4, 0.9, 1.3)
    course = viewer.Course([window(start, guided_v=ramp(start, 1.0)) for start in starts])
    low, high = course.range("guided", "v")
    assert (low, high) == pytest.approx((1 / 64, 2.3 - 1 / 64))
    for seconds in np.arange(0.05, 2.25, 0.07):
        value = low + (high - low) * course.map_at("guided", seconds)[0, 0]
        assert value == pytest.approx(
            seconds, abs=1e-3 + (1 / 64 if seconds < 0.4 or seconds > 1.9 else 0.01)
        )


def test_windows_count_by_the_distance_from_their_nearer_end():
    # At 0.75 the first is a quarter second from its end, the second as far from its start; at 0.6 0.4 and 0.1.
    course = viewer.Course([window(0.0, 0.0), window(0.5, 1.0)])
    expected = {0.2: 0.0, 0.6: 0.2, 0.75: 0.5, 0.9: 0.8, 1.4: 1.0}
    for seconds, value in expected.items():
        np.testing.assert_allclose(course.map_at("predicted", seconds), value, atol=1e-6)
        np.testing.assert_allclose(course.strip("guided", np.array([seconds])), value, atol=1e-6)
        np.testing.assert_allclose(course.log_mel(np.array([seconds])), value, atol=1e-6)


def test_where_no_window_reaches_there_is_no_map():
    course = viewer.Course([window(0.0, 0.2), window(2.0, 0.8)])
    assert course.map_at("guided", 0.5) is not None and course.map_at("guided", 2.99) is not None
    assert course.map_at("guided", 1.5) is None and course.map_at("guided", 3.0) is None
    assert np.isnan(course.log_mel(np.array([0.5, 1.5])))[0].tolist() == [False, True]
    renderer = viewer.Renderer(course, (96, 64), 0.0, 3.0)
    grey = np.full((64, 96, 3), 200, dtype=np.uint8)
    drawn = renderer.overlay(grey, "guided", 1.5)
    assert drawn[5, 48].max() < 0.5 * 200 and (drawn > 200).any()  # dark, with the words over it
    strip = renderer.spectrogram(None, 0.0, 3.0, 300, 20)
    assert (strip[:, 150] == viewer.NO_MAP_COLOR).all() and not (strip[:, 50] == viewer.NO_MAP_COLOR).all()


def test_a_course_of_no_windows_or_of_several_crops_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        viewer.Course([])
    other = viewer.Window(**{**window(1.0).__dict__, "flip": True})
    with pytest.raises(ValueError, match="2 regions"):
        viewer.Course([window(0.0), other])


@pytest.mark.parametrize("flip", [False, True])
def test_a_cell_of_the_map_lies_where_its_pixels_lay(flip):
    values = np.zeros((4, 4))
    values[1, 3] = 1
    placed = pictures.place_map(values, (20.4, 10.8, 40.0, 80.0), flip, 100, 100)
    seen = np.isfinite(placed)
    columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    assert (columns[0], columns[-1], rows[0], rows[-1]) == (20, 59, 11, 90)
    y, x = np.mgrid[:100, :100] + 0.5
    weight = np.nan_to_num(placed)
    # The cell is 10 wide and 20 high; one at the edge goes on to the edge with its full value.
    middle_x = 20.4 + (3.5 if not flip else 0.5) * 10
    assert (weight * x).sum() / weight.sum() == pytest.approx(middle_x, abs=1.5)
    assert (weight * y).sum() / weight.sum() == pytest.approx(10.8 + 1.5 * 20, abs=0.3)
    assert weight.max() == pytest.approx(1, abs=0.06)


def test_placed_maps_are_interpolated_as_the_figures_are():
    values = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    placed = pictures.place_map(values, (0.0, 0.0, 70.0, 45.0), False, 70, 45)
    np.testing.assert_allclose(placed, pictures.resize_map(values, 70, 45), atol=1e-5)


@pytest.mark.parametrize("size", [(1920, 1080), (144, 256), (171, 131), (1000, 60), (64, 64)])
def test_panels_keep_the_aspect_and_frames_have_even_sides(size):
    width, height = viewer.panel_size(*size)
    assert (
        width <= viewer.LONG_SIDE and height <= viewer.LONG_SIDE and min(width, height) <= viewer.SHORT_SIDE
    )
    assert width / height == pytest.approx(size[0] / size[1], rel=0.1)
    layout = viewer.make_layout(width, height)
    assert layout.width % 2 == 0 and layout.height % 2 == 0
    boxes = [*layout.panels, *layout.strips, layout.axis]
    taken = np.zeros((layout.height, layout.width), dtype=int)
    for box in boxes:
        taken[box.y : box.y + box.height, box.x : box.x + box.width] += 1
    assert taken.max() == 1 and taken.sum() == sum(box.width * box.height for box in boxes)


def test_moments_have_their_second_of_sound_inside():
    assert viewer.moments(2.0, 5.0, 3) == [2.5, 4.5, 6.5]
    assert viewer.moments(2.0, 5.0, 1) == [4.5]
    assert viewer.moments(0.0, 1.0, 6) == [0.5]


def test_ranges_tell_their_ends_apart():
    assert viewer.range_text((0.25, 0.75)) == "0.25 to 0.75"
    assert viewer.range_text((0.50012, 0.50034)) == "0.5001 to 0.5003"
    assert viewer.range_text((0.5, 0.5)) == "0.50000 to 0.50000"


def test_mp4_is_streamed_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.mp4"
    sound = np.zeros((2, 44_100), dtype=np.float32)
    options = dict(fps=32, sample_rate=44_100, max_bits_per_second=1_000_000)
    frames = (np.full((64, 96, 3), 8 * place, dtype=np.uint8) for place in range(32))
    videos.write_mp4(path, frames, (96, 64), sound, **options)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # the index comes first: it plays while it loads
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (audio.codec_context.name, audio.sample_rate, audio.layout.name) == ("aac", 44_100, "stereo")
        assert sum(1 for _ in container.decode(video)) == 32

    def broken():
        yield np.zeros((64, 96, 3), dtype=np.uint8)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        videos.write_mp4(path, broken(), (96, 64), sound, **options)
    with pytest.raises(ValueError, match="even sides"):
        videos.write_mp4(path, iter([]), (95, 64), sound, **options)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def played(name: str, tone_hz: float, size: tuple[int, int]) -> viewer.PlayedVideo:
    """Two seconds whose panels are red, green and blue."""
    layout = viewer.make_layout(*size)
    frame = np.zeros((layout.height, layout.width, 3), dtype=np.uint8)
    for box, color in zip(layout.panels, np.eye(3) * 230):
        box.paste(frame, color.astype(np.uint8))
    waveform = 0.3 * np.sin(2 * np.pi * tone_hz * np.arange(48_000) / 24_000)
    video = videos.encode_mp4(np.stack([frame] * 64), waveform.astype(np.float32), 32, 24_000)
    return viewer.PlayedVideo(
        name=name,
        notes=["two seconds", "<b>made up</b>"],
        ranges=[("guided map of the picture", "0.10 to 0.90")],
        video=video,
        poster=pictures.encode_jpeg(frame),
        layout=layout,
    )


@pytest.fixture(scope="module")
def page() -> str:
    shown = [played(NAME, 440, (160, 90)), played("second", 880, (90, 160))]
    return viewer.build_page(shown, "A page <&>", [("Checkpoint", "a & b")], ["c <i> is left out: no sound"])


@pytest.fixture
def page_path(page: str, tmp_path: Path) -> Path:
    path = tmp_path / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


class Tags(HTMLParser):
    """Tags in order, checking that each is closed."""

    void = {"meta", "input", "img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def test_page_is_well_formed_and_escapes_what_comes_from_outside(page):
    assert page.startswith("<!DOCTYPE html>")
    tags = parse(page)
    assert not [tag for tag, _ in tags.tags if tag in ("img", "b", "i", "iframe", "link", "object")]
    text = "".join(tags.text)
    assert NAME in text and "c <i> is left out: no sound" in text and "A page <&>" in text
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on")]
    figures = [attributes for tag, attributes in tags.tags if tag == "figure"]
    assert [figure["aria-label"] for figure in figures] == [NAME, "second"]
    assert json.loads(figures[0]["data-layout"])["panels"][0]["width"] == 160


def test_page_holds_everything_and_its_policy_forbids_the_rest(page):
    tags = parse(page).tags
    sources = [
        value
        for _, attributes in tags
        for name, value in attributes.items()
        if name in ("src", "href", "poster", "srcset", "data", "action")
    ]
    assert len(sources) == 4 and all(
        re.match(r"data:(video/mp4|image/jpeg);base64,", each) for each in sources
    )
    assert "url(" not in page and "@import" not in page and not re.search(r"https?://", page)
    policy = next(
        attributes["content"] for tag, attributes in tags if attributes.get("http-equiv") is not None
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["media-src"] == rules["img-src"] == "data:"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[name])
    assert set(rules) == {
        "default-src", "base-uri", "form-action", "media-src", "img-src", "script-src", "style-src"
    }  # fmt: skip
    assert not [1 for _, attributes in tags if "style" in attributes]


def test_videos_of_the_page_have_controls_of_their_own_without_scripts(page):
    found = [attributes for tag, attributes in parse(page).tags if tag == "video"]
    assert len(found) == 2 and all(
        "controls" in attributes and "muted" not in attributes for attributes in found
    )


IS_READY = "document.documentElement.dataset.state === 'ready'"


@pytest.mark.parametrize("width", [1280, 400])
def test_browser_plays_the_page_and_asks_for_nothing(browser, page_path, width):
    browser.open(page_path, size=(width, 900))
    browser.wait_for(IS_READY)
    assert browser.evaluate("document.querySelector('h1').textContent") == "A page <&>"
    assert not browser.evaluate("document.documentElement.scrollWidth > innerWidth")
    browser.evaluate("document.getElementById('play-all').click()")
    browser.wait_for("[...document.querySelectorAll('video')].every((v) => v.currentTime > 0.3)")
    state = "[document.documentElement.dataset.state, document.getElementById('play-all').textContent]"
    assert browser.evaluate(state) == ["playing", "Pause all"]
    muted = "[...document.querySelectorAll('video')].map((v) => v.muted)"
    assert browser.evaluate(muted) == [False, True]  # the sound of one at a time
    browser.evaluate("document.querySelectorAll('.hear')[1].click()")
    assert browser.evaluate(muted) == [True, False]
    browser.evaluate("document.getElementById('sound').click()")
    assert browser.evaluate(muted) == [True, True]
    browser.evaluate("document.getElementById('play-all').click()")
    browser.wait_for(IS_READY)
    assert browser.complaints() == []
    assert browser.evaluate("document.title") == "A page <&>"  # nothing in a name was run
    addresses = browser.requested()
    assert addresses and addresses[0] == page_path.as_uri()
    assert all(address == page_path.as_uri() or address.startswith("data:") for address in addresses)


COLOR_IN_THE_MIDDLE = """(() => {
  const canvas = document.querySelector("canvas");
  const { panels } = JSON.parse(document.querySelector("figure").dataset.layout);
  return [...canvas.getContext("2d").getImageData(canvas.width / 2, panels[0].height, 1, 1).data];
})()"""


def test_overlay_and_opacity_are_chosen_with_the_keyboard(browser, page_path):
    browser.open(page_path)
    browser.wait_for(IS_READY)
    assert browser.evaluate("document.querySelector('canvas').hidden")
    order = []
    for _ in range(12):
        browser.press("Tab", "Tab", 9)
        order.append(browser.evaluate("document.activeElement.id || document.activeElement.className"))
    assert order[:3] == ["play-all", "restart", "sound"] and "toggle" in order and "seek" in order
    browser.evaluate("document.querySelector('input[value=all]').focus()")
    for channel, name in enumerate(("picture", "guided", "predicted")):
        browser.press("ArrowRight", "ArrowRight", 39)
        assert browser.evaluate("document.querySelector('input[name=view]:checked').value") == name
        browser.wait_for(f"{COLOR_IN_THE_MIDDLE}[{channel}] > 150")  # the panels are red, green and blue
        color = browser.evaluate(COLOR_IN_THE_MIDDLE)
        assert sum(color[:3]) < color[channel] + 120, color
    browser.evaluate("document.getElementById('opacity').focus()")
    browser.press("Home", "Home", 36)
    browser.wait_for(f"{COLOR_IN_THE_MIDDLE}[0] > 150 && {COLOR_IN_THE_MIDDLE}[2] < 100")
    browser.evaluate("document.querySelector('.toggle').focus()")
    browser.press("Enter", "Enter", 13, "\r")
    browser.wait_for("document.querySelector('video').currentTime > 0.1")
    assert browser.evaluate("document.querySelectorAll('video')[1].currentTime") == 0
    assert browser.complaints() == []


def test_videos_play_where_scripts_do_not_run(browser, page_path):
    browser.open(page_path, scripts=False)
    browser.wait_for("[...document.querySelectorAll('video')].every((v) => v.controls && v.readyState >= 2)")
    assert browser.evaluate("document.querySelector('.bar').hidden")
    assert browser.evaluate("document.documentElement.dataset.state") is None
    browser.evaluate("document.querySelectorAll('video').forEach((v) => { v.play(); })")
    browser.wait_for("[...document.querySelectorAll('video')].every((v) => v.currentTime > 0.1)")


def test_policy_holds_in_a_browser_that_would_ask_otherwise(browser, page_path, tmp_path):
    """A request to `page.invalid` reaches the proxy from a page without the policy and not from this one."""
    ask = "fetch('http://page.invalid/{0}').then(() => 'answered', () => 'failed')"
    added = (
        "<img src='http://page.invalid/image'><style>body { background: url(http://page.invalid/image) }</style>"
        "<script>document.title = 'ran'</script></main>"
    )

    def asked(mark: bytes) -> bool:
        return any(b"page.invalid/" + mark in first for first in browser.connections)

    open_page = tmp_path / "open.html"
    open_page.write_text(f"<!DOCTYPE html><title>open</title><main>{added}")
    browser.open(open_page)
    browser.evaluate(ask.format("control"))
    assert asked(b"control") and asked(b"image") and browser.evaluate("document.title") == "ran"
    browser.connections.clear()
    page = page_path.read_text(encoding="utf-8").replace("</main>", added)
    page_path.write_text(page, encoding="utf-8")
    browser.open(page_path)
    browser.wait_for(IS_READY)
    assert browser.evaluate(ask.format("fetch")) == "failed"
    browser.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert not asked(b"image") and not asked(b"fetch")
    assert browser.evaluate("document.title") == "A page <&>"
    assert len([text for text in browser.complaints() if "Content Security Policy" in text]) >= 4


MEASURE_CONTRAST = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c /= 255, c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? ground(node.parentElement) : color;
  };
  const names = ["h1", "p", "h3", "figcaption", "button.main", "button.large", ".bar label", "legend", "dd"];
  return names.map((name) => {
    const node = document.querySelector(name);
    const pair = [getComputedStyle(node).color, ground(node)].map((text) => luminance(channels(text)));
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  });
})()"""


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(251, 250, 247)"), ("dark", "rgb(20, 22, 26)")])
def test_text_has_contrast_in_both_schemes(browser, page_path, scheme, ground):
    browser.open(page_path, scheme=scheme)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    contrasts = browser.evaluate(MEASURE_CONTRAST)
    assert min(contrasts) >= 4.5, contrasts


def test_rendered_frames_show_the_picture_the_maps_and_the_time():
    bright_left = np.zeros((4, 3, 3))
    bright_left[:, :, 0] = 1
    course = viewer.Course([window(0.0, guided_v=bright_left), window(1.0, guided_v=bright_left)])
    renderer = viewer.Renderer(course, (120, 80), 0.0, 2.0)
    frame = np.full((80, 120, 3), 128, dtype=np.uint8)
    early, late = (renderer.frame(frame, seconds) for seconds in (0.5, 1.5))
    assert early.shape == (renderer.layout.height, renderer.layout.width, 3)
    guided = renderer.layout.panels[1]
    panel = early[guided.y : guided.y + 80, guided.x : guided.x + 120].astype(int)
    assert panel[40, 35].sum() > panel[40, 80].sum() + 100  # the square reaches from 30 to 90
    assert (panel[40, 10] == int(128 * pictures.UNSEEN_BRIGHTNESS)).all()
    strip = renderer.layout.strips[0]
    quarter, three_quarters = renderer.layout.width // 4, renderer.layout.width * 3 // 4
    for drawn, place in ((early, quarter), (late, three_quarters)):
        changed = np.flatnonzero((early != late)[strip.y + 30].any(axis=1))
        assert (drawn[strip.y + 30, place] == 255).all()
    assert set(changed) <= {*range(quarter - 1, quarter + 3), *range(three_quarters - 1, three_quarters + 3)}


def test_grid_has_a_column_per_moment_and_the_ranges():
    course = viewer.Course([window(0.0, 0.2), window(1.0, 0.7)])
    renderer = viewer.Renderer(course, (96, 64), 0.0, 2.0)
    frame = np.full((64, 96, 3), 128, dtype=np.uint8)
    columns = [(seconds, renderer.column(frame, seconds)) for seconds in (0.5, 1.0, 1.5)]
    assert [len(tiles) for _, tiles in columns] == [6, 6, 6]
    grid = renderer.grid(columns, "a title")
    assert grid.shape[1] == 130 + 3 * (96 + 6)
    png = pictures.encode_png(grid)
    assert io.BytesIO(png).read(8) == b"\x89PNG\r\n\x1a\n"
    missing = renderer.column(None, 1.0)
    assert (missing[0][0, 0] == viewer.NO_MAP_COLOR).all()
