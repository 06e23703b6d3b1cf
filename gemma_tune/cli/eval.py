"""`gemma-tune eval`: scores a model's answers, and compares it with its base or another model."""

import math
from pathlib import Path
from typing import Any

from gemma_tune.cli.flags import ADAPTER, setting_flags
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.errors import ConfigError, EvaluationError
from gemma_tune.runtime.shell import gemma_tune_command


def _run(invocation: Invocation) -> dict[str, Any]:
    """Evaluates on data, or by a suite."""
    return _run_suite(invocation) if invocation.flags.suite else _run_on_data(invocation)


def _run_on_data(invocation: Invocation) -> dict[str, Any]:
    """Evaluates on data, prints the tables, and writes the report."""
    config, flags, console = invocation.config(), invocation.flags, invocation.output.console
    if flags.junit:
        raise ConfigError("--junit is written for a suite: name one with --suite=….")
    from gemma_tune import pipeline
    from gemma_tune.cli import evaluation_tables as tables
    from gemma_tune.evaluation.evaluation_report import judge_sentence, write_evaluation

    options = pipeline.EvaluationOptions(
        metrics=_names(flags.metrics),
        metric_functions=flags.metric,
        slice_columns=_names(flags.by),
        against=flags.against,
        num_questions=flags.num_questions,
        judge=_judge(flags),
    )
    folder = Path(flags.output or _default_output(config.model.source)).expanduser()
    evaluation = pipeline.evaluate_answers(
        config, flags.adapter, data_is_given=invocation.is_given("data"), options=options
    )
    console.print(tables.figures_table(evaluation))
    for column in options.slice_columns:
        console.print(tables.slices_table(evaluation, column))
    if (worst := tables.worst_answers_table(evaluation)) is not None:
        console.print(worst)
    if judged := judge_sentence(evaluation):
        console.print(judged, markup=False)
    for name, need in evaluation.left_out.items():
        console.print(f"{name} was left out: {need}", style="dim", markup=False)
    write_evaluation(folder, evaluation)
    console.print(f"Saved in {folder}: evaluation.html, answers.jsonl and evaluation.json.", markup=False)
    heldout = {model.name: dict(model.heldout) for model in evaluation.models}
    base = heldout.get(pipeline.BASE, {}) if len(heldout) > 1 else heldout[evaluation.model.name]
    return {
        **evaluation.to_dict(),
        "base": base,
        "tuned": dict(evaluation.model.heldout) if len(heldout) > 1 else {},
        "output": str(folder),
        "next": [gemma_tune_command("chat", model=config.model.source, adapter=flags.adapter)],
    }


def _judge(flags: Any) -> Any:
    """Returns the judge that the flags name, or None."""
    if not flags.judge:
        for name in ("judge_model", "judge_key_file", "rubric"):
            if flags[name].present:
                raise ConfigError(f"--{name} needs the judge's URL: --judge=http://…/v1.")
        return None
    from gemma_tune.evaluation.judge.judge import Judge, load_rubric, read_judge_key
    from gemma_tune.runtime.backend import cache_dir

    return Judge(
        flags.judge,
        flags.judge_model,
        read_judge_key(flags.judge_key_file),
        load_rubric(flags.rubric),
        cache_dir() / "judge_replies.jsonl",
        seed=flags.seed or 0,
    )


def _run_suite(invocation: Invocation) -> dict[str, Any]:
    """Runs a suite, prints its checks, and raises EvaluationError if one has failed."""
    config, flags, output = invocation.config(), invocation.flags, invocation.output
    for name in ("metrics", "metric", "by", "data", "judge"):
        if flags[name].present:
            raise ConfigError(
                f"--{name} has no effect with --suite: the suite says what is asked and how it is scored."
            )
    from gemma_tune import pipeline
    from gemma_tune.cli import evaluation_tables as tables
    from gemma_tune.evaluation.suites.junit import write_junit

    result = pipeline.run_suite(config, flags.adapter, flags.suite, flags.against)
    output.console.print(tables.checks_table(result))
    failed = [check for check in result.checks if check.passed is False]
    for check in failed:
        if check.failed_rows:
            output.console.print(tables.failed_rows_table(check))
    if flags.junit:
        write_junit(Path(flags.junit).expanduser(), result.suite.name, result.checks)
    plain = {
        "suite": result.suite.name,
        "models": list(result.model_names),
        "passed": result.has_passed,
        "checks": [
            {
                "part": check.part,
                "wanted": check.wanted,
                "passed": check.passed,
                "observed": check.observed if math.isfinite(check.observed) else None,
                "message": check.message,
            }
            for check in result.checks
        ],
    }
    if not failed:
        return {**plain, "next": [gemma_tune_command("chat", model=config.model.source, adapter=flags.adapter)]}
    output.write_result(plain)
    raise EvaluationError(
        f"{len(failed)} of {len(result.checks)} checks of the suite {result.suite.name} have failed: "
        + "; ".join(f"{check.part}: {check.wanted}" for check in failed)
        + "."
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _default_output(source: str) -> Path:
    """Returns the folder for the files: in the workdir of a run, else beside the runs."""
    workdir = Path(source).expanduser()
    return workdir / "evaluation" if (workdir / "config.json").exists() else Path("runs/evaluation")


VERB = Verb(
    name="eval",
    usage="--model=WORKDIR [--data=FILE] [--by=COLUMN]",
    description="""Lets a model answer the questions of a file, scores the answers by metrics that suit the data, and
    compares them with its base model's, or another model's, by a paired test. Every figure has an interval of 95 %.
    Writes a report with all answers, the worst first. --model is the workdir of a run, or any other model, with or
    without --adapter. Without --data, a run is scored on what it held out.""",
    examples=(
        "gemma-tune eval --model=runs/mine",
        "gemma-tune eval --model=runs/mine --data=other_questions.jsonl --metrics=f1,rougeL,bleu --by=topic",
        "gemma-tune eval --model=runs/second --against=runs/first",
        "gemma-tune eval --model=runs/mine --suite=smartphone_support --junit=junit.xml",
        "gemma-tune eval --model=demo --adapter=runs/mine/adapter --data=sample:smartphone_support/heldout",
    ),
    flags=(
        *setting_flags("model"),
        ADAPTER,
        Flag(
            "against",
            "Model to compare with. Without it, the base of a tuned model; none: no other.",
            group="Model",
        ),
        *setting_flags("data", "max_length", "batch_size", "mesh", "precision", "quantize", "block_size", "on_error"),
        *setting_flags("columns", "prompt_template", "on_role_order"),
        Flag("num_questions", "Maximum number of questions that are answered, chosen at random. 0: all.", 200, "Data",
             lower=0),
        Flag("metrics", "Metrics with commas between. Without it, those that suit the data.", (), "Evaluation"),
        Flag("metric", "A metric of your own, a function in a file: my_file.py:score. May be repeated.",
             group="Evaluation", is_repeated=True),
        Flag("by", "Columns of the data, with commas between, by which the figures are divided.", (), "Evaluation"),
        Flag("suite", "Folder of a suite, or the name of one that is shipped (smartphone_support): what must hold. "
             "Exits with 1 if something doesn't.", group="Evaluation"),
        Flag("junit", "File for the checks of the suite as JUnit XML.", group="Evaluation"),
        Flag("judge", "URL of an API like OpenAI's, such as http://127.0.0.1:8000/v1, whose model compares both "
             "models' answers in both orders, or grades one model's from 1 to 5.", group="Evaluation"),
        Flag("judge_model", "Name of the judge there.", group="Evaluation"),
        Flag("judge_key_file", "File with the judge's API key. Without it, the variable OPENAI_API_KEY.",
             group="Evaluation"),
        Flag("rubric", "Text file that tells the judge what a good answer is.", group="Evaluation"),
        *setting_flags("max_new_tokens"),
        Flag("output", "Folder for the files. Without it, WORKDIR/evaluation of a run, otherwise runs/evaluation."),
        *setting_flags("seed"),
    ),
    run=_run,
)  # fmt: skip
