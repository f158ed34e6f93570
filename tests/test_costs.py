"""What the paper scale costs: counts that can be made by hand, and tables that hold what their columns say."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import timm
import torch
from torch import nn

from slimlib.__main__ import main
from slimlib.measure import costs
from slimlib.measure.costs import PARTS, Plan, build, count, decoding, published


@pytest.mark.parametrize("part", published("parameters"))
def test_networks_have_the_published_numbers_of_parameters(part: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(published(part)).parameters()) == published("parameters")[part]


@pytest.mark.parametrize(("part", "name"), [("machine_a", "resnet50.tv_in1k"), ("machine_b", "convnext_tiny.fb_in1k")])
def test_machines_are_prepared_as_timm_says(part: str, name: str) -> None:
    theirs = timm.get_pretrained_cfg(name).to_dict()  # type: ignore[union-attr]
    ours = published(part)
    assert ours["architecture"] == theirs["architecture"]
    for key, value in ours["pretrained_cfg"].items():
        assert theirs[key] == (tuple(value) if isinstance(value, list) else value), key


def test_counting_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen convolution and a ReLU, at 224 px."""
    monkeypatch.setattr(costs, "build", lambda config: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    found, pixels = count.__wrapped__("machine A"), 224 * 224
    assert found.parameters == 8 * 3 * 9 + 8
    assert found.forward == found.backward == 2 * 8 * 3 * 9 * pixels, "no gradient of weights"
    assert found.kept == 4 * (3 + 8) * pixels, "what went in and what came out, and no weights"


def test_counts_are_those_that_are_commonly_given() -> None:
    """0.8 TFLOP for Stable Diffusion's UNet at 512 px; 4.09 and 4.47 G multiply-adds for the machines."""
    assert count("UNet", 512).forward == pytest.approx(0.8e12, rel=0.02)
    assert count("machine A").forward == pytest.approx(2 * 4.09e9, rel=0.02)
    assert count("machine B").forward == pytest.approx(2 * 4.47e9, rel=0.02)
    between = (8 * 8 + 8) + (4 * 4 + 4)  # the 1 x 1 convolutions at the latent belong to neither half of the VAE
    halves = count("VAE encoder").parameters + count("VAE decoder").parameters
    assert halves + between == published("parameters")["vae"]
    assert count("UNet", family="sd15").parameters == published("parameters")["unet_sd15"]
    assert count("text encoder", family="sd15").forward < count("text encoder").forward
    small, large = (count("VAE decoder", size) for size in (256, 512))
    assert 4 <= large.forward / small.forward < 4.3 and 4 <= large.kept / small.kept < 8
    learned = count("compressor")
    assert 2 < learned.backward / learned.forward < 2.5, "all weights, and the latent"
    with pytest.raises(KeyError):
        count("UNET")


def test_jobs_add_up_their_parts() -> None:
    plan = Plan(images=7, qualities=3, train_images=5, stage1_steps=2, stage1_batch=3, stage2_steps=5, stage2_batch=7)
    work, part = costs.jobs(plan), {name: count(name) for name in PARTS}
    assert work.times.tolist() == [5, 6, 35, 7, 21]

    def once(*names: str) -> int:
        return sum(part[name].forward for name in names)

    def both(*names: str) -> int:
        return once(*names) + sum(part[name].backward for name in names)

    look = once("VAE encoder", "captioner") + 2 * both("machine A")
    assert work.operations.to_dict() == {
        "preprocessing": look,
        "stage 1": both("compressor"),
        "stage 2": both("compressor", "UNet", "VAE decoder", "machine A") + once("text encoder"),
        "encoding": look + 3 * once("compressor"),
        "decoding and judging": decoding(plan) + once("machine A", "machine B"),
    }
    assert decoding(plan) == 2 * (4 * once("UNet") + once("text encoder")) + once("VAE decoder")
    assert decoding(replace(plan, guided=False, steps=20)) == 20 * once("UNet") + once("text encoder", "VAE decoder")
    every, learned = (4 * sum(part[name].parameters for name in names) for names in (PARTS, ["compressor"]))
    rest = every - sum(4 * part[name].parameters for name in ("captioner", "machine B"))
    looking = sum(4 * part[name].parameters for name in ("VAE encoder", "captioner", "machine A"))
    assert work.weights.tolist() == [looking, 4 * learned, rest + 3 * learned, every, every]
    kept = [part[name].kept for name in ("machine A", "compressor")]
    through = sum(part[name].kept for name in ("UNet", "VAE decoder", "machine A", "compressor"))
    assert work.activations.tolist() == [*kept, through, kept[0], 0]


def test_tables_in_handy_units() -> None:
    parts, unet = costs.parts_table(), count("UNet")
    assert list(parts.index) == list(PARTS)
    handy = [unet.parameters / 1e6, unet.forward / 1e9, unet.backward / 1e9, unet.kept / 1e6]
    assert parts.loc["UNet"].tolist() == handy
    assert parts.isna().sum(axis=1).to_dict() == {part: 2 * (part in ("text encoder", "captioner")) for part in PARTS}
    plan = Plan()
    table, work = costs.jobs_table(plan, rate=1e14, gpus=4, price=3), costs.jobs(plan)
    row, job = table.loc["stage 2"], work.loc["stage 2"]
    hours = job.times * job.operations / 1e14 / 3600
    handy = [job.times, job.operations / 1e12, job.weights / 1e9, job.activations / 1e9, hours, hours / 4, 3 * hours]
    assert row.tolist() == pytest.approx(handy)
    names = ["GPU hours*", "hours on 4 GPU*", "dollars*"]
    assert table.loc["all", names].tolist() == pytest.approx(table.loc[work.index, names].sum().tolist())
    assert table.loc["all"].isna().sum() == 4


def test_growth() -> None:
    plan = Plan(images=100)
    table = costs.growth_table(plan, 1e14, sizes=(64, 128), gpus=(1, 8))
    assert table[["size [px]", "K"]].values.tolist() == [[size, k] for size in (64, 128) for k in (1, 4, 20)]
    for _, row in table.iterrows():
        one = replace(plan, size=int(row["size [px]"]), steps=int(row["K"]))
        assert row["decoding a picture [TFLOP]"] == pytest.approx(decoding(one) / 1e12)
        share = 200 * one.steps * count("UNet", one.size).forward / decoding(one)
        assert row["UNet's share [%]"] == pytest.approx(share)
        hours = costs.jobs_table(one, 1e14)["GPU hours*"]["all"]
        assert row[["hours on 1 GPU*", "hours on 8 GPU*"]].tolist() == pytest.approx([hours, hours / 8])


def test_the_command_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("costs --steps 20 --gpus 2 --tflops 100 --share 0.5 --price 4 --images 600".split()) == 0
    text = capsys.readouterr().out
    assert all(f"\n{part} " in text for part in PARTS) and "*: extrapolated" in text and "100 TFLOP/s at 50%" in text
    expected = costs.jobs_table(Plan(steps=20, images=600), 5e13, 2, 4)
    assert "hours on 2 GPU*" in text and costs.as_text(expected) in text and "images=600" in text
    assert costs.as_text(costs.growth_table(Plan(steps=20, images=600), 5e13)) in text
    assert main(["costs", "--size", "7"]) == 1
    assert "argument --size: 7 is not a multiple of 64" in capsys.readouterr().err
    digits = costs.as_text(pd.DataFrame({"x": [1234567.0, 0.00123456, math.nan]})).split()
    assert digits[2::2] == ["1,234,567", "0.001235", "-"]
