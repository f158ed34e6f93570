"""Draw assets/readme.png: scenes, where their bits went, and what comes back. Run from the root of the repository."""

from __future__ import annotations

import matplotlib.pyplot as plt

from slimlib import SlimCodec
from slimlib.data.scenes import CLASSES, PocketScenes
from slimlib.machines import load_machine
from slimlib.measure import plots
from slimlib.measure.baselines import best_within
from slimlib.scales import ASSETS, Scale
from slimlib.utils import quiet_libraries

SCENES = (0, 1, 2)  # the first: nobody chose them
QUALITY = 0.6


def main() -> None:
    quiet_libraries()
    plt.style.use(ASSETS / "slim.mplstyle")
    scale = Scale.from_name("pocket")
    codec, judge = SlimCodec.from_pretrained(scale), load_machine(scale.machine_b)
    test = PocketScenes("test")
    fig, axes = plt.subplots(len(SCENES), 4, figsize=(9.2, 2.75 * len(SCENES)))
    for row, index in zip(axes, SCENES, strict=True):
        scene = test[index]
        stream = codec.compress(scene.image, QUALITY)
        report = codec.inspect(stream)
        webp, webp_image = best_within(scene.image, "webp", len(stream))
        decoded = codec.decompress(stream)
        plots.show(row[0], scene.image, f"scene: {CLASSES[scene.label]}")
        plots.show_map(row[1], scene.image, report.bit_map, "where the bits went")
        for ax, name, size, image in (
            (row[2], "SLIM", len(stream), decoded),
            (row[3], "WebP", len(webp), webp_image),
        ):
            guess = judge.top5(image)[0][0]
            plots.show(ax, image)
            colour = "black" if guess == CLASSES[scene.label] else "#b2182b"
            ax.set_title(f"{name}, {size} bytes: {guess}", color=colour, fontsize=10)
    fig.savefig(ASSETS / "readme.png", dpi=100)


if __name__ == "__main__":
    main()
