"""The command `psyray`: run, plan, watch and report a run."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from psyray.errors import PsyrayError

app = typer.Typer(
    help="Active preference learning on Ray: teach language models what only experts can judge.\n\n"
    "Research software; no substitute for professional care.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
Settings = Annotated[list[str] | None, typer.Argument(help="settings over the file's, for example loop.rounds=1")]
RunFolder = Annotated[
    Path, typer.Argument(help="the run: its folder or URI, for example runs/demo or s3://bucket/demo")
]

TrackingUri = Annotated[
    str | None,
    typer.Option(
        help="MLflow's registry; none: the run's own (its track.uri), for a name MLFLOW_TRACKING_URI, else SQLite in "
        "--runs"
    ),
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file, for example configs/demo.yaml")],
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and check all that needs no hardware")
    ] = False,
    serve: Annotated[bool, typer.Option("--serve", help="end with one request to the served result")] = False,
    until: Annotated[str | None, typer.Option(help="end after this stage, for example responses or round-1")] = None,
) -> None:
    """Run the whole path; the same command again goes on where it was cut off.

    SIGTERM stops it as Ctrl-C does: nothing is lost, and the exit status is 130.

    Examples:  psyray run configs/demo.yaml
               psyray run configs/demo.yaml speeches.path=questions.jsonl run.path=runs/mine
               psyray run configs/psychocounsel-3b.yaml --dry-run
               psyray run configs/demo.yaml --until judgements
    """
    from psyray.config import load_config
    from psyray.status import expected_stages
    from psyray.stopping import STOPPED, last_stage

    loaded = load_config(config, settings)
    if dry_run:
        from psyray.plan import show_plan

        if until:
            last_stage(until, expected_stages(loaded.model_dump(mode="json")))
        show_plan(loaded, out)
        return
    from psyray.pipeline import run_pipeline

    try:
        report = run_pipeline(loaded, serve=serve, until=until, say=say)
    except KeyboardInterrupt:
        say("stopped; nothing is lost: the same command goes on from here")
        raise typer.Exit(STOPPED) from None
    folder = report.parent
    say(f"report: {report}")
    if not until:
        say(f"serve:  serve run serve.app:build run={folder}")
    say(f"state:  psyray status {folder}")


@app.command()
def status(folder: RunFolder) -> None:
    """Show how far a run is, also while it runs."""
    from psyray.status import show_status

    show_status(folder, out)


@app.command()
def report(folder: RunFolder) -> None:
    """Write RUN/report.html anew from what the run has so far."""
    from psyray.report import write_report

    say(f"report: {write_report(folder)}")


@app.command()
def fetch(
    mirror: Annotated[str, typer.Argument(help="the run's URI or run.mirror, for example s3://bucket/demo")],
    folder: Annotated[
        Path | None, typer.Argument(help="the run folder to fetch it into, new or half there; none: the URI's own")
    ] = None,
) -> None:
    """Fetch a run from its mirror: the finished stages of its latest pass, and the ledger where this machine has none.

    Examples:  psyray fetch s3://bucket/demo
               psyray fetch s3://bucket/demo runs/demo
    """
    from psyray.active.ledger import ledger_file
    from psyray.homes import run_path
    from psyray.mirror import Mirror
    from psyray.run import fetch_run

    path = run_path(folder or Path(mirror))
    names = fetch_run(Mirror(mirror, path, ledger_file(path), say))
    say(f"{path}: {len(names)} finished stages; state: psyray status {path}")


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="a run or model folder, the id of a served answer, NAME or NAME@ALIAS")],
    runs: Annotated[Path, typer.Option(help="the folder that holds the run folders")] = Path("runs"),
    tracking_uri: TrackingUri = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Tell what a model was made from: rounds, labels, judge, responses, speeches, stage by stage.

    Examples:  psyray lineage runs/demo
               psyray lineage 3f2a9c0e1b77 --runs runs
               psyray lineage psyray-policy@champion
    """
    import json

    from psyray.lineage import facts, find, show
    from psyray.mlflow_client import registry_beside
    from psyray.run import find_run

    runs = find_run(runs)
    known = facts(find(model, runs, tracking_uri or registry_beside(runs)))
    if as_json:
        say(json.dumps(known, indent=1))
    else:
        show(known, out)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="a finished run's folder, the id of an export, or NAME/VERSION")],
    runs: Annotated[Path, typer.Option(help="the folder that holds the run folders")] = Path("runs"),
    tracking_uri: TrackingUri = None,
) -> None:
    """Make a registered model the champion: servers that follow the registry change over without losing a request.

    Examples:  psyray promote runs/demo
               psyray promote psyray-policy/3      an earlier version: going back
               psyray promote psyray-policy/3 --tracking-uri http://mlflow.internal:5000
    """
    from psyray.registry import promote
    from psyray.run import find_run

    for name, version in promote(model, find_run(runs), tracking_uri).items():
        say(f"{name}: version {version} is champion")


@app.command()
def adapter(
    folder: Annotated[
        Path, typer.Argument(help="the adapter of a round, such as RUN/stages/round-2/policy/ID/adapter")
    ],
    to: Annotated[Path, typer.Option("--to", help="the new adapter's folder")],
) -> None:
    """Write what all rounds up to one have learned as one LoRA adapter on the start, to serve rounds on one engine.

    Example:  psyray adapter runs/demo/stages/round-2/policy/3f2a9c0e1b77/adapter --to adapters/round-2
    """
    from psyray.engines.vllm import adapter_base
    from psyray.lora import chain, stack

    parts = chain(folder)
    rank = stack(parts, to)
    say(f"{to}: rank {rank}, of {len(parts)} adapter{'s' * (len(parts) > 1)} on {adapter_base(to)}")


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option("--to", help="the data set's folder, new or an earlier export's")],
    full: Annotated[
        bool, typer.Option("--full", help="also margin, source, ids, crisis, topics and whole conversations")
    ] = False,
    rounds: Annotated[bool, typer.Option("--rounds", help="also the pairs of the online rounds")] = False,
    licence: Annotated[
        str | None,
        typer.Option(help="as Hugging Face spells it: cc-by-4.0; none: an earlier export's there, or unknown"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="replace README.md, data/, rounds/ and psyray.json among other files")
    ] = False,
) -> None:
    """Write a run's pairs as a Hugging Face data set with a data card; `datasets.load_dataset(FOLDER)` reads it.

    Example:  psyray export runs/demo --to pairs --licence cc-by-nc-4.0
    """
    from psyray.data.export import export_run

    known = export_run(folder, to, full=full, rounds=rounds, force=force, licence=licence)
    pairs = ", ".join(f"{s['pairs']} {s['split']} pairs" for s in known["splits"])
    say(f"{to}: {pairs}; licence: {known['licence']}; card: {to}/README.md")


@app.command()
def conversations(
    folder: RunFolder,
    to: Annotated[Path | None, typer.Option("--to", help="write the decided choices as JSONL pairs")] = None,
) -> None:
    """Tell how people chose between two policies in conversation (docs/serving.md).

    Examples:  psyray conversations runs/demo
               psyray conversations runs/demo --to choices.jsonl
    """
    from psyray.active.conversations import show
    from psyray.active.place import place_of

    show(place_of(folder), to, say)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="an export, or Parquet in the published layout")],
    b: Annotated[Path, typer.Argument(help="the other one")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Compare two exports: shared pairs, pairs in one only, swapped labels, changed ratings.

    Example:  psyray compare pairs-before pairs-after
    """
    import json

    from psyray.data.compare import compare, show

    found = compare(a, b)
    if as_json:
        say(json.dumps(found, indent=1))
    else:
        show(found, out)


@app.command()
def agreement(
    labelled: Annotated[Path, typer.Argument(help="YAML file of a human-labelled set, as in configs/agreement")],
    settings: Settings = None,
    config: Annotated[Path | None, typer.Option(help="a run's YAML file: its judge, rubric, engine, ledger")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the set's files; none: the YAML file's own")] = None,
    reward: Annotated[Path | None, typer.Option(help="measure this reward model's folder instead of the judge")] = None,
    heads: Annotated[Path | None, typer.Option(help="with --reward: heads.npz, whose mean counts")] = None,
    budget: Annotated[int | None, typer.Option(min=0, help="questions the judge may be asked; none: all")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="ask again so many times, to see whether answers hold")] = 0,
    repeat_sample: Annotated[int, typer.Option(min=1, help="comparisons that are asked again")] = 100,
    length_tolerance: Annotated[float, typer.Option(min=0, max=1, help="lengths that differ less are alike")] = 0.1,
) -> None:
    """Measure how far a judge or a reward model agrees with people, by stratum, beside what length alone reaches.

    Examples:  psyray agreement configs/agreement/tiers.yaml --data data/pair --repeats 1
               psyray agreement configs/agreement/pairwise.yaml --config configs/psychocounsel-3b.yaml --budget 500
               psyray agreement configs/agreement/votes.yaml --data data/counsel-chat --reward runs/demo/model
    """
    from psyray.config import load_config
    from psyray.evaluate.agreement_report import show
    from psyray.evaluate.measure import Request, measure
    from psyray.evaluate.rulings import Again

    again = Again(repeats, repeat_sample)
    request = Request(labelled, data, reward, heads, budget, again, length_tolerance)
    try:
        found, folder = measure(load_config(config, settings), request, say)
    except KeyboardInterrupt:
        say("stopped; no answer is lost: the same command goes on from here")
        raise typer.Exit(130) from None
    show(found, out)
    say(f"figures: {folder / 'agreement.json'}, picture: {folder / 'agreement.png'}")


@app.command()
def label_efficiency(
    labelled: Annotated[Path, typer.Argument(help="YAML file of a human-labelled set, as in configs/agreement")],
    settings: Settings = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with an `efficiency` section")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the set's files; none: the YAML file's own")] = None,
    folder: Annotated[Path, typer.Option("--out", help="where tables, plot and JSON go")] = Path("label-efficiency"),
    dev: Annotated[bool, typer.Option("--dev", help="on the prompts kept for choosing settings")] = False,
) -> None:
    """Measure how many labels each acquisition strategy needs, on a human-labelled set, beside random.

    Examples:  psyray label-efficiency configs/agreement/tiers.yaml --data data/pair
               psyray label-efficiency configs/agreement/tiers.yaml --data data/pair --dev efficiency.ridge=0.3
    """
    from psyray.config import load_config
    from psyray.evaluate.efficiency_report import show
    from psyray.evaluate.label_efficiency import Request, measure

    loaded = load_config(config, settings)
    least = loaded.speeches.min_chars
    request = Request(labelled, folder, loaded.efficiency, loaded.track, data, "dev" if dev else "report", least)
    show(measure(request, say), out)


@app.command()
def layers(
    labelled: Annotated[Path, typer.Argument(help="YAML file of a human-labelled set, as in configs/agreement")],
    settings: Settings = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with an `efficiency` section")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the set's files; none: the YAML file's own")] = None,
    model: Annotated[str | None, typer.Option(help="a model's folder or hub id; none: efficiency.model")] = None,
    folder: Annotated[Path, typer.Option("--out", help="where table, plot and JSON go")] = Path("layers"),
) -> None:
    """Measure which layer of a model, and which pooling, tells what people prefer; ends with the settings to copy.

    Works on the prompts kept for choosing settings (efficiency.dev_share), each read by a head that did not see it.
    Features are kept: the same command again computes only what is missing.

    Examples:  psyray layers configs/agreement/tiers.yaml --data data/pair
               psyray layers configs/agreement/tiers.yaml --data data/pair --model RUN/stages/reward/ID/model
    """
    from psyray.cluster import use_gpu
    from psyray.config import load_config
    from psyray.evaluate.layers import Request, measure
    from psyray.evaluate.layers_report import show

    loaded = load_config(config, settings)
    section = loaded.efficiency.model_copy(update={"model": model} if model else {})
    gpu, least = use_gpu(loaded.engine.device), loaded.speeches.min_chars
    request = Request(labelled, folder, section, loaded.track, data, gpu, least)
    try:
        show(measure(request, say), out)
    except KeyboardInterrupt:
        say("stopped; features are kept: the same command goes on from here")
        raise typer.Exit(130) from None


@app.command()
def prepare() -> None:
    """Unpack the embedded model and compile DeepSpeed's extension, so that the first run need not."""
    from psyray.models import embedded_model
    from psyray.train import compile_extension

    say(f"model: {embedded_model()}")
    say(f"extension: {compile_extension()}")


def say(line: str) -> None:
    """One line to the user."""
    out.print(line, markup=False)


def main(arguments: list[str] | None = None) -> None:
    """The command's entry point: an error that the user can mend is one line and exit code 1."""
    from psyray.stopping import sigterm_is_ctrl_c

    sigterm_is_ctrl_c()
    try:
        app(arguments)
    except PsyrayError as error:
        _end(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end(f"{error}; make room and give the same command again: what was finished before is kept")


def _end(error: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
