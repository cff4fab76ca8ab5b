"""What becomes of a `swift deploy` command line."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import check as check_module
from serve_app.cli.check import check
from serve_app.cli.swift.command import HANDLED, KNOWN
from serve_app.cli.swift.from_swift import BACKENDS, DEFAULT_HOST, Translation, as_yaml, from_swift, translate
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.inventory import Inventory
from tests.builders import node

GB = 10**9

# Every field of DeployArguments in ms-swift 4.6.
SWIFT_ARGUMENTS = """
use_ray ray_exp_name device_groups model model_type model_revision task_type torch_dtype attn_impl experts_impl
new_special_tokens num_labels problem_type rope_scaling device_map max_memory max_model_len local_repo_path
init_strategy template system max_length truncation_strategy max_pixels agent_template norm_bbox use_chat_template
padding_side padding_free loss_scale sequence_parallel_size is_binary_loss_scale template_backend response_prefix
enable_thinking preserve_thinking add_non_thinking_prefix disable_ignore_empty_think dataset val_dataset cached_dataset
cached_val_dataset split_dataset_ratio data_seed dataset_num_proc load_from_cache_file dataset_shuffle
val_dataset_shuffle streaming interleave_prob stopping_strategy shuffle_buffer_size download_mode columns strict
remove_unused_columns disable_auto_column_mapping model_name model_author custom_dataset_info
decision_drop_instructions decision_subsample_options decision_state_as_text decision_shuffle_fields quant_method
quant_bits hqq_axis bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage
max_new_tokens temperature top_k top_p repetition_penalty num_beams stream stop_words logprobs top_logprobs
structured_outputs_regex tuner_backend tuner_type adapters external_plugins custom_register_path seed model_kwargs
enable_npu_model_patch load_args load_data_args packing packing_length packing_num_proc packing_strategy lazy_tokenize
use_hf hub_token ddp_timeout ddp_backend ignore_args_error use_swift_lora vllm_gpu_memory_utilization
vllm_tensor_parallel_size vllm_pipeline_parallel_size vllm_enable_expert_parallel vllm_max_num_seqs vllm_max_model_len
vllm_disable_custom_all_reduce vllm_enforce_eager vllm_limit_mm_per_prompt vllm_max_lora_rank
vllm_enable_prefix_caching vllm_use_async_engine vllm_quantization vllm_reasoning_parser vllm_disable_cascade_attn
vllm_mm_processor_cache_gb vllm_speculative_config vllm_engine_kwargs vllm_data_parallel_size sglang_tp_size
sglang_pp_size sglang_dp_size sglang_ep_size sglang_enable_ep_moe sglang_mem_fraction_static sglang_context_length
sglang_disable_cuda_graph sglang_quantization sglang_kv_cache_dtype sglang_enable_dp_attention
sglang_disable_custom_all_reduce sglang_speculative_algorithm sglang_speculative_num_steps
sglang_speculative_eagle_topk sglang_speculative_num_draft_tokens lmdeploy_tp lmdeploy_session_len
lmdeploy_cache_max_entry_count lmdeploy_quant_policy lmdeploy_vision_batch_size merge_lora safe_serialization
max_shard_size infer_backend result_path write_batch_size metric max_batch_size val_dataset_sample
reranker_use_activation host port api_key ssl_keyfile ssl_certfile owned_by served_model_name verbose log_interval
log_level max_logprobs vllm_use_async_engine
""".split()  # noqa: SIM905


def of(arguments: str, before: str = "") -> Translation:
    """The translation of a command for the model `org/m` from Hugging Face, with these arguments."""
    return translate(f"{before} swift deploy --model org/m --use_hf true {arguments}")


def note_about(translation: Translation, start: str) -> str:
    """The only note that begins so."""
    (note,) = [note for note in translation.notes if note.startswith(start)]
    return note


def read_back(translation: Translation) -> dict[str, Any]:
    """The printed file's model application, whose args ModelConfig has accepted."""
    router, model = yaml.safe_load(as_yaml(translation))["applications"]
    assert router["import_path"] == "serve_app.app:router"
    ModelConfig.from_args(model["args"])
    return dict(model)


def test_a_command_for_transformers_becomes_a_pt_model() -> None:
    """The model, its name, the sizes of both GPUs and the port arrive; the rest has notes."""
    made = translate(
        'swift deploy --model Qwen/Qwen2.5-7B-Instruct --infer_backend pt --max_memory \'{0: "3GB", 1: "10GB"}\' '
        "--served_model_name qwen --port 8001 --torch_dtype bfloat16 --max_new_tokens 2048 --temperature 0.3 "
        "--vllm_gpu_memory_utilization 0.9"
    )
    assert (made.name, made.http_host, made.http_port) == ("qwen", DEFAULT_HOST, 8001)
    config = ModelConfig.from_args(made.args)
    assert (config.model, config.infer_backend, config.dtype) == ("Qwen/Qwen2.5-7B-Instruct", "pt", "bfloat16")
    assert config.max_memory == {0: 3 * GB, 1: 10 * GB}
    assert "max_tokens with each request" in note_about(made, "--max_new_tokens 2048")
    assert "generation_config.json" in note_about(made, "--temperature 0.3")
    assert "counts only with infer_backend: vllm" in note_about(made, "--vllm_gpu_memory_utilization 0.9")


def test_the_command_of_issue_3363_keeps_its_limits() -> None:
    """Each GPU is a stage of vLLM's pipeline, and the note says so."""
    made = translate(
        "swift deploy     --model models/deepseek-r1-emo-7b     --stream true     --infer_backend vllm "
        "--max_model_len  4096     --served_model_name DeepSeek-R1-Emo --quant_method bnb  --quant_bits 8 "
        '--torch_dtype float16 --device_map="auto" --max_memory \'{0: "3GB", 1: "10GB"}\''
    )
    assert made.args == {
        "model": "models/deepseek-r1-emo-7b",
        "infer_backend": "vllm",
        "dtype": "float16",
        "max_memory": {0: "3GB", 1: "10GB"},
        "max_model_len": 4096,
    }
    assert ModelConfig.from_args(made.args).stages == 2
    note = note_about(made, "--max_memory")
    assert "becomes a stage of vLLM's pipeline" in note
    assert "ms-swift#3363" in note
    assert "no device map" in note_about(made, "--device_map auto")
    assert "carries over" in note_about(made, "--max_model_len 4096")
    assert "quantized checkpoint" in note_about(made, "--quant_bits 8")


def test_vllm_arguments_go_to_fields_and_engine_args() -> None:
    """Each with its type, so that vLLM's own parser reads what swift gave it."""
    made = of(
        "--infer_backend vllm --vllm_tensor_parallel_size 2 --vllm_max_model_len 16384 --vllm_max_num_seqs 64 "
        "--vllm_gpu_memory_utilization 0.85 --vllm_enforce_eager --vllm-enable-prefix-caching=false "
        "--no_vllm_disable_custom_all_reduce --vllm_quantization awq --vllm_limit_mm_per_prompt '{\"image\": 5}' "
        "--temperature 0.3 --top_k -1 --enable_thinking false --seed 7"
    )
    assert read_back(made)["args"] == {
        "model": "org/m",
        "infer_backend": "vllm",
        "tensor_parallel_size": 2,
        "max_model_len": 16384,
        "max_num_seqs": 64,
        "quantization": "awq",
        "engine_args": {
            "gpu_memory_utilization": 0.85,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "disable_custom_all_reduce": False,
            "limit_mm_per_prompt": {"image": 5},
            "default_chat_template_kwargs": {"enable_thinking": False},
            "override_generation_config": {"temperature": 0.3, "top_k": -1},
            "seed": 7,
        },
    }


def test_vllm_engine_kwargs_are_taken_one_by_one() -> None:
    """One with a field of its own goes there; one that Ray's books do not bear gets a note."""
    made = of(
        '--infer_backend vllm --vllm_engine_kwargs \'{"max_num_seqs": 8, "block_size": 16, "data_parallel_size": 2}\''
    )
    assert made.args["max_num_seqs"] == 8
    assert made.args["engine_args"] == {"block_size": 16}
    assert "GPUs or processes that Ray counts" in note_about(made, "--vllm_engine_kwargs data_parallel_size")


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_no_argument_of_swift_is_dropped_in_silence(backend: str) -> None:
    """Each changes the result or has a note of its own, and what comes out is a valid file."""
    values = {"torch_dtype": "float16", "device_map": "auto", "max_memory": "'{0: 3GB}'", "host": "::1", "port": "81"}
    mappings = ("vllm_limit_mm_per_prompt", "vllm_speculative_config", "vllm_engine_kwargs")
    values |= dict.fromkeys(mappings, "'{\"block_size\": 1}'")
    command = f"swift deploy --model org/m --infer_backend {backend}"
    plain = translate(command)
    for name in set(SWIFT_ARGUMENTS) - {"model", "infer_backend"}:
        made = translate(f"{command} --{name} {values.get(name, '1')}")
        about = [note for note in made.notes if note.startswith(f"--{name} ")]
        assert about or replace(made, notes=()) != replace(plain, notes=()), name
        assert not any("no such argument" in note for note in about), name
        read_back(made)


def test_every_argument_that_is_known_is_one_of_swifts() -> None:
    """No rule is for a name that swift does not have."""
    assert set(SWIFT_ARGUMENTS) == KNOWN
    assert set(SWIFT_ARGUMENTS) >= HANDLED


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_gives_a_valid_file(seed: int) -> None:
    """Arguments that contradict each other never make args that ModelConfig refuses; a wrong value is named."""
    pick = random.Random(seed)
    values = ["1", "auto", "cpu", "-1", "x\ty", "'{0: 3GB, cpu: 9GB}'", "'{\"\": 0}'", "0.5", "true", "'é: \"#\"'"]
    names = pick.sample(sorted(KNOWN - {"model", "infer_backend"}), 25)
    words = {name: f"--{name} {pick.choice(values)}" for name in names}
    words["infer_backend"] = f"--infer_backend {pick.choice(sorted(BACKENDS))}"
    made = None
    while made is None:
        try:
            made = of(" ".join(words.values()))
        except ConfigError as error:
            del words[str(error).removeprefix("--").partition(":")[0]]
    assert read_back(made)["args"] == made.args


def test_the_printed_file_passes_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Serve's schema and `serve-app check` accept it, on a machine with two CPUs."""
    monkeypatch.setattr(check_module, "_cluster", lambda _: ([node("here", cpus=2)], Inventory(()), {}, "this machine"))
    assert from_swift("swift deploy --model serve-app/demo --device_map cpu --served_model_name tiny --port 8011") == 0
    file = tmp_path / "x.yaml"
    file.write_text(capsys.readouterr().out)
    assert check(file, None) == 0
    assert "ok  tiny: a replica takes 1 CPU" in capsys.readouterr().out
    assert yaml.safe_load(file.read_text())["http_options"] == {"host": DEFAULT_HOST, "port": 8011}


def test_max_memory_stands_on_one_line_of_the_file() -> None:
    """As people write it by hand."""
    assert "    max_memory: {0: 3GB, 1: 10GB, cpu: 20GiB}\n" in as_yaml(
        of('--max_memory \'{"0": "3GB", 1: 10000000000, "cpu": "20GIB"}\'')
    )


@pytest.mark.parametrize(
    "written",
    [
        '--max_memory \'{0: "3GB", 1: "10GB"}\'',
        '--max_memory={0:"3GB",1:"10GB"}',
        "--max-memory '{0: 3GB, 1: 10GB}'",
        "--max_memory {0: 3GB, 1: 10GB}",
        '--max_memory \'{"0": "3GB", "cuda:1": "10GB"}\'',
    ],
)
def test_max_memory_is_read_however_the_shell_left_it(written: str) -> None:
    """With quotes, without, with = and in several words."""
    assert of(written).args["max_memory"] == {0: "3GB", 1: "10GB"}


def test_a_size_that_means_bits_to_accelerate_is_not_guessed() -> None:
    """ "3gb" ends the command with the spelling that is meant: without the limit, the model would take whole GPUs."""
    for backend in ("transformers", "vllm"):
        with pytest.raises(ConfigError, match=r"--max_memory: max_memory\[0\]: unknown unit 'gb' in '3gb'. Write 3GB"):
            of(f"--infer_backend {backend} --max_memory '{{0: 3gb}}'")


def test_what_vllm_cannot_honour_of_max_memory_does_not_lose_the_rest() -> None:
    """The limits of the GPUs stay. If none is left, the note says that the model has no limits."""
    made = of("--infer_backend vllm --max_memory '{0: 3GB, 1: 10GB, cpu: 20GB}'")
    assert made.args["max_memory"] == {0: "3GB", 1: "10GB"}
    notes = [note for note in made.notes if note.startswith("--max_memory")]
    assert "cpu is left out, because vLLM keeps all layers on GPUs. The limits of the GPUs stay." in notes[0]
    assert "it carries over" in notes[1]
    made = of("--infer_backend vllm --max_memory '{cpu: 20GB, disk: 40GB}'")
    assert "max_memory" not in made.args
    assert "cpu and disk are left out" in note_about(made, "--max_memory")
    assert "THE MODEL HAS NO LIMITS NOW" in note_about(made, "--max_memory")
    made = of("--device_map '{\"\": 0}' --max_memory '{0: 3GB}'")
    assert "max_memory" not in made.args
    assert any("THE MODEL HAS NO LIMITS NOW" in note for note in made.notes)


@pytest.mark.parametrize(
    ("written", "args"),
    [
        ("balanced", {"device_map": "balanced"}),
        ("cpu", {"device": "cpu"}),
        ("cuda:0", {}),
        ('\'{"model.embed_tokens": "cuda:0", "": 1}\'', {"device_map": {"model.embed_tokens": 0, "": 1}}),
        ("map.json", {}),
    ],
)
def test_device_maps_are_taken_where_pt_has_them(written: str, args: dict[str, Any]) -> None:
    """A name, the CPU or a mapping; anything else has a note."""
    made = of(f"--device_map {written}")
    assert made.args == {"model": "org/m", "infer_backend": "pt", **args}
    assert bool(args) != any(note.startswith("--device_map") for note in made.notes)


@pytest.mark.parametrize(
    ("before", "arguments", "args"),
    [
        ("CUDA_VISIBLE_DEVICES=2,3", "", {"num_gpus": 2}),
        ("CUDA_VISIBLE_DEVICES=2", "", {}),
        ("CUDA_VISIBLE_DEVICES=0,1", "--max_memory '{0: 3GB}'", {"max_memory": {0: "3GB"}}),
        ("CUDA_VISIBLE_DEVICES=", "", {"device": "cpu"}),
        ("CUDA_VISIBLE_DEVICES=-1", "", {"device": "cpu"}),
        ("nohup env CUDA_VISIBLE_DEVICES=0,1", "--infer_backend vllm", {"infer_backend": "vllm"}),
    ],
)
def test_visible_gpus_become_a_number_of_gpus(before: str, arguments: str, args: dict[str, Any]) -> None:
    """swift spreads transformers over all that it sees; which cards they are is for Ray to choose."""
    made = of(arguments, before=before)
    assert made.args == {"model": "org/m", "infer_backend": "pt", **args}
    assert args == {"device": "cpu"} or any("Ray chooses the cards" in note for note in made.notes)


def test_gpus_do_not_count_for_a_model_on_the_cpu() -> None:
    """The variable has a note and changes nothing."""
    made = of("--device_map cpu", before="CUDA_VISIBLE_DEVICES=0,1")
    assert made.args == {"model": "org/m", "infer_backend": "pt", "device": "cpu"}
    assert "device: cpu" in note_about(made, "CUDA_VISIBLE_DEVICES=0,1")


@pytest.mark.parametrize(("size", "rows"), [("4", 4), ("-1", None)])
def test_the_batch_of_transformers_is_the_number_of_rows_of_pt(size: str, rows: int | None) -> None:
    """Without a limit is not possible, and has a note."""
    made = of(f"--max_batch_size {size}")
    assert made.args.get("max_num_seqs") == rows
    assert (rows is None) == any("there is always a limit here" in note for note in made.notes)


def test_a_seed_is_for_each_request_with_pt() -> None:
    """The note says so instead of pointing to vLLM."""
    assert "Send seed with each request" in note_about(of("--seed 7"), "--seed 7")


def test_a_number_sign_begins_no_comment() -> None:
    """swift writes `dataset#100` for a sample."""
    assert of("--dataset data#100 --port 81").http_port == 81


@pytest.mark.parametrize("before", ["swift deploy --use_hf", "USE_HF=1 swift deploy"])
def test_with_hugging_face_nothing_is_said_of_modelscope(before: str) -> None:
    """Both take the model from the same place then."""
    assert not any("swift downloads from ModelScope" in note for note in translate(f"{before} --model org/m").notes)


def test_other_variables_have_a_note_without_their_value() -> None:
    """A token must not end up in a file that is shared."""
    made = of("--hub_token hub-secret", before="HF_TOKEN=secret")
    assert "runtime_env" in note_about(made, "HF_TOKEN")
    assert "secret" not in as_yaml(made)


def test_a_secret_is_not_taken_for_a_variable_of_the_shell() -> None:
    """Nothing of it is printed."""
    assert "secret" not in as_yaml(of("--api_key 'sk$secret'"))


def test_with_an_api_key_the_server_stays_on_this_machine() -> None:
    """Until its file of keys is made the address is not opened, and the key is not printed."""
    made = of("--api_key sk-1 --host 0.0.0.0")
    assert made.http_host == "127.0.0.1"
    assert "sk-1" not in as_yaml(made)
    assert "serve-app new-key" in note_about(made, "--api_key")


@pytest.mark.parametrize("backend", ["sglang", "lmdeploy"])
def test_other_engines_become_vllm(backend: str) -> None:
    """With a note, and with the number of GPUs and the length carried over."""
    lengths = {"sglang": "--sglang_tp_size 2 --sglang_context_length 4096"}
    made = of(f"--infer_backend {backend} " + lengths.get(backend, "--lmdeploy_tp 2 --lmdeploy_session_len 4096"))
    assert made.args["infer_backend"] == "vllm"
    assert (made.args["tensor_parallel_size"], made.args["max_model_len"]) == (2, 4096)
    assert "vllm" in note_about(made, f"--infer_backend {backend}")


def test_two_arguments_for_one_field_are_told() -> None:
    """vLLM's own length wins, as in swift."""
    made = of("--infer_backend vllm --max_model_len 9000 --vllm_max_model_len 4096")
    assert made.args["max_model_len"] == 4096
    assert "4096 already" in note_about(made, "--max_model_len 9000")


def test_the_last_of_two_equal_arguments_counts() -> None:
    """As in swift, and with a note."""
    made = of("--port 1000 --port 2000")
    assert made.http_port == 2000
    assert note_about(made, "--port: it is given twice")


def test_an_unknown_argument_names_the_nearest_one() -> None:
    """ms-swift 3 had names without vllm_."""
    note = note_about(of("--tensor_parallel_size 2"), "--tensor_parallel_size 2")
    assert "no such argument" in note
    assert "Did you mean 'vllm_tensor_parallel_size'" in note


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("--model org/My.Model-7B", "My.Model-7B"),
        ("--model /srv/models/m/", "m"),
        ("--model org/m --served_model_name 'a b/{c}'", "a-b-c"),
        ("--model org/router", "router-model"),
        ("--model .", "model"),
    ],
)
def test_the_name_fits_a_route(arguments: str, name: str) -> None:
    """It is the end of the model's path unless given, and a changed one has a note."""
    made = translate(f"swift deploy {arguments}")
    assert made.name == name
    assert read_back(made)["route_prefix"] == f"/models/{name}"
    assert any("became" in note for note in made.notes) == (not arguments.rstrip("/").endswith(name))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--model org/m", "from ModelScope"),
        ("--model org/m --use_hf true", "--use_hf true: models come from"),
        ("--model /srv/m", "args.json"),
        ("--model org/m --model_revision master", "called main"),
        ("--model org/m", "trust_remote_code: true"),
        ("--model org/m", "Set num_gpus"),
        ("--model $MODEL", "$MODEL: the values of shell variables"),
        ("--model org/m > log.txt 2>&1 &", "'> log.txt >& 1 &': this part is for the shell"),
    ],
)
def test_what_swift_does_by_itself_is_told(arguments: str, told: str) -> None:
    """Differences that no argument shows."""
    assert any(told in note for note in translate(f"swift deploy {arguments}").notes)


@pytest.mark.parametrize(
    "program",
    [
        "swift deploy",
        "/opt/venv/bin/swift deploy",
        "python -m swift.cli.deploy",
        "python3.11 -m swift.cli.main deploy",
        "A=1 python swift/cli/deploy.py",
        "nohup swift \\\n  deploy",
    ],
)
def test_the_command_is_known_in_all_its_forms(program: str) -> None:
    """Also over several lines, and with variables before it."""
    assert translate(f"{program} \\\n --model org/m").args["model"] == "org/m"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("swift sft --model m", "'swift sft --model m' is not a `swift deploy` command"),
        ("vllm serve m", "not a `swift deploy` command"),
        ("", "not a `swift deploy` command"),
        ("swift deploy --port 8000", "has no --model"),
        ("swift deploy --adapters out/checkpoint-1", "args.json.*Add --model"),
        ("swift deploy --model", "--model: it has no value"),
        ("swift deploy config.yaml", "arguments in a file are not read"),
        ("swift deploy --model m --infer_backend tgi", "'tgi' is unknown. swift has pt, transformers"),
        ("swift deploy --model m --system 'a", "Close every quote"),
        ("swift deploy --model m --port eighty", "--port: 'eighty' is not a number"),
        ("swift deploy --model m --torch_dtype a b", "--torch_dtype: it takes one value, but has 2"),
        ("swift deploy --model m --infer_backend vllm --vllm_enforce_eager maybe", "neither true nor false"),
        ("swift deploy --model m --max_memory file.json", "is not a mapping"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(command: str, complaint: str) -> None:
    """With what is wrong and what to write."""
    with pytest.raises(ConfigError, match=complaint):
        translate(command)


def test_a_note_cannot_leave_its_comment() -> None:
    """Line breaks in a value stay inside the comment, so they add nothing to the file."""
    made = of("--system 'a\nport: 1\x85b\u2028c\x1bd' --response_prefix '<think>\n'")
    assert "a port: 1 b c d" in as_yaml(made)
    assert set(yaml.safe_load(as_yaml(made))) == {"http_options", "applications"}


@pytest.mark.parametrize(("bits", "method"), [(4, "bnb-nf4"), (8, "bnb-int8")])
def test_weights_that_swift_quantizes_with_bitsandbytes_carry_over_to_pt(bits: int, method: str) -> None:
    """With transformers, swift's default backend, and nothing is noted on them."""
    made = of(f"--quant_method bnb --quant_bits {bits} --bnb_4bit_quant_type nf4")
    assert made.args["quantization"] == method
    assert not [note for note in made.notes if "quant" in note]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--quant_method hqq --quant_bits 4", "bnb-nf4 (4 bits) or bnb-int8"),
        ("--quant_method fp8", "bnb-int8, which takes as much memory"),
        ("--quant_method eetq", "bnb-int8"),
        ("--quant_method quanto --quant_bits 8", "bnb-int8"),
        ("--quant_method bnb", "both have to be given"),
        ("--quant_bits 4", "both have to be given"),
        ("--quant_method bnb --quant_bits 4 --bnb_4bit_quant_type fp4", "nf4 only"),
    ],
)
def test_other_ways_to_quantize_are_noted_with_the_nearest_one(options: str, words: str) -> None:
    """None is taken for another one in silence."""
    made = of(options)
    assert "quantization" not in made.args
    assert words in note_about(made, "--quant")


def test_scales_that_stay_whole_in_swift_are_noted() -> None:
    """Here they are always quantized too."""
    made = of("--quant_method bnb --quant_bits 4 --bnb_4bit_use_double_quant false")
    assert made.args["quantization"] == "bnb-nf4"
    assert "always quantized" in note_about(made, "--bnb_4bit_use_double_quant")


def test_adapters_become_models_of_their_own() -> None:
    """One without a name gets the end of its path, and a note, since swift makes it a part of the model."""
    made = of(
        "--infer_backend vllm --adapters sql=/a/sql /out/v3/checkpoint-20 --vllm_max_lora_rank 32 --merge_lora false"
    )
    adapters = {"sql": "/a/sql", "v3-checkpoint-20": "/out/v3/checkpoint-20"}
    assert read_back(made)["args"]["adapters"] == adapters
    assert made.args["max_lora_rank"] == 32
    assert "clients ask for 'v3-checkpoint-20'" in note_about(made, "--adapters /out/v3/checkpoint-20")
    assert "served beside their model" in note_about(made, "--merge_lora false")
    assert note_about(of("--adapters a=b"), "adapters.a b").endswith("write a local folder as an absolute path.")
    with pytest.raises(ConfigError, match="the name 'x' appears twice"):
        of("--adapters x=/a x=/b")
    odd = of("--infer_backend vllm --adapters a=/b --vllm_max_lora_rank 24")
    assert "must be one of" in note_about(odd, "--vllm_max_lora_rank")
