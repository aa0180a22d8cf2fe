"""Gymnasium's own environments through our interface, and ours through Gymnasium's own checker."""

import asyncio
import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from baltoro.agent.loop import Limits
from baltoro.chat.messages import Image, ToolCall, assistant
from baltoro.rollout.conform import conform
from baltoro.rollout.desktop import env as desktop
from baltoro.rollout.env import Session
from baltoro.rollout.gym import ToGymnasium, action_schema, from_gymnasium

LIMITS = Limits(40, 9999, 200)


class Grid(gymnasium.Env[np.ndarray, np.int64]):
    """Two moves to the right end it; every step costs 0.25; renders its place."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode = "rgb_array"
    action_space = spaces.Discrete(2, start=1)
    observation_space = spaces.Box(0, 9, (1,), np.int64)

    def reset(self, *, seed: int | None = None, options: dict[str, object] | None = None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(3))
        self.end = self.place + 2
        return np.array([self.place]), {}

    def step(self, action: np.int64):
        self.place += 1 if action == 2 else -1
        return np.array([self.place]), -0.25, self.place == self.end, False, {}

    def render(self):
        picture = np.zeros((4, 8, 3), np.uint8)
        picture[:, self.place % 8] = 255
        return picture


def act(action: object, turn: int):
    return assistant(tool_calls=(ToolCall(f"functions.act:{turn}", "act", json.dumps({"action": action})),))


def test_a_gymnasium_environment_is_played_and_scored() -> None:
    env = from_gymnasium(Grid, "grid", "1", "Go right.", LIMITS)

    async def main() -> None:
        session = Session(env)
        opening = await session.reset(env.sample(3), 3)
        assert session.tools[0].parameters["properties"] == {"action": {"type": "integer", "minimum": 1, "maximum": 2}}
        (picture,) = [part for part in opening[-1].content if isinstance(part, Image)]
        start = int(picture.pixels[0, :, 0].argmax())
        columns, said = list[int](), ""
        for turn, action in enumerate((2, 1, 2, 2)):
            (message,) = (await session.step(act(action, turn))).observation
            shown = [part.pixels for part in message.content if isinstance(part, Image)]
            said = message.text
            columns.append(int(shown[0][0, :, 0].argmax()) - start)
        assert columns == [1, 0, 1, 2]
        assert "The episode is over." in said
        step = await session.step(act(2, 4))
        assert step.observation[0].text == "error: the episode is over; answer"
        step = await session.step(assistant("done"))
        assert (step.reward, step.info["signals"]["steps"]) == (-1.0, 4.0)
        await session.close()

    asyncio.run(main())


@pytest.mark.parametrize("env", ["FrozenLake-v1", "CartPole-v1", "Pendulum-v1", "Blackjack-v1", "Grid"])
def test_gymnasium_environments_conform(env: str) -> None:
    make = Grid if env == "Grid" else lambda: gymnasium.make(env)
    checks = asyncio.run(conform(from_gymnasium(make, env, "1", "Play.", LIMITS)))
    assert [check for check in checks if check.faults] == []


def test_action_spaces_by_hand() -> None:
    assert action_schema(spaces.MultiDiscrete([2, 3])) == {
        "type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2,
    }  # fmt: skip
    nested = spaces.Dict({"say": spaces.Text(5), "move": spaces.Box(-1, 1, (2,), np.float32)})
    assert action_schema(nested) == {
        "type": "object",
        "properties": {
            "say": {"type": "string", "maxLength": 5},
            "move": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        },
        "required": ["move", "say"],  # gymnasium orders them by name
    }
    with pytest.raises(ValueError, match="has no JSON form"):
        action_schema(spaces.Graph(spaces.Discrete(2), None))


def test_an_action_outside_of_its_space_is_told() -> None:
    env = from_gymnasium(lambda: gymnasium.make("Pendulum-v1"), "pendulum", "1", "Swing up.", LIMITS)

    async def main() -> None:
        session = Session(env)
        await session.reset(env.sample(0), 0)
        step = await session.step(act([9.0], 0))
        assert step.observation[0].text.startswith("error: the action must lie in Box(-2.0, 2.0")
        await session.close()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
def test_ours_passes_the_checker_of_gymnasium() -> None:
    env = ToGymnasium(desktop)
    check_env(env, skip_render_check=True, skip_close_check=True)
    observation, info = env.reset(seed=5)
    text, first = observation
    assert text.startswith("Press the buttons")
    assert [tool["name"] for tool in info["tools"]] == ["click", "type_text", "scroll"]
    observation, reward, terminated, truncated, _ = env.step({"tool": "scroll", "arguments": {"rows": 1}})
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (observation[0] != first).any()
    _, reward, terminated, _, info = env.step({"answer": "done"})
    assert (reward, terminated, info["signals"]["actions"]) == (0.0, True, 1.0)
    again, _ = env.reset(options={"task": desktop.sample(5)})
    assert np.array_equal(again[1], first)
    env.close()
