"""Model cards: what `huggingface_hub` reads of them, and what they say when little or odd things are known.

The Hub's own check (`ModelCard.validate`) asks its server. Here the library's parser and types read the card back, and
what the server's documentation asks for is looked at: huggingface.co/docs/hub/model-cards.
"""

import json

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, metadata_eval_result
from huggingface_hub.repocard_data import model_index_to_eval_results

from gemma_tune.config import Config, DataConfig, LoraConfig, ModelConfig, TrainingConfig
from gemma_tune.errors import ConfigError
from gemma_tune.export.card.model_card import check_card_metadata, model_card, write_card
from gemma_tune.export.card.provenance import Provenance, hugging_face_name, read_provenance
from gemma_tune.export.card.sections import About
from gemma_tune.models.sources.preset_catalog import presets

ABOUT = About("mine", "hf", "transformers", [], "gemma3", 268_098_176)
NASTY = "Why \"a: b\" | c\\d\n--- 'x' # <b>{{ e }}</b> ```"


def run_provenance(source="questions: and | answers.jsonl"):
    config = Config(
        model=ModelConfig(source="gemma3_instruct_270m"), data=DataConfig(source=source), lora=LoraConfig(rank=8),
        training=TrainingConfig(method="qlora"),
    )  # fmt: skip
    result = {
        "heldout_before": {"loss": 4.446, "perplexity": 85.29, "token_accuracy": 0.317},
        "heldout_after": {"loss": 0.0139, "perplexity": 1.014, "token_accuracy": 0.996},
        "num_answers_scored": 20, "num_answers_right": 17, "best_step": 100, "num_trainable_parameters": 12345,
        "samples": [{"question": NASTY, "reference": NASTY, "base_answer": "", "tuned_answer": NASTY}],
        "data": {"num_rows": 400, "num_train": 330, "num_heldout": 66, "num_empty": 0, "errors": [],
                 "length_tokens": {"min": 3, "mean": 84.4, "median": 85.0, "max": 111}},
    }  # fmt: skip
    return Provenance(
        config.model.source, config.to_dict(), result, {"data": "f00d", "jax": "0.10.2"}, {"base_fingerprint": "abcd"}
    )


def test_the_library_reads_it_back():
    card = ModelCard(model_card(ABOUT, run_provenance()))
    data = card.data
    assert (data.license, data.base_model, data.library_name) == ("gemma", "google/gemma-3-270m-it", "transformers")
    assert data.pipeline_tag == "text-generation" and "qlora" in data.tags and "gemma3" in data.tags
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    assert found == {"loss": 0.0139, "perplexity": 1.014, "accuracy": 0.996}
    assert all(isinstance(one, EvalResult) and one.dataset_type == "questions-and-answers" for one in data.eval_results)
    again = ModelCard(str(card))
    assert again.data.to_dict() == data.to_dict()
    name, results = model_index_to_eval_results(yaml.safe_load(data.to_yaml())["model-index"])
    assert name == "mine" and results == data.eval_results
    wanted = metadata_eval_result(
        model_pretty_name="mine", task_pretty_name="x", task_id="text-generation", metrics_pretty_name="Loss of responses",
        metrics_id="loss", metrics_value=0.0139, dataset_pretty_name=data.eval_results[0].dataset_name,
        dataset_id="questions-and-answers", dataset_split="held-out",
    )  # fmt: skip
    theirs = model_index_to_eval_results(wanted["model-index"])[1][0]
    theirs.task_name = theirs.verified = None
    assert theirs == data.eval_results[0]


def test_it_says_all_that_is_known():
    text = ModelCard(model_card(ABOUT._replace(notes=["A note."]), run_provenance())).text
    for known in (
        "google/gemma-3-270m-it", "Gemma Terms of Use", "prohibited_use_policy", "`f00d`", "`abcd`", "lora.rank | 8", "nf4",
        "0.0005", "330", "66", "17 of 20", "12,345", "A note.", "AutoModelForCausalLM", "vllm serve mine", "may do worse",
    ):  # fmt: skip
        assert known in text, known
    table = [line for line in text.splitlines() if line.startswith("| Why")]
    assert len(table) == 1 and table[0].replace("\\|", "").count("|") == 4  # Three cells, whatever is in them.
    assert text.count("```") == 2 * 3 + 3  # Three programs; and three cells, where they are no fence.


@pytest.mark.parametrize("usage", ["keras", "keras, with an adapter", "hf", "peft", "gguf", "litert"])
def test_programs_of_every_format_are_programs(usage):
    placeholders = {"BASE": "google/gemma-3-270m", "NAMED": "demo", "MAX_RANK": "8", "FILE": "model-f16.gguf"}
    text = ModelCard(model_card(ABOUT._replace(usage=usage, placeholders=placeholders), run_provenance())).text
    for program in text.split("```python\n")[1:]:
        compile(program.split("\n```")[0], "card", "exec")
    assert not any(word in text for word in (*placeholders, "FOLDER", "END_OF_TURN", "QUESTION"))


def test_code_in_it_is_code():
    """A question with quotes and braces doesn't break the programs."""
    text = ModelCard(model_card(ABOUT, run_provenance())).text
    programs = text.split("```python\n")[1:]
    assert len(programs) == 2
    for program in programs:
        compile(program.split("\n```")[0], "card", "exec")
    request = text.split("-d '")[1].split("'\n")[0]
    assert json.loads(request)["model"] == "mine"


def test_a_model_that_is_no_run_says_what_is_not_known():
    card = ModelCard(model_card(ABOUT, Provenance("gemma3_1b")))
    assert (
        card.text.count("Not known") == 3
        and card.data.eval_results is None
        and card.data.base_model == "google/gemma-3-1b-pt"
    )
    card = ModelCard(model_card(ABOUT, Provenance()))
    assert card.text.count("Not known") == 3 and "The base model is not known." in card.text
    assert card.data.base_model is None and card.data.license == "gemma"
    assert ModelCard(model_card(ABOUT._replace(family="gemma4"), Provenance("gemma4_2b"))).data.license == "apache-2.0"


def test_a_run_that_was_not_finished_or_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(Config().to_dict()))
    (tmp_path / "result.json").write_text('{"heldout_after": ')
    provenance = read_provenance(str(tmp_path))
    assert provenance.base == "demo" and provenance.result == {}
    ModelCard(model_card(ABOUT, provenance))
    assert provenance.data_files.keys() == {"train.jsonl"}


def test_the_notice_that_the_terms_ask_for(tmp_path):
    write_card(tmp_path, ABOUT, Provenance("demo"))
    assert "Gemma Terms of Use found at ai.google.dev/gemma/terms" in (tmp_path / "NOTICE").read_text()


def test_words_of_the_user():
    about = ABOUT._replace(languages=("en", "de"), datasets=("me/support",))
    data = ModelCard(model_card(about, Provenance())).data
    assert (data.language, data.datasets) == (["en", "de"], ["me/support"])
    for languages, datasets in ((("english",), ()), ((), ("a b",)), (("en", "../x"), ())):
        with pytest.raises(ConfigError):
            check_card_metadata(languages, datasets)


def test_names_on_hugging_face():
    known = {preset.name: hugging_face_name(preset.name) for preset in presets()}
    assert known["gemma_1.1_instruct_2b_en"] == "google/gemma-1.1-2b-it"
    assert known["gemma2_27b_en"] == "google/gemma-2-27b"
    assert known["gemma3_instruct_4b_text"] == known["gemma3_instruct_4b"] == "google/gemma-3-4b-it"
    assert known["gemma4_instruct_2b"] == "google/gemma-4-E2B-it"
    assert known["shieldgemma_2b_en"] == known["medgemma_4b"] == ""
    assert hugging_face_name("hf://me/mine") == "me/mine"
    assert hugging_face_name("kaggle://keras/gemma3/keras/gemma3_1b/3") == "google/gemma-3-1b-pt"
    assert len([name for name in known.values() if name]) > 25
