"""The command line: every command is one call into the API. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from limbeck.errors import InputError, LimbeckError

app = typer.Typer(
    name="limbeck",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Distil something large or slow into something small and fast.",
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a field: --set train.epochs=3 (repeatable).")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    settings: Settings = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/NAME).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the folder holds and start anew.")] = False,
    resume_from: Annotated[str | None, typer.Option("--from", help="Go on from this checkpoint, step-N, instead of the newest.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: train, compare, report. A run that was cut short goes on where it stood."""
    from limbeck.recipe import Recipe
    from limbeck.report.console import show
    from limbeck.run import distill as run_recipe

    result = run_recipe(Recipe.read(recipe, settings or []), run=run, fresh=fresh, resume_from=resume_from, style="quiet" if quiet else "auto")
    if _first_process():
        show(result.summary, Console())
        print(f"report: {result.report}")


@app.command()
def record(
    recipe: Annotated[Path, typer.Argument(help="A YAML record recipe.")],
    settings: Settings = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder or URL of the record (default: records/NAME).")] = None,
    check: Annotated[bool, typer.Option("--check", help="Check every file of a finished record against its checksum.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a teacher once and keep its answers. A recording that was cut short goes on where it stood."""
    from limbeck.recipe import RecordRecipe
    from limbeck.recording import record as run_recipe
    from limbeck.report.console import show_record

    made = run_recipe(RecordRecipe.read(recipe, settings or []), output=output, style="quiet" if quiet else "auto")
    if check:
        made.verify()
    if _first_process():
        show_record(made.summary(), Console())


@app.command()
def evaluate(
    run: RunFolder,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a run's artefact anew on its test data (or on others: --set data.source=…)."""
    import json

    from limbeck.run import evaluate_run

    values = evaluate_run(run, settings or [])
    print(json.dumps(values, indent=2) if as_json else "\n".join(f"{name:16} {value:.6g}" for name, value in values.items()))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("compare.html"),
) -> None:
    """Put several runs side by side on one page."""
    from limbeck.report import compare as page
    from limbeck.report.console import show
    from limbeck.run import read_summary

    if len(runs) < 2:
        raise InputError("compare needs two runs or more.", fix="limbeck compare RUN RUN")
    summaries = [read_summary(folder) for folder in runs]
    page.write(summaries, output)
    for summary in summaries:
        show(summary, Console())
    print(f"page: {output}")


@app.command()
def report(run: RunFolder) -> None:
    """Write a run's report.html anew from its results."""
    from limbeck.report import html
    from limbeck.report.console import show
    from limbeck.run import read_summary

    summary = read_summary(run)
    html.write(summary, run / "report.html")
    show(summary, Console())
    print(f"report: {run / 'report.html'}")


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Literal["onnx", "hf", "diffusers", "safetensors"], typer.Option(help="The format.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File or folder to write.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Import the model code that the artefact names, even outside limbeck.")] = False,
) -> None:
    """Write a run's artefact in another form."""
    from limbeck.export import export as write

    print(write(run, to, output, trust_imports=trust))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Show one method and its knobs.")] = None) -> None:
    """List the methods with paper and state, or show one."""
    from limbeck.listing import print_method, print_methods

    print_methods() if name is None else print_method(name)


@app.command()
def new(
    method: Annotated[str, typer.Argument(help="A method's name; `limbeck methods` lists them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The recipe to write (default: METHOD.yaml).")] = None,
) -> None:
    """Write a commented recipe for a method."""
    from limbeck.listing import write_recipe

    print(write_recipe(method, output))


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Which claims; none: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A reduced version, for a look; writes no evidence.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the claim recipes are.")] = Path("recipes/claims"),
    evidence: Annotated[Path, typer.Option(help="Where the results go.")] = Path("docs/evidence"),
    quiet: Quiet = False,
) -> None:
    """Re-run the claims that the methods are known for, and write the evidence."""
    from limbeck.claims import check

    check(names or [], folder=folder, evidence=evidence, quick=quick, style="quiet" if quiet else "auto")


def _first_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong input, 128 + n stopped by signal n."""
    try:
        app()
    except LimbeckError as error:
        print(f"limbeck: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("limbeck: interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
