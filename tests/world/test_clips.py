import random

import numpy as np

from baltoro.chat.messages import Clip
from baltoro.world.clips import sample_event, sample_motion
from baltoro.world.scenes import COLOURS


def painted(clip: Clip) -> np.ndarray:
    """Which pixels [t, h, w] are not ground. A resting or moving shape leaves most of the picture free."""
    packed = clip.frames.astype(int) @ np.array([65536, 256, 1])
    colours, counts = np.unique(packed, return_counts=True)
    return packed != colours[counts.argmax()]


def colour(pixels: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.square(pixels.mean(axis=0) - COLOURS[name]).sum()))


def test_motion_goes_where_it_says_and_nowhere_else():
    rng = random.Random(1)
    step = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for _ in range(300):
        motion = sample_motion(rng, rng.choice(("train", "heldout")))
        clip = motion.render(rng)
        assert clip.frames.shape == (4, 48, 48, 3)
        mask = painted(clip)
        assert len(set(mask.sum(axis=(1, 2)).tolist())) == 1  # never cut off
        centres = np.array([np.argwhere(frame).mean(axis=0) for frame in mask])
        moves = np.diff(centres, axis=0)
        speed = np.abs(moves).max()
        assert round(speed, 6) in (6, 7, 8)
        np.testing.assert_allclose(moves, [np.multiply(step[motion.direction], speed)] * 3)
        assert colour(clip.frames[mask]) == motion.colour


def test_events_happen_when_and_as_they_say():
    rng = random.Random(2)
    for _ in range(400):
        event = sample_event(rng, rng.choice(("train", "heldout")))
        clip = event.render(rng)
        assert (clip.frames.shape, clip.fps) == ((8, 48, 48, 3), 1.0)
        changed = np.flatnonzero((np.diff(clip.frames.astype(int), axis=0) != 0).any(axis=(1, 2, 3)))
        assert changed.tolist() == [event.second - 1]  # one change, seen first in the frame at `second` seconds
        mask = painted(clip)
        before, after = mask[event.second - 1].any(), mask[event.second].any()
        kinds = {(False, True): "appears", (True, False): "vanishes", (True, True): "changes"}
        assert kinds[bool(before), bool(after)] == event.kind
        first = event.second - 1 if before else event.second
        assert colour(clip.frames[first][mask[first]]) == event.colour
        if event.kind == "changes":
            assert colour(clip.frames[-1][mask[-1]]) == event.into != event.colour


def test_splits_share_no_motion_and_no_event():
    rng = random.Random(3)
    motions = {
        split: {(m.colour, m.shape, m.ground, m.direction) for m in (sample_motion(rng, split) for _ in range(3000))}
        for split in ("train", "heldout")
    }
    assert not motions["train"] & motions["heldout"]
    assert (len(motions["train"]), len(motions["heldout"])) == (288, 48)
    # Colour, shape and ground of a held-out motion have been seen with its direction, two by two.
    for pick in ((0, 1, 3), (0, 2, 3), (1, 2, 3)):
        train, heldout = ({tuple(one[i] for i in pick) for one in motions[split]} for split in ("train", "heldout"))
        assert heldout <= train
    events = {
        split: {(e.colour, e.shape, e.kind, e.second) for e in (sample_event(rng, split) for _ in range(6000))}
        for split in ("train", "heldout")
    }
    assert not events["train"] & events["heldout"]
    assert len(events["train"] | events["heldout"]) == 7 * 4 * 3 * 7
    assert {event[:3] for event in events["train"]} == {event[:3] for event in events["heldout"]}
