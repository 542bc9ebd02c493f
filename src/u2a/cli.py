"""The command line: ``u2a run`` does everything, and every stage can be run alone on saved records."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2a import __version__
from u2a.errors import ConfigError, U2AError
from u2a.gate import GATES, check_gate
from u2a.signals import stops_on_signals
from u2a.terminal import drop_output, escaped, flush_output, hush_libraries, use_utf8

if TYPE_CHECKING:
    from u2a.config import RunConfig
    from u2a.progress import Console

STAGES = {
    "partition": "cut the data into disjoint sets by prompt",
    "reward": "score every negative with a reward model",
    "score": "predict what unlearning each negative would do (also without a configuration file)",
    "solve": "find which negatives to unlearn and how strongly",
    "unlearn": "unlearn the weighted set and run the controls",
    "evaluate": "measure every arm on held-out data",
    "report": "write report.html and candidates.csv from the records",
}
EXIT_STATUS = """exit status:
  0    done
  1    the verdict is below --gate; a number was not finite; a solve did not converge; memory ran out
  2    bad input, or a file that cannot be written
  3    another process works in the run's directory
  130  stopped by Ctrl-C (SIGINT); the same command goes on
  141  what reads the output has gone (u2a ... | head)
  143  stopped by SIGTERM; the same command goes on"""
# Commands that a signal asks to save.
SAVING = ("run", "demo", "partition", "reward", "score", "solve", "unlearn", "evaluate", "experiment")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(
        prog="u2a",
        description="Align a language model by unlearning its bad answers.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"u2a {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {"run": "all stages, from data to an aligned model and a report", **STAGES}.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        kinds = {"reward": "YAML file, or the word train", "report": "YAML file, or the directory of a run"}
        command.add_argument("config", nargs="?", help=kinds.get(name, "YAML file (see: u2a config --print)"))
        _add_options(command)
        if name == "score":
            command.add_argument("--model", help="hub id, directory, or package:NAME")
            command.add_argument("--forget", help="negatives: prompt and completion")
            command.add_argument("--prefs", help="preference pairs: prompt, chosen, rejected")
            command.add_argument("--retain", help="ordinary instructions (optional)")
            command.add_argument("--out", help="where to write one JSON line per negative")
        if name in ("run", "evaluate", "report"):
            _add_gate(command)
        if name == "run":
            _add_dry_run(command)
        if name == "evaluate":
            command.add_argument("--robustness", action="store_true", help="also attack the result and re-measure it")
        if name == "reward":
            command.add_argument("--pairs", help="with 'train': preference pairs to train a reward head on")
            command.add_argument("--base", help="with 'train': sentence embedder or language model under the head")
            command.add_argument("--out", help="with 'train': directory of the trained reward model")
    demo = commands.add_parser("demo", help="the packaged demo: a real chat model and a help desk's bad answers")
    _add_options(demo)
    _add_gate(demo)
    _add_dry_run(demo)
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
    _add_experiment(commands)
    commands.add_parser("env", help="versions and machine, for bug reports")
    completion = commands.add_parser(
        "completion",
        help="script with which a shell completes commands and options",
        description='In bash and zsh: eval "$(u2a completion SHELL)". In fish: u2a completion fish | source',
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    commands.add_parser("metrics", help="every metric: formula, direction, range, needs and caveat")
    config = commands.add_parser("config", help="print or check options")
    config.add_argument("config", nargs="?", help="YAML file to check")
    config.add_argument("--print", action="store_true", dest="show", help="every option, default, range and meaning")
    _add_options(config)
    return parser


def _add_experiment(commands: Any) -> None:
    experiment = commands.add_parser("experiment", help="compare methods at equal compute under a fixed protocol")
    experiment.add_argument("protocol", help="YAML file of tasks, seeds, arms, budgets and tests")
    experiment.add_argument("--processes", type=int, default=1, metavar="N", help="side by side (default: 1)")
    experiment.add_argument("--only", default="", metavar="NAME,...", help="run only these arms, tasks and seeds")
    experiment.add_argument("--list", action="store_true", help="only print the state of every cell")
    experiment.add_argument("--tables", action="store_true", help="run nothing, write the tables of what there is")
    experiment.add_argument(
        "--out", type=Path, metavar="DIR", help="tables, figures and cells (default: results/ in the run)"
    )
    experiment.add_argument("--retry-failed", action="store_true", help="run cells again that did not come through")
    experiment.add_argument("--new-protocol", action="store_true", help="go on under a changed protocol")
    experiment.add_argument("--quiet", action="store_true", help="no progress")


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.OPTION=VALUE", dest="overrides", help="change an option"
    )
    command.add_argument("--preset", help="start from a preset: paper")
    command.add_argument("--quiet", action="store_true", help="only results, on standard output, and errors")


def _add_gate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gate", choices=tuple(GATES), help="exit with 1 unless the verdict is 'yes' (not-no: yes or not shown)"
    )


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="only tell memory, time and files from a short probe; write nothing"
    )
    command.add_argument("--json", action="store_true", help="with --dry-run: print the figures as JSON")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after ``u2a``; None takes those of the process.

    Returns:
        Exit status: 0; 1 for a verdict below ``--gate``, a number that is not finite, a solve that did not converge
        or too little memory; 2 for bad input or a file that cannot be written; 3 for a run's directory in which
        another process works; 130, 141 or 143 after SIGINT, a closed pipe or SIGTERM.
    """
    if arguments is None:
        use_utf8()
    options = build_parser().parse_args(arguments)
    handlers: dict[str, Callable[[argparse.Namespace], None]] = {
        "run": _run, "demo": _demo, "config": _config, "score": _score, "partition": _stage,
        "reward": _reward, "solve": _stage, "unlearn": _stage, "evaluate": _evaluate, "report": _report,
        "compare": _compare, "metrics": _metrics, "data": _data, "env": _env,
        "experiment": _experiment,
        "completion": _completion,
    }  # fmt: skip
    try:
        with stops_on_signals() if options.command in SAVING else nullcontext():
            handlers[options.command](options)
        flush_output()
    except U2AError as error:
        print(escaped(f"u2a {options.command}: {error}", keep="\n"), file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # what reads the output has seen enough, as head does
        drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"u2a {options.command}: {error} (is the path right, and writable?)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        said = f"{error}" or "interrupted"
        print(f"u2a {options.command}: {said}; what was saved is kept, the same command goes on", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 0


def _loaded(options: argparse.Namespace) -> RunConfig:
    from u2a.config_file import load_config

    if options.config is None:
        raise ConfigError("no configuration file (u2a config --print > config.yaml makes one)")
    return load_config(options.config, options.overrides, options.preset)


def _console(options: argparse.Namespace) -> Console:
    """Progress on standard error, results on standard output."""
    from u2a.progress import Console

    return Console(quiet=options.quiet, results=sys.stdout)


def _run(options: argparse.Namespace) -> None:
    _run_all(_loaded(options), options)


def _run_all(config: RunConfig, options: argparse.Namespace) -> None:
    if options.dry_run:
        _dry_run(config, options)
        return
    if options.json:
        raise ConfigError(f"{options.command}: --json belongs to --dry-run")
    from u2a.run import run

    hush_libraries()
    run(config, _console(options))
    check_gate(options.gate, Path(config.output_dir))


def _dry_run(config: RunConfig, options: argparse.Namespace) -> None:
    from u2a.forecast.dry_run import dry_run
    from u2a.forecast.text import forecast_text

    if options.gate is not None:
        raise ConfigError(f"{options.command}: --gate needs a verdict, and --dry-run has none (leave one of them out)")
    hush_libraries()
    forecast = dry_run(config, _console(options))
    print(forecast.model_dump_json(indent=1) if options.json else escaped(forecast_text(forecast), keep="\n"))


def _demo(options: argparse.Namespace) -> None:
    from u2a.config_file import load_config

    path = Path(str(package_files("u2a") / "assets" / "demo" / "config.yaml"))
    config = load_config(path, options.overrides, options.preset)
    _run_all(config, options)


def _config(options: argparse.Namespace) -> None:
    from u2a.config_file import load_config, print_options

    config = load_config(options.config, options.overrides, options.preset)
    if options.show:
        print(print_options(config), end="")
    else:
        print("the configuration is valid")


def _stage(options: argparse.Namespace) -> None:
    config = _loaded(options)
    from u2a.run import run_stage

    hush_libraries()
    run_stage(config, options.command, _console(options), getattr(options, "robustness", False))


def _evaluate(options: argparse.Namespace) -> None:
    _stage(options)
    if options.robustness:
        from u2a.run import run_stage

        run_stage(_loaded(options), "robustness", _console(options))
    if options.gate is not None:
        check_gate(options.gate, Path(_loaded(options).output_dir))


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
    from u2a.reward.train import HeadTraining, train_reward_head

    hush_libraries()
    settings = HeadTraining(max_length=config.data.max_length, device=config.model.device, seed=config.seed)
    train_reward_head(options.base, options.pairs, options.out, settings, config.data, _console(options))


def _compare(options: argparse.Namespace) -> None:
    from u2a.compare import check_ending, compare_runs, comparison_markdown, write_comparison

    if options.out is not None:
        check_ending(options.out)
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
        hush_libraries()
        model = config.model.model_copy(update={"name_or_path": options.model})
    for line in show(options.file, config.data, model, options.rows, wants_colour(sys.stdout)):
        print(encodable(line, sys.stdout))


def _env(_: argparse.Namespace) -> None:
    from u2a.environment import environment_text

    print(environment_text(), end="")


def _experiment(options: argparse.Namespace) -> None:
    only = tuple(name.strip() for name in options.only.split(",") if name.strip())
    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: expected at least 1")
    from u2a.experiment.runner import Options, list_cells, run_experiment

    hush_libraries()
    if options.list:
        print("\n".join(list_cells(options.protocol, only)))
        return
    how = Options(options.processes, only, options.retry_failed, options.new_protocol, options.quiet)
    from u2a.experiment.collect import write_found
    from u2a.experiment.kept import CELLS, restore
    from u2a.experiment.plan import Plan
    from u2a.experiment.protocol import load_protocol

    protocol = load_protocol(options.protocol)
    folder = options.out or Path(protocol.output_dir) / "results"
    restore(Plan(protocol), folder / CELLS)
    if not options.tables:
        run_experiment(options.protocol, how)
    for path in write_found(Plan(protocol), folder):
        print(path)


def _metrics(_: argparse.Namespace) -> None:
    from u2a.evaluation.metrics import described

    print(described(), end="")


def _completion(options: argparse.Namespace) -> None:
    from u2a.completion import completion_script

    print(completion_script(build_parser(), options.shell))


def _report(options: argparse.Namespace) -> None:
    if options.config is not None and Path(options.config).is_dir():
        if options.overrides or options.preset:
            raise ConfigError("report: the directory of a run has its own options (leave --set and --preset out)")
        folder = Path(options.config)
    else:
        folder = Path(_loaded(options).output_dir)
    from u2a.candidates_csv import write_candidates
    from u2a.content_hash import content_hash
    from u2a.report import write_report
    from u2a.run_records import RunRecords

    records = RunRecords.load(folder)
    print(write_report(records, folder / "report.html"))
    print(write_candidates(records, folder / "candidates.csv"))
    print(f"Content hash: {content_hash(records)}")
    check_gate(options.gate, folder)


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
    from u2a.score_files import score_files

    hush_libraries()
    given = {"forget": options.forget, "preferences": options.prefs, "retain": options.retain}
    files = {name: path for name, path in given.items() if path}
    score_files(options.model, files, Path(options.out), config, _console(options))


if __name__ == "__main__":
    sys.exit(main())
