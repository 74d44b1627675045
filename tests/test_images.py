"""One upright picture everywhere, however a row holds it, and no harm from any file."""

import base64
import http.server
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from pictures import bomb, noise
from PIL import Image, ImageOps

import images
from images import Passed, as_record, check_pixels, open_image, read_bytes, to_rgb


@pytest.fixture(scope="module")
def png():
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (10, 200, 30)).save(file, "PNG")
    return file.getvalue()


# ---- pixels ----
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_upright_once(kind):
    picture = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(1, 60).repeat(20, 0) * 4)  # 60 x 20
    file, tags = io.BytesIO(), Image.Exif()
    tags[274] = 6  # turn me by a quarter, clockwise
    picture.convert("RGB").save(file, kind, exif=tags, **({"lossless": True} if kind == "WEBP" else {}))
    image = open_image({"bytes": file.getvalue(), "path": None})
    check_pixels(file.getvalue())
    assert image.size == (20, 60)
    pixels = to_rgb(image)
    assert not pixels.info and not dict(pixels.getexif())  # vLLM would turn it again
    assert np.abs(np.array(pixels)[:, 5, 0].astype(int) - 4 * np.arange(60)).max() <= 4  # JPEG rounds


def test_transparent_images_lie_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.array(to_rgb(image)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_a_depth_map_with_holes_keeps_its_shades():
    depth = np.array([[1, 2, 3, np.nan, np.inf]], dtype=np.float32)
    assert np.array(to_rgb(Image.fromarray(depth)))[0, :, 0].tolist() == [0, 127, 255, 0, 255]
    assert not np.array(to_rgb(Image.fromarray(depth[:, 3:4]))).any()


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_is_that_of_pil(tag):
    file, tags = io.BytesIO(), Image.Exif()
    tags[274] = tag
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    picture.save(file, "PNG", exif=tags)
    want = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    assert np.array_equal(to_rgb(open_image({"bytes": file.getvalue()})), want)


@pytest.mark.parametrize("mode", ["P", "LA", "PA", "L"])
def test_every_kind_of_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    if mode in ("P", "L"):  # one colour of a palette, or one shade, is transparent
        image, how = Image.fromarray(np.array([[7, 0]], dtype=np.uint8)).convert(mode), {"transparency": 7}
    else:
        image, how = image.convert(mode), {}
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "PA" else "PNG", **how)
    if mode == "PA":
        pixels = to_rgb(image)
    else:
        pixels = to_rgb(open_image({"bytes": file.getvalue()}))
    assert np.array(pixels)[0].tolist() == [[255] * 3, [0] * 3]


def test_the_first_frame_of_an_animation():
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert np.array(to_rgb(open_image({"bytes": file.getvalue()})))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_what_was_cut_off_is_missed(kind):
    file = io.BytesIO()
    Image.open(io.BytesIO(noise(64, 64)["bytes"])).save(file, kind)
    data = file.getvalue()
    check_pixels(data)
    for share in (0, 0.1, 0.5, 0.9):
        with pytest.raises(OSError):
            check_pixels(data[: int(share * len(data))])


def test_a_bomb_is_refused_by_its_header():
    for size in ((20_000, 20_000), (9_460, 9_460)):
        with pytest.raises(OSError, match="pixels"):
            open_image({"bytes": bomb(*size)})
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(OSError, match="cannot identify"):  # PIL would run Ghostscript
        open_image({"bytes": eps})


# ---- records ----
def test_a_picture_is_read_however_it_is_held(png, tmp_path):
    (tmp_path / "a.png").write_bytes(png)
    text = base64.b64encode(png).decode()
    url = f"data:image/png;base64,{text}"
    held = [
        png, bytearray(png), "a.png", str(tmp_path / "a.png"), text, text[:30] + "\n" + text[30:], url,
        f"file://{tmp_path}/a.png", {"path": "a.png"}, {"path": "a.png", "bytes": None},
        {"path": "gone.png", "bytes": png}, {"bytes": text}, {"url": url}, {"image_url": {"url": url}},
        {"url": f"file://{tmp_path}/a.png"},
    ]  # fmt: skip
    for value in held:
        assert read_bytes(as_record(value, tmp_path)) == png, value
        assert open_image(as_record(value, tmp_path)).size == (6, 4)
    assert [read_bytes(r) for r in as_record(held, tmp_path)] == [png] * len(held)
    assert as_record("images/0001", tmp_path)["path"]  # is base64 as well, but of no picture


@pytest.mark.parametrize(
    "value", ["/dev/zero", "pipe", ".", "a\0.png", "x" * 9_000, "none.png", b"", "", 3, {}]
)
def test_pipes_devices_and_nonsense_are_refused_at_once(value, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (open_image, read_bytes):
        with pytest.raises(OSError) as error:
            read(as_record(value, tmp_path))
        assert len(str(error.value)) < 400


def test_a_picture_on_the_web_is_fetched_once(png, tmp_path, monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "a.png" in self.path else 404)
            self.end_headers()
            for byte in png if "huge" not in self.path else png * 100:  # as slow lines give it, bit by bit
                self.wfile.write(bytes([byte]))

        def log_message(self, *args):
            pass

    monkeypatch.setenv("SPATIALTHINKER_CACHE", str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_port}"
    try:
        for _ in range(2):
            assert read_bytes(as_record({"url": f"{where}/a.png?key=SECRET"}, tmp_path)) == png
        assert len(asked) == 1
        monkeypatch.setattr(images, "MOST_BYTES", len(png))
        assert read_bytes(as_record(f"{where}/other/a.png", tmp_path)) == png
        for path in ("/gone?key=SECRET", "/huge/a.png?key=SECRET"):
            with pytest.raises(OSError, match="a picture on 127.0.0.1 cannot be fetched") as error:
                read_bytes(as_record(where + path, tmp_path))
            assert "SECRET" not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()


# ---- the verdict on disk ----
def test_a_second_start_decodes_nothing(png, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALTHINKER_CACHE", str(tmp_path / "cache"))
    decoded, real = [], check_pixels
    monkeypatch.setattr(images, "check_pixels", lambda data: decoded.append(1) or real(data))

    def start():
        decoded.clear()
        passed = Passed("rows.parquet (train)")
        for data in (png, png, png[:-30]):
            try:
                passed.check({"bytes": data})
            except OSError:
                continue
        passed.save()
        return len(decoded)

    assert start() == 2 and start() == 1  # the damaged one, again
    (file,) = (tmp_path / "cache").iterdir()
    for broken in ("{", "[[1]]", "[" * 99_999):
        file.write_text(broken)
        assert start() == 2
    monkeypatch.setenv("SPATIALTHINKER_CACHE", "/proc/nowhere")  # nobody can write there
    assert start() == 2 and start() == 2 and not Path("/proc/nowhere").exists()
