"""What a model is for, and how it pools, by the files of its folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.facts.pooling import DenseLayer, Pooling, read_pooling
from serve_app.facts.side_files import in_folder

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
TANH, SIGMOID = "torch.nn.modules.activation.Tanh", "torch.nn.modules.activation.Sigmoid"
IDENTITY = "torch.nn.modules.linear.Identity"
POOLED = [TRANSFORMER, POOLING]


def read(folder: Path, config: dict[str, Any], length: int = 512, **files: Any) -> Pooling | None:
    """Reads a folder with these files, whose names have __ for a slash and no ending."""
    for name, value in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_pooling(config, in_folder(folder), length, "model: m")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", None),
        ("GPT2LMHeadModel", None),
        ("T5ForConditionalGeneration", None),
        ("QWenLMHeadModel", None),
        ("BaichuanChatModel", None),
        ("InternLM2ForRewardModel", None),
        ("BertModel", "embed"),
        ("MPNetForMaskedLM", "embed"),
        ("T5EncoderModel", "embed"),
        ("MistralModel", "embed"),
        ("XLMRobertaForSequenceClassification", "classify"),
    ],
)
def test_the_architecture_says_what_a_model_is_for(architecture: str, task: str | None, tmp_path: Path) -> None:
    """By the endings of vLLM's table."""
    found = read(tmp_path, {"architectures": [architecture]})
    assert (None if found is None else found.task) == task


def test_a_model_without_architectures_generates(tmp_path: Path) -> None:
    """As before there were embedding models here."""
    assert read(tmp_path, {"model_type": "bert"}) is None


def test_modules_of_pooling_make_an_embedding_model(tmp_path: Path) -> None:
    """Of a causal model too, as those of Qwen3-Embedding. Without Normalize, vectors are not scaled."""
    found = read(
        tmp_path, {"architectures": ["Qwen3ForCausalLM"]},
        modules=[TRANSFORMER, POOLING], **{"1_Pooling__config": {"pooling_mode_lasttoken": True}},
    )  # fmt: skip
    assert found == Pooling("embed", 512, ("lasttoken",), normalizes=False)


def test_without_modules_the_architecture_decides(tmp_path: Path) -> None:
    """Encoders take the first token and decoders the last one, scaled to length 1, as vLLM does."""
    assert read(tmp_path, {"architectures": ["BertModel"]}) == Pooling("embed", 512, ("cls",))
    decoder = {"architectures": ["MistralModel"], "num_key_value_heads": 8}
    assert read(tmp_path, decoder) == Pooling("embed", 512, ("lasttoken",))
    assert read(tmp_path, {"architectures": ["EuroBertModel"], "model_type": "eurobert", "num_key_value_heads": 8}) == (
        Pooling("embed", 512, ("cls",))
    )


def test_the_newer_form_of_files_is_read_too(tmp_path: Path) -> None:
    """With one field for the modes, and with classes in other places."""
    moved = {**POOLING, "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}
    found = read(
        tmp_path, {"architectures": ["BertModel"]},
        modules=[TRANSFORMER, moved, DENSE, {**NORMALIZE, "idx": 3}],
        **{
            "1_Pooling__config": {"pooling_mode": ["cls", "mean"], "include_prompt": False},
            "2_Dense__config": {"in_features": 64, "out_features": 8, "bias": False, "activation_function": TANH},
        },
    )  # fmt: skip
    assert found == Pooling(
        "embed", 512, ("cls", "mean"), skips_prompt=True, dense=(DenseLayer("2_Dense", 64, 8, False, "Tanh"),)
    )
    assert found is not None
    assert found.dense_bytes == 4 * 64 * 8


@pytest.mark.parametrize(
    ("config", "files", "length"),
    [
        ({"model_type": "bert"}, {}, 512),
        ({"model_type": "roberta", "pad_token_id": 1}, {}, 510),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": 128}}, 128),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": 10**30}}, 512),
        ({"model_type": "bert"}, {"sentence_bert_config": {"max_seq_length": 256, "do_lower_case": True}}, 256),
        ({"model_type": "bert"}, {"sentence_bert_config": {"max_seq_length": None}}, 512),
        ({"model_type": "bert"}, {"sentence_roberta_config": {"max_seq_length": 4096}}, 512),
    ],
)
def test_the_length_is_the_least_of_all_files(
    config: dict[str, Any], files: dict[str, Any], length: int, tmp_path: Path
) -> None:
    """Of positions without those for padding, of the tokenizer, and of sentence-transformers."""
    found = read(tmp_path, {"architectures": ["BertModel"], **config}, **files)
    assert found is not None
    assert (found.length, found.lowers_case) == (length, "do_lower_case" in str(files))


def test_prompts_and_dimensions_are_read(tmp_path: Path) -> None:
    """With the default prompt, and with the sizes that the model was trained for."""
    found = read(
        tmp_path, {"architectures": ["BertModel"], "matryoshka_dimensions": [8, 16]},
        config_sentence_transformers={"prompts": {"query": "q: "}, "default_prompt_name": "query"},
    )  # fmt: skip
    assert found is not None
    assert (found.prompts, found.default_prompt) == ({"query": "q: "}, "query")
    assert (found.is_matryoshka, found.dimensions) == (True, (8, 16))


@pytest.mark.parametrize(
    ("config", "labels", "activation"),
    [
        ({"num_labels": 1}, 1, "sigmoid"),
        ({"id2label": {"0": "LABEL_0"}}, 1, "sigmoid"),
        ({}, 2, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, 1, "identity"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": IDENTITY}}, 1, "identity"),
        ({"num_labels": 1, "sbert_ce_default_activation_function": IDENTITY}, 1, "identity"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": SIGMOID}}, 1, "sigmoid"),
    ],
)  # fmt: skip
def test_a_classifier_says_how_its_logit_becomes_a_score(
    config: dict[str, Any], labels: int, activation: str, tmp_path: Path
) -> None:
    """By its problem type, or by what sentence-transformers has written, as in vLLM."""
    found = read(tmp_path, {"architectures": ["BertForSequenceClassification"], **config})
    assert found is not None
    assert (found.labels, found.activation) == (labels, activation)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"modules": "{"}, "modules.json is not readable JSON"),
        ({"modules": {"a": 1}}, "modules.json holds an object"),
        ({"modules": [{"idx": 0}]}, "needs a type and a path"),
        ({"modules": [{**POOLING, "path": "../other"}]}, "is not in the model's folder"),
        ({"modules": [{**POOLING, "path": "a\0b"}]}, "is not in the model's folder"),
        ({"modules": [{**TRANSFORMER, "path": "0_Transformer"}, POOLING]}, "has its transformer in '0_Transformer'"),
        ({"modules": [*POOLED, {**DENSE, "type": "sentence_transformers.models.LSTM"}]}, "models.LSTM, which"),
        ({"modules": [TRANSFORMER, POOLING, NORMALIZE, DENSE]}, "a Dense that is not between Pooling and Normalize"),
        ({"modules": [TRANSFORMER, POOLING, DENSE]}, "2_Dense/config.json is missing"),
        ({"modules": POOLED, "1_Pooling__config": {"pooling_mode": "median"}}, 'pooling_mode is "median"'),
        ({"modules": [TRANSFORMER, POOLING], "1_Pooling__config": {"pooling_mode_cls_token": "yes"}}, "true or false"),
        ({"modules": [TRANSFORMER, POOLING, DENSE], "2_Dense__config": {"in_features": 4}}, "out_features is missing"),
        ({"modules": [TRANSFORMER, POOLING, DENSE], "2_Dense__config": {"in_features": 4, "out_features": 4,
          "activation_function": "os.system"}}, "only classes of torch.nn.modules"),
        ({"config_sentence_transformers": {"prompts": {}, "default_prompt_name": "q"}}, "which is none of prompts"),
        ({"config_sentence_transformers": {"prompts": 3}}, "an object is needed"),
    ],
)  # fmt: skip
def test_broken_files_are_named(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    """With the field and with what was found."""
    pooling = {"1_Pooling__config": {"pooling_mode_mean_tokens": True}}
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, {"architectures": ["BertModel"]}, **(pooling | files))
    assert words in str(refused.value)


def test_an_activation_from_elsewhere_is_not_loaded(tmp_path: Path) -> None:
    """A config.json names no code to run."""
    config = {"architectures": ["BertForSequenceClassification"], "sbert_ce_default_activation_function": "os.system"}
    with pytest.raises(ConfigError, match="only classes of torch.nn.modules"):
        read(tmp_path, config)
