import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.config import dump, load


@dataclass(frozen=True)
class Optimiser:
    kind: Literal["muon", "adamw"]
    rate: float
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    folder: Path
    optimiser: Optimiser
    mixture: dict[str, float]
    stages: tuple[str, ...] = ()
    passes: Literal[1, 2] = 1
    resume: bool = True
    corpus: Path | None = None
    phases: tuple[Optimiser, ...] = ()
    limits: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give a number from 0")


TEXT = """
name = "nano"
seed = 3
folder = "runs/nano"
mixture = { text = 0.9, vision = 1 }
stages = ["vit", "sft"]

[optimiser]
kind = "muon"
rate = 3e-3

[[phases]]
kind = "adamw"
rate = 1
betas = [0.5, 1]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nano.toml"
    path.write_text(TEXT)
    return path


EXPECTED = Run(
    name="nano",
    seed=3,
    folder=Path("runs/nano"),
    optimiser=Optimiser("muon", 0.003),
    mixture={"text": 0.9, "vision": 1.0},
    stages=("vit", "sft"),
    phases=(Optimiser("adamw", 1.0, (0.5, 1.0)),),
)


def test_a_run_file_becomes_the_dataclass_it_describes(file: Path):
    run = load(file, [], Run)
    assert run == EXPECTED
    # An integer where a number is asked must not stay an integer: 1 == 1.0 hides it.
    assert type(run.mixture["vision"]) is float
    assert type(run.phases[0].rate) is float


def test_overrides_replace_values_in_the_order_given(file: Path):
    run = load(
        file,
        [
            "seed=1",
            "seed=2",
            "name=a b",
            "optimiser.rate=1",
            "mixture.code=0.5",
            'stages=["rl"]',
            "corpus=x=y",
            "resume=false",
        ],
        Run,
    )
    assert (run.seed, run.name, run.optimiser, run.stages) == (2, "a b", Optimiser("muon", 1.0), ("rl",))
    assert (run.corpus, run.resume) == (Path("x=y"), False)
    assert run.mixture == {"text": 0.9, "vision": 1.0, "code": 0.5}


def test_an_override_may_open_a_table_that_the_file_lacks(file: Path):
    assert load(file, ["limits.steps=4", "limits.calls=9"], Run).limits == {"steps": 4, "calls": 9}


def test_an_override_sets_one_key_only(file: Path):
    run = load(file, ["name=1\nseed = 9"], Run)
    assert (run.name, run.seed) == ("1\nseed = 9", 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.rat=1", "unknown key optimiser.rat; did you mean optimiser.rate?"),
        ("zzz=1", "unknown key zzz; known keys: name, seed, folder"),
        ("phases=[{kind='muon', rate=1, beta=2}]", "unknown key phases[0].beta; did you mean phases[0].betas?"),
        ("phases=[{kind='muon'}]", "key phases[0].rate is missing; give a number"),
        ("seed=1.0", "seed is a number (1.0); give an integer"),
        ("seed=true", "seed is a boolean (True); give an integer"),
        ("name=7", "name is an integer (7); give a string"),
        ("optimiser.rate=fast", "optimiser.rate is a string ('fast'); give a number"),
        ("optimiser.rate=false", "optimiser.rate is a boolean (False); give a number"),
        ("resume=1", "resume is an integer (1); give a boolean"),
        ("optimiser=3", "optimiser is an integer (3); give a table"),
        ("mixture=[1.0]", "mixture is an array ([1.0]); give a table"),
        ("mixture.text=[]", "mixture.text is an array ([]); give a number"),
        ("stages=vit", "stages is a string ('vit'); give an array"),
        ("stages=['vit', 2]", "stages[1] is an integer (2); give a string"),
        ("corpus=1", "corpus is an integer (1); give a path (a string)"),
        ("seed=2020-01-01", "seed is a date or time"),
        ("optimiser.betas=[1]", "optimiser.betas has 1 items; give exactly 2"),
        ("optimiser.kind=sgd", "optimiser.kind is 'sgd'; choose one of 'muon', 'adamw'"),
        ("passes=true", "passes is True; choose one of 1, 2"),
        ("passes=2.0", "passes is 2.0; choose one of 1, 2"),
        ("seed=-1", "seed is -1; give a number from 0"),
    ],
)
def test_a_departure_from_the_schema_names_file_and_key_and_what_to_do(file: Path, override: str, message: str):
    with pytest.raises(ValueError, match="^" + re.escape(f"{file}: {message}")):
        load(file, [override], Run)


@pytest.mark.parametrize("override", ["seed", "=1", "optimiser..rate=1", "seed.x=1"])
def test_an_override_of_the_wrong_form_is_quoted(file: Path, override: str):
    with pytest.raises(ValueError, match=re.escape(repr(override))):
        load(file, [override], Run)


def test_a_required_key_has_no_silent_default(file: Path):
    file.write_text(TEXT.replace('kind = "muon"', ""))
    with pytest.raises(ValueError, match=r"key optimiser\.kind is missing; give one of 'muon', 'adamw'"):
        load(file, [], Run)


def test_broken_toml_and_a_missing_file_are_named(file: Path, tmp_path: Path):
    file.write_text("a = \n")
    with pytest.raises(ValueError, match=r"nano\.toml is not valid TOML.*line 1"):
        load(file, [], Run)
    file.write_bytes(b"a = '\xff'")
    with pytest.raises(ValueError, match=r"nano\.toml is not valid TOML"):
        load(file, [], Run)
    with pytest.raises(FileNotFoundError, match=r"other\.toml does not exist; give"):
        load(tmp_path / "other.toml", [], Run)


def test_the_dump_of_a_run_says_everything_in_plain_values():
    plain = dump(EXPECTED)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["optimiser"] == {"kind": "muon", "rate": 0.003, "betas": [0.9, 0.95]}
    assert plain["phases"] == [{"kind": "adamw", "rate": 1.0, "betas": [0.5, 1.0]}]
    assert plain["folder"] == "runs/nano"
    assert "corpus" not in plain


@given(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(alphabet=st.characters(codec="utf-8")))
def test_an_override_of_any_value_arrives_unchanged(whole: int, number: float, flag: bool, text: str):
    @dataclass(frozen=True)
    class Values:
        whole: int
        number: float
        flag: bool
        text: str

    # JSON writes these as TOML does, but for infinity and DEL.
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    shown = json.dumps(number).replace("Infinity", "inf")
    overrides = [f"whole={whole}", f"number={shown}", f"flag={json.dumps(flag)}", f"text={quoted}"]
    assert load(Path("/dev/null"), overrides, Values) == Values(whole, number, flag, text)
    assert tomllib.loads(f"v = {quoted}")["v"] == text
