import io
from dataclasses import replace

from rich.console import Console

from limbeck.report import console
from limbeck.report.summary import Arm, Outcome, RunSummary


def printed(summary, *, terminal, width=100):
    out = io.StringIO()
    console.show(summary, Console(file=out, force_terminal=terminal, width=width, color_system=None))
    return out.getvalue().replace("\u00a0", " ")


def test_the_table_has_every_arm_and_column(run):
    for terminal in (True, False):
        text = printed(run, terminal=terminal)
        lines = text.splitlines()
        for name in ("Accuracy", "Parameters", "MACs", "Bytes", "Latency"):
            assert name in text
        row = next(line for line in lines if "Student distilled" in line)
        for value in ("88.30 ± 0.34 %", "50.0 k", "150 k", "195 KiB", "1.20 ms"):
            assert value in row
        assert "Distilled − alone: +3.20 ± 0.07 points. Distillation helped" in " ".join(text.split())


def test_plain_text_is_aligned_and_carries_no_codes(run):
    out = io.StringIO()
    console.show(run, Console(file=out, width=40))
    text = out.getvalue()
    assert "\x1b" not in text
    assert text == console.plain(run) + "\n"
    header, *rows = text.splitlines()[1:5]
    assert {line.index("%") for line in rows} == {header.index("Accuracy") + len("Accuracy") - 1}


def test_names_are_not_markup(run):
    odd = replace(run, title="[red]title[/red]", arms=(Arm("alone", "[bold]x[/bold]", (Outcome(0, 0.5),)),))
    for terminal in (True, False):
        assert "[red]title[/red]" in printed(odd, terminal=terminal)
        assert "[bold]x[/bold]" in printed(odd, terminal=terminal)


def test_what_is_missing_is_not_available(run):
    bare = RunSummary("bare", (Arm("distilled", "Student", (Outcome(0, 0.5),)),))
    row = next(line for line in printed(bare, terminal=False).splitlines() if line.startswith("Student"))
    assert row.split() == ["Student", "50.00", "%", "n/a", "n/a", "n/a", "n/a"]
    assert "was not trained alone" in printed(bare, terminal=False)
    assert "This run has no student." in printed(RunSummary("none", ()), terminal=True)
