"""Tiny embedding models and cross-encoders with random weights, in folders as sentence-transformers writes them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from serve_app.facts.pooling import MODES

WORDS = [f"w{number}" for number in range(90)]
PAD, UNKNOWN, CLS, SEP, QUERY = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "query:"
TOKENS = [PAD, UNKNOWN, CLS, SEP, QUERY, *WORDS]
VOCABULARY = len(TOKENS)
# The tokenizers of these say nothing of the text that a token is of.
WITHOUT_TYPES = ("gpt2", "qwen3", "mistral", "llama", "gemma3_text", "t5", "modernbert", "distilbert")
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
_NONE: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
_DECODER = _ENCODER | _NONE | {"num_key_value_heads": 2, "head_dim": 8}
_MODERN: dict[str, Any] = {
    **dict.fromkeys(("cls_token_id", "sep_token_id"), 2), "local_attention": 8, "global_attn_every_n_layers": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How one kind of model is built. `modes` are the flags of `1_Pooling/config.json`, and None means that the folder
    has no files of sentence-transformers. `dense` has the outputs of each linear layer behind the pooling."""

    config: Any
    architecture: str
    modes: Sequence[str] | None = ("mean_tokens",)
    dense: tuple[int, ...] = ()
    normalizes: bool = False
    ends: bool = False
    made_by: Any = AutoModel
    extra: dict[str, Any] = field(default_factory=dict)


EMBEDDERS = {
    "bert mean": Kind(BertConfig(**_ENCODER), "BertModel", normalizes=True),
    "bert cls": Kind(BertConfig(**_ENCODER), "BertModel", ("cls_token",)),
    "bert max": Kind(BertConfig(**_ENCODER), "BertModel", ("max_tokens",)),
    "bert root": Kind(BertConfig(**_ENCODER), "BertModel", ("mean_sqrt_len_tokens",)),
    "bert joined": Kind(BertConfig(**_ENCODER), "BertModel", ("cls_token", "max_tokens", "mean_tokens")),
    "bert dense": Kind(BertConfig(**_ENCODER), "BertModel", dense=(24,), normalizes=True),
    "bert alone": Kind(BertConfig(**_ENCODER), "BertModel", None),
    "roberta": Kind(RobertaConfig(**_ENCODER | {"pad_token_id": 0}), "RobertaModel", normalizes=True),
    "xlm-roberta": Kind(XLMRobertaConfig(**_ENCODER), "XLMRobertaModel", ("cls_token",), normalizes=True),
    "mpnet": Kind(MPNetConfig(**_ENCODER | {"pad_token_id": 1}), "MPNetForMaskedLM", normalizes=True),
    "distilbert": Kind(
        DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0,
                         max_position_embeddings=128), "DistilBertModel"),
    "electra": Kind(ElectraConfig(**_ENCODER, embedding_size=16), "ElectraModel", ("cls_token",)),
    "albert": Kind(AlbertConfig(**_ENCODER, embedding_size=16), "AlbertModel"),
    "deberta": Kind(
        DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]), "DebertaV2Model"),
    "modernbert": Kind(ModernBertConfig(**_ENCODER | _NONE | _MODERN), "ModernBertModel", normalizes=True),
    "nomic": Kind(
        AutoConfig.for_model("nomic_bert", **_ENCODER | {"head_dim": 8}), "NomicBertModel", normalizes=True
    ),
    "t5": Kind(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, pad_token_id=0,
                 decoder_start_token_id=0), "T5EncoderModel", dense=(24,), normalizes=True,
        made_by=AutoModelForTextEncoding),
    "qwen3": Kind(
        Qwen3Config(**_DECODER), "Qwen3ForCausalLM", ("lasttoken",), normalizes=True, ends=True,
        made_by=AutoModelForCausalLM),
    "mistral": Kind(
        MistralConfig(**_DECODER, sliding_window=8), "MistralModel", ("lasttoken",), normalizes=True, ends=True),
    "llama alone": Kind(LlamaConfig(**_DECODER), "LlamaModel", None, ends=True),
    "gemma": Kind(
        Gemma3TextConfig(**_DECODER | {"num_hidden_layers": 3}, sliding_window=8, use_bidirectional_attention=True,
                         layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        "Gemma3TextModel", dense=(64, 16), normalizes=True),
    "gpt2": Kind(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **_NONE), "GPT2Model",
        ("weightedmean_tokens",)),
}  # fmt: skip
_ONE_LABEL = {"num_labels": 1}
SCORERS = {
    "bert": Kind(BertConfig(**_ENCODER, **_ONE_LABEL), "BertForSequenceClassification"),
    "bert identity": Kind(
        BertConfig(**_ENCODER, **_ONE_LABEL), "BertForSequenceClassification",
        extra={"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}}),
    "bert older": Kind(
        BertConfig(**_ENCODER, **_ONE_LABEL), "BertForSequenceClassification",
        extra={"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}),
    "roberta": Kind(RobertaConfig(**_ENCODER, **_ONE_LABEL), "RobertaForSequenceClassification"),
    "xlm-roberta": Kind(XLMRobertaConfig(**_ENCODER, **_ONE_LABEL), "XLMRobertaForSequenceClassification"),
    "modernbert": Kind(
        ModernBertConfig(**_ENCODER | _NONE | _MODERN, **_ONE_LABEL, classifier_pooling="mean"),
        "ModernBertForSequenceClassification"),
    "distilbert": Kind(
        DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0,
                         max_position_embeddings=128, **_ONE_LABEL), "DistilBertForSequenceClassification"),
    "qwen3": Kind(
        Qwen3Config(**_DECODER, **_ONE_LABEL), "Qwen3ForSequenceClassification", extra={"use_sep_token": False}),
}  # fmt: skip


def tokenizer(ends: bool = False, tells_types: bool = True) -> PreTrainedTokenizerBase:
    """A tokenizer whose words are `WORDS`. A text begins with [CLS] and ends with [SEP]. With `ends` it only ends so,
    as those of decoders do."""
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(CLS, TOKENS.index(CLS)), (SEP, TOKENS.index(SEP))]
    single, pair = (f"$A {SEP}", f"$A {SEP} $B {SEP}") if ends else (f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1")
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    names = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": CLS, "sep_token": SEP}
    inputs = ["input_ids", *(["token_type_ids"] if tells_types else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, model_max_length=96, **names)


def text_of(*words: int) -> str:
    """A text of the words with these numbers."""
    return " ".join(WORDS[word % len(WORDS)] for word in words)


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 words."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=draw).tolist()
    return [text_of(*torch.randint(0, len(WORDS), (length,), generator=draw).tolist()) for length in lengths]


def save_embedder(folder: Path, name: str, prompts: dict[str, str] | None = None, default: str | None = None) -> Path:
    """Writes one of `EMBEDDERS`."""
    kind = EMBEDDERS[name]
    _save(folder, kind, kind.made_by)
    if kind.modes is None:
        return folder
    modules = [("sentence_transformers.models.Transformer", ""), ("sentence_transformers.models.Pooling", "1_Pooling")]
    hidden = kind.config.hidden_size
    flags = {flag: flag.removeprefix("pooling_mode_") in kind.modes for flag in MODES}
    _write(folder / "1_Pooling/config.json", {"word_embedding_dimension": hidden, "include_prompt": True, **flags})
    size = hidden * len(kind.modes)
    for number, outputs in enumerate(kind.dense, 2):
        modules.append(("sentence_transformers.models.Dense", f"{number}_Dense"))
        _save_dense(folder / f"{number}_Dense", size, outputs, "Tanh" if number == 2 else "linear.Identity")
        size = outputs
    if kind.normalizes:
        modules.append(("sentence_transformers.models.Normalize", f"{len(modules)}_Normalize"))
    listed = [{"idx": n, "name": str(n), "path": path, "type": type_} for n, (type_, path) in enumerate(modules)]
    _write(folder / "modules.json", listed)
    _write(folder / "config_sentence_transformers.json", {"prompts": prompts or {}, "default_prompt_name": default})
    return folder


def save_scorer(folder: Path, name: str) -> Path:
    """Writes one of `SCORERS`."""
    _save(folder, SCORERS[name], AutoModelForSequenceClassification)
    return folder


def plain(folder: Path, architecture: Any = AutoModel) -> PreTrainedModel:
    """The model as transformers loads it, in float32."""
    model: PreTrainedModel = architecture.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def change(file: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    _write(file, json.loads(file.read_text()) | fields)


def _save(folder: Path, kind: Kind, made_by: Any) -> None:
    torch.manual_seed(0)
    model = made_by.from_config(kind.config, dtype=torch.float32)
    with torch.no_grad():  # Larger weights than at initialisation, so that texts differ.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer(kind.ends, tells_types=kind.config.model_type not in WITHOUT_TYPES).save_pretrained(folder)
    change(folder / "config.json", architectures=[kind.architecture], **kind.extra)


def _save_dense(folder: Path, inputs: int, outputs: int, activation: str) -> None:
    linear = nn.Linear(inputs, outputs, bias=activation == "Tanh")
    place = activation if "." in activation else f"activation.{activation}"
    fields = {"in_features": inputs, "out_features": outputs, "bias": linear.bias is not None}
    _write(folder / "config.json", fields | {"activation_function": f"torch.nn.modules.{place}"})
    save_file(
        {f"linear.{name}": tensor.data for name, tensor in linear.named_parameters()}, folder / "model.safetensors"
    )


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
