"""The whole recipe of the report in one command: ViT, joint pre-training, long context, zero-vision SFT, joint RL,
PARL, evaluation, report. Every stage leaves one checkpoint; run again, a finished stage is loaded and an unfinished
one goes on where it stopped."""

import dataclasses
import json
from pathlib import Path

from baltoro.chat.tokenizer import Tokenizer
from baltoro.config import dump
from baltoro.config import load as load_config
from baltoro.model.config import PRESETS
from baltoro.model.kimi import KimiK25
from baltoro.recipe.evaluated import evaluate
from baltoro.recipe.reinforced import joint_rl, parl
from baltoro.recipe.run import Run
from baltoro.recipe.settings import RecipeConfig
from baltoro.report.headline import headline
from baltoro.report.html import write_report as write_html
from baltoro.report.progress import Progress as Display
from baltoro.report.run_folder import RunFolder, checkpoint_path
from baltoro.serve.load import Loaded, ServeConfig, open_release, threads
from baltoro.train.machine import prepare_machine
from baltoro.train.state import load_state


def run_recipe(config: RecipeConfig) -> None:
    """Everything, from wherever the run folder stands. Prints where the report lies and its most telling numbers."""
    folder = RunFolder(config.folder)
    folder.check_config(dump(config))
    with Display(config.expected_s) as display:
        run = Run(config, folder, display)
        run.supervised()
        joint_rl(run)
        parl(run)
        evaluate(run)
    report = write_html(folder.path)
    print(f"\nreport: {report}")
    for line in headline(folder.results):
        print(f"  {line}")


def write_report(config: RecipeConfig) -> None:
    """The HTML file again, from a finished run's records."""
    if not (config.folder / "results.json").exists():
        raise FileNotFoundError(f"{config.folder}: no results.json; run `baltoro recipe` first")
    print(write_html(config.folder))


def open_model(target: Path, settings: ServeConfig) -> Loaded:
    """The folder of a run or of a checkpoint; a run file stands for its run's. Raises ValueError, OSError."""
    folder = target if target.is_dir() else load_config(target, (), RecipeConfig).folder
    return open_run(folder, settings) if (folder / "checkpoints").is_dir() else open_release(folder, settings)


def open_run(folder: Path, settings: ServeConfig) -> Loaded:
    """The model of a run folder as one of its stages left it. Raises ValueError, OSError."""
    config = load_config(folder / "config.json", (), RecipeConfig)
    results = folder / "results.json"
    finished = json.loads(results.read_text())["stages"] if results.exists() else {}
    stage = settings.stage or next((name for name in ("parl", "rl", "sft") if name in finished), "")
    checkpoint = checkpoint_path(folder, stage)
    stages = sorted({path.stem for path in checkpoint.parent.glob("*.safetensors")} - {"vit"})  # of a smaller model
    if stage not in stages:
        wanted = f"checkpoint of {stage}" if stage else "finished stage from sft on"
        raise ValueError(f"{folder} has no {wanted}; choose with stage= from: {', '.join(stages) or 'none'}")
    tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
    base = PRESETS[config.model]
    yarn = None if stage in ("projector", "pretrain") else config.longctx.yarn
    text = dataclasses.replace(base.text, vocab_size=tokenizer.vocab_size, yarn=yarn)
    dtype = prepare_machine(threads(settings), settings.dtype)
    model = KimiK25(dataclasses.replace(base, text=text), tokenizer.media_pad, dtype)
    load_state(checkpoint, model)
    return Loaded(folder, [checkpoint], model, tokenizer, config.media, config.agents.rules.max_context_tokens)


def ablate_parl(config: RecipeConfig) -> None:
    """PARL again without r_parallel and without r_finish, from the same checkpoint (what each term is for)."""
    main = RunFolder(config.folder)
    begin = checkpoint_path(main.path, "rl")
    if not begin.exists():
        raise FileNotFoundError(f"{config.folder}: no finished RL stage; run `baltoro recipe` first")
    parts = {"without-parallel": {"lambda_parallel": 0.0}, "without-finish": {"lambda_finish": 0.0}}
    curves: dict[str, list[dict[str, float]]] = {}
    with Display(dict.fromkeys(("parl",), config.expected_s["parl"])) as display:
        for name, change in parts.items():
            shaping = dataclasses.replace(config.parl.shaping, **change)
            folder = RunFolder(config.folder / "ablations" / name)
            part = dataclasses.replace(config, parl=dataclasses.replace(config.parl, shaping=shaping))
            folder.check_config(dump(part))
            run = Run(part, folder, display, tokenizer=Tokenizer.load(config.folder / "tokenizer.tiktoken"))
            run.stretch()
            load_state(begin, run.model)
            parl(run)
            curves[name] = folder.metrics("parl")
    for name, curve in curves.items():
        print(name, {k: (curve[0][k], curve[-1][k]) for k in ("accuracy", "parallelism", "finish")})
