import random

import numpy as np

from baltoro.world.charts import sample_chart
from baltoro.world.scenes import COLOURS


def test_splits_share_no_bar():
    seen = {
        split: {
            (bar.colour, bar.height, slot)
            for rng in [random.Random(1)]
            for _ in range(3000)
            for slot, bar in enumerate(sample_chart(rng, split).bars)
        }
        for split in ("train", "heldout")
    }
    assert not seen["train"] & seen["heldout"]
    assert len(seen["train"] | seen["heldout"]) == 7 * 9 * 4


def test_heights_can_be_read_off_the_picture():
    rng = random.Random(2)
    for _ in range(300):
        chart = sample_chart(rng, rng.choice(("train", "heldout")))
        pixels = chart.render(rng).pixels.astype(int)
        assert pixels.shape[1] == 16 * len(chart.bars)
        saturated = np.ptp(pixels, axis=2) > 60  # ground and lines are grey
        tall = saturated.sum(axis=0)
        grey = np.flatnonzero(~saturated[:, 0] & (np.abs(pixels[:, 0] - pixels[0, 0]).sum(axis=1) > 20))
        assert len(grey) == 4  # the lines at 0, 3, 6 and 9
        unit = (grey[1] - grey[0]) / 3
        read: list[tuple[str, float]] = []
        for slot in range(len(chart.bars)):
            column = 16 * slot + 8
            paint = pixels[saturated[:, column], column][0]
            colour = min(COLOURS, key=lambda name: float(np.square(paint - COLOURS[name]).sum()))
            read.append((colour, tall[column] / unit))
        assert read == [(bar.colour, bar.height) for bar in chart.bars]
        assert chart.tallest.colour == max(read, key=lambda bar: bar[1])[0]
        assert chart.lowest.colour == min(read, key=lambda bar: bar[1])[0]
        assert len({height for _, height in read}) == len(read)  # no ties
