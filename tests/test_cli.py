"""The command line: what it writes, what it says, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_codec import make_world, picture

from slimlib.__main__ import main

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tiny_world, tmp_path_factory.mktemp("cli") / "world")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture(70, 50).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def slim(world: Path, *arguments: object) -> int:
    return main([*map(str, arguments), "--scale", str(world)])


def test_there_and_back(world: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream, back = photo.with_suffix(".slim"), photo.with_name("back.webp")
    assert slim(world, "compress", photo, stream, "--quality", 0.3, "--caption", "A red fox", "--steps", 2) == 0
    said = capsys.readouterr()
    assert f"{stream.stat().st_size} bytes" in said.out
    assert '"a red fox"' in said.out
    assert "bpp" in said.out
    assert "ms" in said.out
    assert "loading" in said.err
    assert slim(world, "inspect", stream) == 0
    said = capsys.readouterr()
    assert "70 x 50" in said.out
    assert "2 steps" in said.out
    assert "latent" in said.out
    assert slim(world, "decompress", stream, back, "--steps", 1) == 0
    assert Image.open(back).size == (70, 50)
    assert sorted(p.name for p in photo.parent.iterdir()) == ["back.webp", "photo.png", "photo.slim"]


def test_caption_choices(world: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = photo.with_suffix(".slim")
    assert slim(world, "compress", photo, stream, "--caption", "none") == 0
    assert "no caption" in capsys.readouterr().out
    assert slim(world, "compress", photo, stream, "--force", "--caption", "auto", "--seed", 4, "--t0", 100) == 0
    assert slim(world, "inspect", stream) == 0
    assert "t0 = 100" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(world: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream, back = photo.with_suffix(".slim"), photo.with_name("back.png")
    stream.write_bytes(b"precious")
    assert slim(world, "compress", photo, stream, "--caption", "none") == 1
    assert "--force" in capsys.readouterr().err
    assert stream.read_bytes() == b"precious"
    assert slim(world, "compress", photo, stream, "--caption", "none", "--force") == 0
    assert stream.read_bytes() != b"precious"
    back.write_bytes(b"precious")
    assert slim(world, "decompress", stream, back) == 1
    assert back.read_bytes() == b"precious"
    assert slim(world, "decompress", stream, back, "--force") == 0
    assert Image.open(back).size == (70, 50)
    assert slim(world, "compress", photo, photo, "--force") == 1
    assert "input" in capsys.readouterr().err
    assert Image.open(photo).size == (70, 50)


def test_a_failure_leaves_the_old_file_alone(world: Path, photo: Path) -> None:
    stream, back = photo.with_suffix(".slim"), photo.with_name("back.png")
    stream.write_bytes(b"broken")
    back.write_bytes(b"precious")
    assert slim(world, "decompress", stream, back, "--force") == 1
    assert back.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["compress", "none.png", "out.slim"], "there is no file none.png"),
        (["compress", "text.png", "out.slim"], "not a picture"),
        (["compress", "photo.png", "nowhere/out.slim"], "there is no folder"),
        (["compress", "photo.png", "."], "is a folder"),
        (["compress", "photo.png", "out.slim", "--caption", "x" * 300], "300 characters"),
        (["compress", "photo.png", "out.slim", "--t0", "5000"], "t0 is 5000"),
        (["decompress", "none.slim", "out.png"], "there is no file none.slim"),
        (["decompress", "empty.slim", "out.png"], "empty"),
        (["decompress", "photo.png", "out.png"], "not a .slim stream"),
        (["decompress", "cut.slim", "out.png"], "damaged"),
        (["decompress", "cut.slim", "out.xyz"], ".png"),
        (["decompress", ".", "out.png"], "folder"),
        (["inspect", "cut.slim"], "damaged"),
        (["inspect", "none.slim"], "there is no file"),
    ],
)
def test_failures_say_why(
    world: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(photo.parent)
    Path("text.png").write_text("no picture")
    Path("empty.slim").write_bytes(b"")
    assert slim(world, "compress", photo, "cut.slim", "--caption", "none") == 0
    Path("cut.slim").write_bytes(Path("cut.slim").read_bytes()[:-5])
    capsys.readouterr()
    assert slim(world, *arguments) == 1
    said = capsys.readouterr()
    assert reason in said.err
    assert "Traceback" not in said.err
    assert not said.out
    assert not any(Path(name).exists() for name in ("out.slim", "out.png", "out.xyz"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["squeeze"],
        ["compress", "photo.png"],
        ["compress", "a.png", "b.slim", "--quality", "1.5"],
        ["compress", "a.png", "b.slim", "--quality", "high"],
        ["compress", "a.png", "b.slim", "--steps", "-1"],
        ["compress", "a.png", "b.slim", "--seed", "x"],
        ["inspect", "a.slim", "--force"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_unknown_scale(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(photo), str(photo.with_suffix(".slim")), "--scale", "pockett"]) == 1
    assert "pockett" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    check = (
        "import sys\nfrom slimlib.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", check], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout
    assert "--quality" in result.stdout


def test_as_a_process(world: Path, photo: Path) -> None:
    command = [sys.executable, "-m", "slimlib", "compress", str(photo), str(photo.with_suffix(".slim"))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    result = subprocess.run(
        [*command, "--scale", str(world)],
        cwd=photo.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    assert "bytes" in result.stdout
    assert result.stderr == f"loading the models ({world}) ...\n"
    assert photo.with_suffix(".slim").stat().st_mode & 0o777 == photo.stat().st_mode & 0o777
