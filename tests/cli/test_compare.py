"""`gemma-tune compare`: what it prints and writes, and what it says to mistakes."""

import json

import pytest

from gemma_tune.models.sources.source import parse_schemed

FEW = ["--max_length=96", "--max_new_tokens=4", "--max_tokens=300"]


@pytest.fixture
def questions(write):
    rows = [
        {"prompt": f"Where is feature {i} | please?", "completion": f"In <b>{i}</b>, my friend."} for i in range(20)
    ]
    return write("questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_table_answers_and_files(call, questions, tmp_path):
    folder = tmp_path / "out"
    command = ["compare", "--reference=tiny", f"--data={questions}", *FEW]
    code, out, err = call(*command, "--candidates=tiny,tiny@int4", f"--output={folder}")
    assert code == 0, err
    for text in ("answer tokens", "reference", "memory", "KL, mean", "same likeliest token", "100 %",
                 "loss increase", "perplexity", "reading, tokens/s", "writing, tokens/s", "wanted", "Next:"):  # fmt: skip
        assert text in " ".join(out.split()), text
    assert {path.name for path in folder.iterdir()} == {f"comparison.{kind}" for kind in ("json", "md", "png", "html")}
    report = json.loads((folder / "comparison.json").read_text())
    reference, itself, int4 = report["models"]
    assert [model["name"] for model in report["models"]] == ["tiny", "tiny", "tiny@int4"]
    assert reference["divergence"] is None and itself["divergence"]["agreement"] == 1.0
    assert itself["divergence"]["mean_kl"] == 0.0 < int4["divergence"]["mean_kl"] <= int4["divergence"]["p99_kl"]
    assert int4["memory_bytes"] < reference["memory_bytes"] / 5
    assert int4["disk_bytes"] == int4["memory_bytes"] and not int4["has_files"]
    assert reference["disk_bytes"] is None  # Tiny models are made up.
    assert 0 < report["num_tokens"] <= 300 < report["num_tokens_in_data"] and report["num_examples"] < 20
    assert len(report["questions"]) == 3 and all(len(model["answers"]) == 3 for model in report["models"])
    assert itself["answers"] == reference["answers"]

    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "comparison.html").read_text()
    assert "<svg" in page and "tiny@int4" in page and "In &lt;b&gt;" in page and "<b>" not in page
    assert 'src="' not in page and 'href="http' not in page.split("</svg>")[1]
    markdown = (folder / "comparison.md").read_text()
    assert "| KL, mean | – | 0 |" in markdown and "In &lt;b>" in markdown and "\\| please?" in markdown


@pytest.mark.nightly
def test_json_and_default_candidates(call, questions, tmp_path):
    code, out, err = call("compare", "--reference=tiny@int8", f"--data={questions}", *FEW, "--num_answers=0",
                          f"--output={tmp_path}", "--json")  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert [model["name"] for model in result["models"]] == ["tiny@int8", "tiny@nf4", "tiny@int4"]
    assert result["next"] == ["gemma-tune chat --model=tiny --quantize=nf4"]
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert {key: result[key] for key in written} == written


@pytest.mark.nightly
def test_directories_count_their_files_and_a_path_with_an_at_wins(call, questions, tmp_path, tiny):
    """Another name, the same weights: KL 0."""
    folder = tmp_path / "kept@int8"
    tiny().save_to_preset(str(folder))
    assert parse_schemed(str(folder)) == (str(folder), "")
    assert parse_schemed(f"{folder}@nf4") == (str(folder), "nf4")
    code, out, err = call("compare", "--reference=tiny", f"--candidates={folder}", f"--data={questions}", *FEW,
                          "--num_answers=1", f"--output={tmp_path / 'out'}", "--json")  # fmt: skip
    assert code == 0, err
    _, kept = json.loads(out)["models"]
    assert kept["name"] == str(folder) and kept["divergence"]["mean_kl"] == 0.0 and kept["has_files"]
    assert kept["disk_bytes"] == (folder / "model.weights.h5").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--reference=tiny", "--candidates=tiny@int9"],
            1,
            "'tiny@int9': there is no scheme 'int9'. Did you mean int8",
        ),
        (["--reference=tiny", "--candidates=tiny@int8,gemma3_1bb"], 1, "no model 'gemma3_1bb'. Did you mean gemma3_1b"),
        (["--reference=tinny"], 1, "There is no model 'tinny'. Did you mean tiny"),
        (["--reference=tiny:gemma3", "--candidates=tiny:gemma4"], 1, "tiny:gemma4 reads the data as other tokens than"),
        (["--reference=tiny", "--data=nowhere.jsonl"], 1, "There is no file nowhere.jsonl"),
        (["--reference=tiny", "--max_length=8"], 1, "examples has an answer that fits into 8 tokens"),
        (["--reference=tiny", "--max_tokens=0"], 2, "max_tokens must be at least 1, got 0"),
        (["--reference=tiny", "--num_answers=-1"], 2, "num_answers must be at least 0, got -1"),
        (["--reference=tiny", "--block_size=48"], 2, "model.block_size must be one of"),
    ],
)
def test_mistakes(call, questions, tmp_path, arguments, code, message):
    """Found before anything is computed: no model is loaded, nothing is written."""
    data = [] if any(argument.startswith("--data") for argument in arguments) else [f"--data={questions}"]
    found, out, err = call("compare", *arguments, *data, f"--output={tmp_path / 'out'}")
    assert found == code and message in err and "Traceback" not in err and not out.strip()
    assert "Loading" not in err and not list(tmp_path.glob("out/*"))


def test_empty_data_and_a_candidate_that_cannot_be_held(call, questions, write, tmp_path):
    code, _, err = call("compare", "--reference=tiny", f"--data={write('none.jsonl', '')}", f"--output={tmp_path}")
    assert code == 1 and "none.jsonl has no rows" in err
    code, _, err = call("compare", "--reference=tiny", "--candidates=tiny@int4", f"--data={questions}", *FEW,
                        "--num_answers=0", "--block_size=256", f"--output={tmp_path}")  # fmt: skip
    assert code == 1 and "tiny@int4: " in err and "can't be quantized to int4: block_size=256" in err


@pytest.mark.nightly
@pytest.mark.filterwarnings("error:constrained_layout")
def test_a_run_is_compared_on_what_it_held_out(call, trained, tmp_path):
    code, out, err = call("compare", f"--reference={trained}", f"--candidates=tiny,{trained}@int8", *FEW,
                          f"--output={tmp_path / 'out'}", "--json")  # fmt: skip
    assert code == 0, err  # And the picture has room, whatever the names.
    report = json.loads(out)
    tuned, base, int8 = report["models"]
    assert report["data_source"] == "sample:smartphone_support (held out)"
    assert tuned["quality"]["loss"] < base["quality"]["loss"] and base["divergence"]["loss_increase"] > 0
    assert tuned["memory_bytes"] > base["memory_bytes"] > int8["memory_bytes"]
    adapter = trained / "adapter" / "adapter.safetensors"
    assert tuned["disk_bytes"] == adapter.stat().st_size  # The tiny base has no files.
