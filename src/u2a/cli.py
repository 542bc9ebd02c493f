"""The command line: ``u2a run`` does everything, and every stage can be run alone on saved records."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING

from u2a import __version__
from u2a.errors import ConfigError, U2AError
from u2a.terminal import escaped

if TYPE_CHECKING:
    from u2a.config import RunConfig

STAGES = {
    "partition": "cut the data into disjoint sets by prompt",
    "reward": "score every negative with a reward model",
    "score": "predict what unlearning each negative would do (also without a configuration file)",
    "solve": "find which negatives to unlearn and how strongly",
    "unlearn": "unlearn the weighted set and run the controls",
    "evaluate": "measure every arm on held-out data",
    "report": "write report.html from the records",
}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(prog="u2a", description="Align a language model by unlearning its bad answers.")
    parser.add_argument("--version", action="version", version=f"u2a {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {"run": "all stages, from data to an aligned model and a report", **STAGES}.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        what = "YAML file, or the word train" if name == "reward" else "YAML file (see: u2a config --print)"
        command.add_argument("config", nargs="?", help=what)
        _add_options(command)
        if name == "score":
            command.add_argument("--model", help="hub id, directory, or package:NAME")
            command.add_argument("--forget", help="negatives: prompt and completion")
            command.add_argument("--prefs", help="preference pairs: prompt, chosen, rejected")
            command.add_argument("--retain", help="ordinary instructions (optional)")
            command.add_argument("--out", help="where to write one JSON line per negative")
        if name == "evaluate":
            command.add_argument("--robustness", action="store_true", help="also attack the result and re-measure it")
        if name == "reward":
            command.add_argument("--pairs", help="with 'train': preference pairs to train a reward head on")
            command.add_argument("--base", help="with 'train': sentence embedder or language model under the head")
            command.add_argument("--out", help="with 'train': directory of the trained reward model")
    demo = commands.add_parser("demo", help="the packaged demo: a real chat model and a help desk's bad answers")
    _add_options(demo)
    compare = commands.add_parser("compare", help="set several runs side by side, with paired intervals")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="output directory of an evaluated run")
    compare.add_argument("--arm", default="after", help="arm compared (after: the solution)")
    compare.add_argument("--out", type=Path, help="also write it: .html, .md or .json")
    data = commands.add_parser("data", help="look at data files")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    shown = actions.add_parser("show", help="tokens with the answer mask, template, lengths, duplicates, conflicts")
    shown.add_argument("file", help=".jsonl, .json, .csv, .parquet, or hub:OWNER/NAME[:SPLIT]")
    shown.add_argument("--model", help="whose tokenizer to use: hub id, directory, or package:NAME (default: words)")
    shown.add_argument("--rows", type=int, default=3, help="rows shown (default: 3)")
    _add_options(shown)
    commands.add_parser("env", help="versions and machine, for bug reports")
    commands.add_parser("metrics", help="every metric: formula, direction, range, needs and caveat")
    config = commands.add_parser("config", help="print or check options")
    config.add_argument("config", nargs="?", help="YAML file to check")
    config.add_argument("--print", action="store_true", dest="show", help="every option, default, range and meaning")
    _add_options(config)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.OPTION=VALUE", dest="overrides", help="change an option"
    )
    command.add_argument("--preset", help="start from a preset: paper")
    command.add_argument("--quiet", action="store_true", help="no progress")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after ``u2a``; None takes those of the process.

    Returns:
        Exit status: 0; 1 for a number that is not finite or a solve that did not converge; 2 for bad input.
    """
    options = build_parser().parse_args(arguments)
    handlers: dict[str, Callable[[argparse.Namespace], None]] = {
        "run": _run, "demo": _demo, "config": _config, "score": _score, "partition": _partition,
        "reward": _reward, "solve": _stage, "unlearn": _stage, "evaluate": _evaluate, "report": _report,
        "compare": _compare, "metrics": _metrics, "data": _data, "env": _env,
    }  # fmt: skip
    try:
        handlers[options.command](options)
    except U2AError as error:
        print(escaped(f"u2a {options.command}: {error}", keep="\n"), file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"u2a {options.command}: {error} (is the path right, and writable?)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"u2a {options.command}: interrupted; completed stages are kept, run it again to go on", file=sys.stderr)
        return 130
    return 0


def _loaded(options: argparse.Namespace) -> RunConfig:
    from u2a.config_file import load_config

    if options.config is None:
        raise ConfigError("no configuration file (u2a config --print > config.yaml makes one)")
    return load_config(options.config, options.overrides, options.preset)


def _run(options: argparse.Namespace) -> None:
    _run_all(_loaded(options), options.quiet)


def _run_all(config: RunConfig, quiet: bool) -> None:
    from u2a.progress import Console
    from u2a.run import run

    _hush_libraries()
    run(config, Console(quiet=quiet))


def _hush_libraries() -> None:
    """Keep the loading bars and internal deprecation notes of transformers off the user's terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _demo(options: argparse.Namespace) -> None:
    from u2a.config_file import load_config

    path = Path(str(package_files("u2a") / "assets" / "demo" / "config.yaml"))
    config = load_config(path, options.overrides, options.preset)
    _run_all(config, options.quiet)


def _config(options: argparse.Namespace) -> None:
    from u2a.config_file import load_config, print_options

    config = load_config(options.config, options.overrides, options.preset)
    if options.show:
        print(print_options(config), end="")
    else:
        print("the configuration is valid")


def _partition(options: argparse.Namespace) -> None:
    config = _loaded(options)
    from u2a.run import run_stage

    run_stage(config, "partition", options.quiet)


def _stage(options: argparse.Namespace) -> None:
    config = _loaded(options)
    from u2a.run import run_stage

    _hush_libraries()
    run_stage(config, options.command, options.quiet)


def _evaluate(options: argparse.Namespace) -> None:
    _stage(options)
    if options.robustness:
        from u2a.run import run_stage

        run_stage(_loaded(options), "robustness", options.quiet)


def _reward(options: argparse.Namespace) -> None:
    given = [name for name in ("pairs", "base", "out") if getattr(options, name)]
    if options.config != "train":
        if given:
            raise ConfigError(f"reward: --{given[0]} belongs to u2a reward train")
        _stage(options)
        return
    missing = [f"--{name}" for name in ("pairs", "base", "out") if name not in given]
    if missing:
        raise ConfigError(f"reward train: {', '.join(missing)} missing")
    from u2a.config_file import load_config

    config = load_config(None, options.overrides, options.preset)
    from u2a.progress import Console
    from u2a.reward.train import HeadTraining, train_reward_head

    _hush_libraries()
    settings = HeadTraining(max_length=config.data.max_length, device=config.model.device, seed=config.seed)
    train_reward_head(options.base, options.pairs, options.out, settings, config.data, Console(quiet=options.quiet))


def _compare(options: argparse.Namespace) -> None:
    from u2a.compare import compare_runs, comparison_markdown, write_comparison

    found = compare_runs(options.runs, options.arm)
    print(comparison_markdown(found), end="")
    if options.out is not None:
        print(write_comparison(found, options.out))


def _data(options: argparse.Namespace) -> None:
    from u2a.config_file import load_config

    config = load_config(None, options.overrides, options.preset)
    from u2a.data_show import show
    from u2a.terminal import encodable, wants_colour

    model = None
    if options.model is not None:
        _hush_libraries()
        model = config.model.model_copy(update={"name_or_path": options.model})
    for line in show(options.file, config.data, model, options.rows, wants_colour(sys.stdout)):
        print(encodable(line, sys.stdout))


def _env(_: argparse.Namespace) -> None:
    from u2a.environment import environment_text

    print(environment_text(), end="")


def _metrics(_: argparse.Namespace) -> None:
    from u2a.evaluation.metrics import described

    print(described(), end="")


def _report(options: argparse.Namespace) -> None:
    config = _loaded(options)
    from u2a.report import write_report
    from u2a.run_records import RunRecords

    folder = Path(config.output_dir)
    print(write_report(RunRecords.load(folder), folder / "report.html"))


def _score(options: argparse.Namespace) -> None:
    given = [name for name in ("model", "forget", "prefs", "retain", "out") if getattr(options, name)]
    if options.config is not None:
        if given:
            raise ConfigError(f"score: give a configuration file or --{given[0]} ..., not both")
        _stage(options)
        return
    missing = [f"--{name}" for name in ("model", "forget", "prefs", "out") if not getattr(options, name)]
    if missing:
        raise ConfigError(f"score: {', '.join(missing)} missing (or give a configuration file)")
    from u2a.config_file import load_config

    config = load_config(None, options.overrides, options.preset)
    from u2a.progress import Console
    from u2a.run import score_files

    _hush_libraries()
    given = {"forget": options.forget, "preferences": options.prefs, "retain": options.retain}
    files = {name: path for name, path in given.items() if path}
    score_files(options.model, files, Path(options.out), config, Console(quiet=options.quiet))


if __name__ == "__main__":
    sys.exit(main())
