"""A run's report: one HTML file with the curves, the figures and the answers side by side.

It loads nothing from elsewhere.
"""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.runtime.atomic_files import write_text

REPORT_FILE = "report.html"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .45rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; } .number { text-align: right; font-variant-numeric: tabular-nums; }
table.figures { width: auto; }
figure { margin: 1rem 0; background: white; border-radius: .5rem; padding: .5rem; }
figure svg { width: 100%; height: auto; }
.answers td { width: 25%; overflow-wrap: anywhere; } details { margin-top: 1rem; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; }
"""


def write_report(
    workdir: Path, config: dict[str, Any], result: dict[str, Any], metrics: Sequence[dict[str, Any]]
) -> Path:
    """Writes report.html.

    Args:
        workdir: The run's folder.
        config: `Config.to_dict()`.
        result: `RunResult.to_dict()`.
        metrics: Rows of metrics.jsonl.
    """
    parts = [
        f"<h1>{html.escape(config['model']['source'])} tuned on {html.escape(config['data']['source'])}</h1>",
        _figures(result),
        f"<figure>{_curves(metrics)}</figure>" if metrics else "",
        _answers(result["samples"]),
        _data(result["data"]),
        f"<details><summary>Settings</summary><pre>{html.escape(_settings(config))}</pre></details>",
    ]
    path = workdir / REPORT_FILE
    write_text(path, html_document("gemma_tune report", parts))
    return path


def html_document(title: str, parts: Sequence[str]) -> str:
    """Returns a whole HTML file of these pieces of HTML, in the reports' style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def as_svg(figure: Any) -> str:
    """Returns a matplotlib figure as an element of an HTML file."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figures(result: dict[str, Any]) -> str:
    before, after = result["heldout_before"], result["heldout_after"]
    rows = []
    for name, label, style in (
        ("loss", "Held-out loss", ".4f"),
        ("perplexity", "Held-out perplexity", ".2f"),
        ("token_accuracy", "Token accuracy", ".1%"),
    ):
        if name in before and name in after:
            rows.append((label, format(before[name], style), format(after[name], style)))
    table = "".join(
        f"<tr><th>{label}</th><td class=number>{b}</td><td class=number>{a}</td></tr>" for label, b, a in rows
    )
    scored = (
        f"<p>{result['num_answers_right']} of {result['num_answers_scored']} held-out questions got the wanted "
        "answer.</p>"
        if result["num_answers_scored"]
        else ""
    )
    header = "<tr><th></th><th class=number>before</th><th class=number>after</th></tr>"
    steps = (
        f"<p>{result['num_steps']} steps, best at step {result['best_step']}; "
        f"{result['num_trainable_parameters']:,} trained parameters.</p>"
    )
    return (f"<table class=figures>{header}{table}</table>" if rows else "") + scored + steps


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    """Draws training and held-out loss, and the learning rate, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, rates = figure.subplots(1, 2, width_ratios=(2, 1))
    steps = [row for row in metrics if "loss" in row]
    heldout = [row for row in metrics if "heldout_loss" in row]
    losses.plot(
        [row["step"] for row in steps], [row["loss"] for row in steps], color="#7aa6da", linewidth=1.2, label="training"
    )
    losses.plot(
        [row["step"] for row in heldout],
        [row["heldout_loss"] for row in heldout],
        color="#c0392b",
        marker="o",
        markersize=4,
        label="held out",
    )
    losses.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    losses.legend(frameon=False)
    rates.plot([row["step"] for row in steps], [row["learning_rate"] for row in steps], color="#555")
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return as_svg(figure)


def _answers(samples: Sequence[dict[str, str]]) -> str:
    if not samples:
        return ""
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(sample[name])}</td>" for name in ("question", "base_answer", "tuned_answer", "reference")
        )
        + "</tr>"
        for sample in samples
    )
    header = "<tr><th>Question</th><th>Base model</th><th>Tuned model</th><th>Wanted</th></tr>"
    return f"<h2>Held-out questions</h2><table class=answers>{header}{rows}</table>"


def _data(data: dict[str, Any]) -> str:
    labels = {
        "num_rows": "rows read",
        "num_unreadable": "unreadable",
        "num_empty": "empty",
        "num_control_tokens": "with control tokens",
        "num_duplicates": "duplicates",
        "num_in_heldout": "with a held-out question",
        "num_truncated": "shortened",
        "num_overlong_dropped": "too long, dropped",
        "num_without_target": "nothing left to learn",
        "num_train": "for training",
        "num_heldout": "held out",
    }
    items = ", ".join(f"{data[key]} {label}" for key, label in labels.items() if data[key])
    return f"<h2>Data</h2><p>{html.escape(items)}.</p>"


def _settings(config: dict[str, Any]) -> str:
    from gemma_tune.settings import flatten

    return "\n".join(f"{path} = {value!r}" for path, value in flatten(config).items())
