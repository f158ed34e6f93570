"""What the paper scale costs: counts that can be made by hand, and measurements that run on whatever is at hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from slimlib import costs, paper
from slimlib.evaluation import load_rows
from slimlib.scales import Scale


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    return paper.save_stand_in(tmp_path_factory.mktemp("world"), tiny=True)


def test_parameters_are_those_of_the_published_files() -> None:
    both = costs.count("VAE encoder", 64).parameters + costs.count("VAE decoder", 64).parameters
    between = (8 * 8 + 8) + (4 * 4 + 4)  # the 1 x 1 convolutions at the latent belong to neither
    assert both + between == paper.PUBLISHED["vae"]
    assert costs.count("UNet", 64).parameters == paper.PUBLISHED["unet sd21"]


def test_operations_are_those_that_are_commonly_given() -> None:
    """0.8 TFLOP for Stable Diffusion's UNet at 512 px; 4.09 and 4.47 G multiply-adds for the machines."""
    assert costs.count("UNet", 512).forward == pytest.approx(0.8e12, rel=0.02)
    assert costs.count("machine A").forward == pytest.approx(2 * 4.09e9, rel=0.02)
    assert costs.count("machine B").forward == pytest.approx(2 * 4.47e9, rel=0.02)


def test_how_costs_grow() -> None:
    small, large = (costs.count("VAE decoder", size) for size in (256, 512))
    assert 4 <= large.forward / small.forward < 4.3 and 4 <= large.kept / small.kept < 8
    plan = costs.Plan(size=256)
    twice = replace(plan, images=2 * plan.images, test_images=2 * plan.test_images)
    for one, two in zip(costs.jobs(plan), costs.jobs(twice), strict=True):
        grows = one.what not in ("stage 1", "stage 2")  # those are counted in steps
        assert two.hours(1e14) == pytest.approx((2 if grows else 1) * one.hours(1e14))
    k1, k4, k20 = (costs._decoding(replace(plan, steps=k)) for k in (1, 4, 20))
    assert (k20 - k4) / (k4 - k1) == pytest.approx(16 / 3), "each step costs the same"
    rows = costs.growth_table(plan, 1e14).splitlines()[2:]
    assert len(rows) == 6
    for row in rows:
        hours = [float(cell) for cell in row.split("|")[5:8]]
        assert hours[0] == pytest.approx(8 * hours[1], abs=0.05)


def test_the_command_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    costs.main(["--steps", "20", "--gpus", "2"])
    text = capsys.readouterr().out
    assert "hours on 2 GPU*" in text and "| decoding and judging | 300,000 |" in text and "*: extrapolated" in text
    assert all(f"| {part} |" in text for part in costs.PARTS) and "| 512 | 20 |" in text


def test_measuring_runs_on_the_cpu(world: Scale) -> None:
    rows = list(costs.measure(world, sizes=(64,), batch=2, steps=(1, 2), repeats=1, device="cpu"))
    coded = ["preprocessing", "encode", "decode, K = 1", "decode, K = 2"]
    assert [row.what for row in rows] == [*coded, "stage 1", "stage 2", *coded]
    assert [row.precision for row in rows] == ["fp32"] * 4 + ["as trained"] * 2 + ["bf16"] * 4
    assert all(row.ms > 0 and row.memory > 0 and math.isnan(row.tflops) for row in rows)
    assert costs.measured_table(rows).count("\n") == len(rows) + 1
    out_of_memory = costs.measured_table([replace(rows[0], ms=math.nan)])
    assert "does not fit" in out_of_memory


def test_the_command_measures(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "costs.csv"
    costs.main(["--measure", "--tiny", "--sizes", "64", "--batch", "1", "--device", "cpu", "--out", str(out)])
    assert "Measured on CPU" in capsys.readouterr().out
    assert {row.what for row in load_rows(out, costs.Measured)} >= {"stage 2", "decode, K = 20"}


def test_rates_are_known_for_published_sizes() -> None:
    import torch

    with torch.device("meta"):
        ldm = type("Diffusion", (), {"unet": paper.build("unet sd21")})()
    plan = costs.Plan(256, steps=4)
    assert costs._counted("decode, K = 4", 256, ldm) == costs._decoding(plan)
    known = {job.what: job.operations for job in costs.jobs(plan)}
    assert costs._counted("stage 2", 256, ldm) == known["stage 2"]
    assert costs._counted("preprocessing", 256, ldm) == known["preprocessing"]
