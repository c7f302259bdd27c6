"""KsanaLLM's YAML: the reference's own files, every key, every error a user can make."""

from pathlib import Path

import pytest

from ksana_lab.config.engine import EngineConfig
from ksana_lab.config.ksana_yaml import KEYS, load, translate
from ksana_lab.errors import ConfigError
from ksana_lab.types import NodeAddr, Role

EXAMPLES = Path(__file__).parents[1] / "data" / "ksana_examples"
CONFIGS = Path(__file__).parents[2] / "configs"
IPS = {"ROUTER_IP": "10.0.0.1", "PREFILL_IP": "10.0.0.2", "DECODE_IP": "10.0.0.3", "MODEL_DIR": "/m"}
MODEL = {"model_spec": {"base_model": {"model_dir": "/m"}}}
CONNECTOR = {"router_addr": "127.0.0.1:1", "inference_addr": "127.0.0.1:2", "coordinator_addr": "127.0.0.1:3"}


def tree(section=None, /, **ours):
    """A minimal file: ``section`` under setting, ``ours`` under ksana_lab."""
    return {**MODEL, "setting": section or {}, "ksana_lab": {"device": "cpu", **ours}}


def config_of(section=None, /, **ours) -> EngineConfig:
    return translate(tree(section, **ours), "f.yaml", num_gpus=0).config


def warned_keys(loaded):
    return sorted(warning.partition(":")[0] for warning in loaded.warnings)


# ---- the reference's own files


def test_the_references_prefill_file_loads_unmodified():
    loaded = load(EXAMPLES / "ksana_llm_disaggregating_prefill.yaml", substitutions=IPS, num_gpus=8)
    c = loaded.config
    assert c.connector.role is Role.PREFILL and c.connector.inference_addr == NodeAddr("10.0.0.2", 8067)
    assert c.connector.router_addr == NodeAddr("10.0.0.1", 9080) and c.connector.coordinator_addr == NodeAddr("10.0.0.2", 13569)
    assert (c.connector.backend, c.connector.heartbeat_interval_s, c.connector.num_send_threads) == ("nccl", 2.0, 8)
    assert (c.parallel.tensor_parallel_size, c.model.max_model_len, c.connector.layers_per_chunk) == (8, 65536, 100)
    assert (c.scheduler.max_num_batched_tokens, c.scheduler.max_num_seqs, c.scheduler.max_num_waiting) == (65536, 256, 9000)
    assert (c.scheduler.waiting_timeout_s, c.cache.reserved_memory_ratio, c.runtime.enable_cuda_graph) == (3600.0, 0.05, False)
    assert c.model.model_dir == "/models/DeepSeek-R1-0528-moe-int4/"


def test_the_references_prefill_file_is_answered_with_one_warning_for_each_key_without_effect():
    loaded = load(EXAMPLES / "ksana_llm_disaggregating_prefill.yaml", substitutions=IPS, num_gpus=8)
    assert warned_keys(loaded) == [
        "batch_scheduler.mtp_step_num",
        "batch_scheduler.preempt_mode",  # 0 beside a block_host_memory_factor of 0.0
        "batch_scheduler.swap_threadpool_size",
        "block_manager.dynamic_reusable_memory_ratio",
        "connector.circular_bucket_num",
        "connector.circular_thread_num",
    ]
    assert loaded.config.cache.dtype == "fp8_e4m3"


def test_the_references_decode_file_loads_and_its_slip_can_be_mended():
    path = EXAMPLES / "ksana_llm_disaggregating_decode.yaml"
    assert load(path, substitutions=IPS, num_gpus=8).config.connector.coordinator_addr == NodeAddr("10.0.0.2", 13571)
    mended = load(
        path,
        overrides=["connector.coordinator_addr={DECODE_IP}:13571"],
        substitutions={"ROUTER_IP": "10.0.0.1", "DECODE_IP": "10.0.0.3"},  # PREFILL_IP is not needed then
        num_gpus=8,
    )
    assert mended.config.connector.coordinator_addr == NodeAddr("10.0.0.3", 13571)
    assert (mended.config.scheduler.max_num_seqs, mended.config.scheduler.max_num_pretransfer_seqs) == (768, 256)


@pytest.mark.parametrize("name", ["prefill", "decode", "prefill_cpu", "decode_cpu"])
def test_our_node_files_load_without_a_warning(name):
    loaded = load(CONFIGS / f"{name}.yaml", substitutions=IPS, num_gpus=1)
    assert loaded.warnings == [] and loaded.config.connector.role.value == name.partition("_")[0]


# ---- every key


def test_every_field_of_a_node_can_be_set_from_the_file():
    fields = set()

    def walk(model, prefix=""):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                walk(field.annotation, f"{prefix}{name}.")
            else:
                fields.add(f"{prefix}{name}")

    walk(EngineConfig)
    by_hand = {"cache.dtype"}  # see _kv_dtype
    assert {key.field for key in KEYS.values() if key.field} == fields - by_hand


def test_the_table_knows_every_key_of_the_specification():
    section_6 = """global: tensor_para_size pipeline_para_size attn_data_para_size expert_world_size expert_para_size enable_lora_adapter
        embed_tokens_use_cpu enable_cuda_graph enable_full_shared_expert pipeline_para_comm_type
    connector: group_role router_addr inference_addr coordinator_addr cluster_name communication_type heartbeat_interval_ms
        connector_waiting_sec transfer_batch send_thread_num circular_bucket_num circular_thread_num circular_bucket_size task_expire_sec
    batch_scheduler: schedule_strategy waiting_timeout_in_ms max_waiting_queue_len max_step_tokens max_batch_size
        max_pretransfer_batch_size transfer_layer_chunk_size max_token_len swapout_block_threshold swapin_block_threshold
        launch_block_threshold enable_auto_prefix_cache split_fuse_token_num swap_threadpool_size preempt_mode min_flexible_cache_num
        enable_speculative_decoding mtp_step_num enable_mtp_module enable_xgrammar
    block_manager: block_token_num reserved_device_memory_ratio block_device_memory_ratio block_host_memory_factor
        dynamic_reusable_memory_ratio lora_deivce_memory_ratio lora_host_memory_factor
    attn_backend: enable_blocked_multi_token_forwarding_kv flash_attn_impl
    quantization_config: gptq_backend kv_cache.dtype weight.quant_method
    tokenization: add_special_tokens skip_special_tokens
    profiler: metrics_export_url export_interval_millis export_timeout_millis attributes"""
    expected = {"setting.endpoint_type", "model_spec.base_model.model_dir"}
    expected |= {f"model_spec.plugin_model.{name}" for name in ("enable_tensorrt", "plugin_thread_pool_size")}
    section = ""
    for word in section_6.split():
        if word.endswith(":"):
            section = word[:-1]
        else:
            expected.add(f"setting.{section}.{word}")
    assert expected <= set(KEYS)


NOT_IMPLEMENTED = {
    "global.pipeline_para_size": 2,
    "global.attn_data_para_size": 8,
    "global.expert_world_size": 2,
    "global.expert_para_size": 8,
    "global.enable_lora_adapter": True,
    "global.embed_tokens_use_cpu": True,
    "global.enable_full_shared_expert": True,
    "global.pipeline_para_comm_type": "scatter",
    "connector.circular_bucket_num": 8,
    "connector.circular_thread_num": 8,
    "connector.circular_bucket_size": 1,
    "connector.task_expire_sec": 10,
    "batch_scheduler.schedule_strategy": 1,
    "batch_scheduler.swapout_block_threshold": 2.0,
    "batch_scheduler.swap_threadpool_size": 8,
    "batch_scheduler.min_flexible_cache_num": 64,
    "batch_scheduler.enable_speculative_decoding": True,
    "batch_scheduler.mtp_step_num": 2,
    "batch_scheduler.enable_mtp_module": True,
    "batch_scheduler.enable_xgrammar": True,
    "block_manager.dynamic_reusable_memory_ratio": 0.5,
    "block_manager.lora_deivce_memory_ratio": 0.1,
    "block_manager.lora_host_memory_factor": 10.0,
    "attn_backend.enable_blocked_multi_token_forwarding_kv": False,
    "attn_backend.flash_attn_impl": "fa3",
    "quantization_config.gptq_backend": "marlin",
    "quantization_config.kv_cache.dtype": "fp8_e5m2",
    "endpoint_type": "rpc",
    "profiler.metrics_export_url": "http://otel",
    "profiler.export_interval_millis": 30000,
    "profiler.export_timeout_millis": 10,
    "model_spec.plugin_model.enable_tensorrt": False,
    "model_spec.plugin_model.plugin_thread_pool_size": 2,
    "model_spec.plugin_model.thread_pool_size": 2,
}


@pytest.mark.parametrize(("key", "value"), NOT_IMPLEMENTED.items())
def test_a_key_that_is_not_implemented_is_answered_with_one_warning(key, value, tmp_path):
    (tmp_path / "f.yaml").write_text("model_spec: {base_model: {model_dir: /m}}\n")
    loaded = load(tmp_path / "f.yaml", overrides=[f"{key}={value}"], num_gpus=0)
    assert warned_keys(loaded) == [key]
    assert repr(value).lower() in loaded.warnings[0].lower() and "is not implemented: " in loaded.warnings[0]


def test_the_list_above_is_complete():
    keys = {name.removeprefix("setting.") for name, key in KEYS.items() if key.field is None}
    assert keys == NOT_IMPLEMENTED.keys() | {"profiler.attributes"}


def test_values_that_ask_for_nothing_are_not_worth_a_warning():
    quiet = {name: key.off for name, key in KEYS.items() if key.off}
    file = tree()
    for name, off in quiet.items():
        for value in off:
            one = translate({**file, **nested(name, value)}, "f", num_gpus=0)
            assert one.warnings == [], name


def nested(name, value):
    *sections, last = name.split(".")
    inner = {last: value}
    for section in reversed(sections):
        inner = {section: inner}
    merged = {**MODEL, **inner}
    return {**merged, **({"model_spec": {**MODEL["model_spec"], **inner["model_spec"]}} if "model_spec" in inner else {})}


def test_attributes_of_the_profiler_are_one_key():
    loaded = translate(tree({"profiler": {"attributes": {"instance": "a", "version": "b"}}}), "f", num_gpus=0)
    assert warned_keys(loaded) == ["profiler.attributes"]


@pytest.mark.parametrize(
    ("mode", "factor", "expected"),
    [
        (None, None, ("recompute", 0.0)),
        (0, None, ("swap", 2.0)),  # the reference's default
        (0, 1.5, ("swap", 1.5)),
        (None, 1.0, ("swap", 1.0)),
        (None, 0.0, ("recompute", 0.0)),
        (1, 0.0, ("recompute", 0.0)),
    ],
)
def test_swap_wants_a_mode_and_room(mode, factor, expected):
    sections = {"batch_scheduler": {"preempt_mode": mode}, "block_manager": {"block_host_memory_factor": factor}}
    loaded = translate(tree(sections), "f", num_gpus=0)
    assert (loaded.config.scheduler.preemption_mode, loaded.config.cache.host_memory_factor) == expected and loaded.warnings == []


def test_room_for_swapping_without_swapping_is_answered_with_a_warning():
    sections = {"batch_scheduler": {"preempt_mode": 1}, "block_manager": {"block_host_memory_factor": 1.0}}
    loaded = translate(tree(sections), "f", num_gpus=0)
    assert warned_keys(loaded) == ["block_manager.block_host_memory_factor"] and "preempt_mode is 1" in loaded.warnings[0]


def test_swapping_without_room_is_answered_with_a_warning():
    sections = {"batch_scheduler": {"preempt_mode": 0}, "block_manager": {"block_host_memory_factor": 0.0}}
    loaded = translate(tree(sections), "f", num_gpus=0)
    assert warned_keys(loaded) == ["batch_scheduler.preempt_mode"] and "computed again" in loaded.warnings[0]
    assert loaded.config.scheduler.preemption_mode == "swap"


@pytest.mark.parametrize(
    ("mode", "size", "is_idle"), [("bulk", 4, True), ("chunk", 4, True), ("layer", 4, False), ("auto", 4, False), ("bulk", 1, False)]
)
def test_layers_per_piece_beside_a_mode_without_pieces_are_answered_with_a_warning(mode, size, is_idle):
    loaded = translate(tree({"batch_scheduler": {"transfer_layer_chunk_size": size}}, transfer_mode=mode), "f", num_gpus=0)
    assert warned_keys(loaded) == ["batch_scheduler.transfer_layer_chunk_size"] * is_idle
    assert not is_idle or f"4 has no effect: ksana_lab.transfer_mode is {mode}" in loaded.warnings[0]


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda"])
def test_what_is_said_of_gpus_on_a_cpu_is_answered_with_a_warning_each(device):
    ratios = {"block_device_memory_ratio": 0.5, "reserved_device_memory_ratio": 0.1}
    loaded = translate(tree({"block_manager": ratios}, device=device, device_ids=[1]), "f", num_gpus=2)
    expected = ["block_manager.block_device_memory_ratio", "block_manager.reserved_device_memory_ratio", "ksana_lab.device_ids"]
    assert warned_keys(loaded) == (expected if device == "cpu" else [])


def test_defaults_said_aloud_on_a_cpu_are_not_worth_a_warning():
    ratios = {"block_device_memory_ratio": -1.0, "reserved_device_memory_ratio": 0.05}
    assert translate(tree({"block_manager": ratios}, device_ids=[]), "f", num_gpus=0).warnings == []


def test_the_block_thresholds_are_blocks_to_spare_for_each_sequence():
    options = {"swapin_block_threshold": 3, "launch_block_threshold": 2.5}
    scheduler = translate(tree({"batch_scheduler": options}), "f", num_gpus=0).config.scheduler
    assert (scheduler.swap_in_spare_blocks, scheduler.admission_spare_blocks) == (3.0, 2.5)


def test_units_are_converted():
    c = config_of(
        {"connector": {"heartbeat_interval_ms": 250, "connector_waiting_sec": 3}, "batch_scheduler": {"waiting_timeout_in_ms": 1500}}
    )
    assert (c.connector.heartbeat_interval_s, c.connector.connect_timeout_s, c.scheduler.waiting_timeout_s) == (0.25, 3.0, 1.5)


def test_zero_token_len_is_the_models_own_limit():
    assert config_of({"batch_scheduler": {"max_token_len": 0}}).model.max_model_len is None


def test_our_own_section():
    c = config_of(
        None,
        num_blocks=64,
        transfer_mode="chunk",
        checksum=True,
        lease_s=5,
        link={"bandwidth_gbps": 25, "latency_us": 1e1, "shared": True},
        num_threads=2,
        seed=7,
        trace_dir="/t",
        dtype="bfloat16",
        tokenizer_dir="/tok",
    )
    assert (c.cache.num_blocks, c.connector.transfer_mode, c.connector.checksum, c.connector.lease_s) == (64, "chunk", True, 5.0)
    assert (c.connector.link.bandwidth_gbps, c.connector.link.latency_us, c.connector.link.shared) == (25.0, 10.0, True)
    assert (c.runtime.num_threads, c.runtime.seed, c.runtime.trace_dir, c.model.dtype) == (2, 7, "/t", "bfloat16")
    assert c.tokenizer.tokenizer_dir == "/tok"


def test_booleans_may_be_the_words_that_ksanallm_takes():
    assert config_of({"batch_scheduler": {"enable_auto_prefix_cache": "on"}}).cache.enable_prefix_caching is True


@pytest.mark.parametrize(
    ("size", "device", "gpus", "ranks"), [(None, "auto", 4, 4), (0, "cuda", 2, 2), (None, "cpu", 4, 1), (2, "auto", 4, 2)]
)
def test_no_tensor_para_size_means_every_visible_gpu(size, device, gpus, ranks):
    file = tree({"global": {"tensor_para_size": size}}, device=device)
    assert translate(file, "f", num_gpus=gpus).config.parallel.tensor_parallel_size == ranks


@pytest.mark.parametrize(
    ("word", "gpus", "backend", "num_warnings"),
    [
        ("zmq", 0, "tcp", 0),
        ("NCCL", 2, "nccl", 0),
        ("nccl", 0, "auto", 1),
        ("cuda_ipc", 0, "auto", 1),
        ("shm", 0, "shm", 0),
        ("", 0, "auto", 0),
    ],
)
def test_communication_type(word, gpus, backend, num_warnings):
    loaded = translate(tree({"connector": {"communication_type": word}}, device="auto"), "f", num_gpus=gpus)
    assert loaded.config.connector.backend == backend and len(loaded.warnings) == num_warnings


def test_a_backend_that_cannot_carry_packed_kv_is_refused_with_those_that_can():
    setting = {"connector": {**CONNECTOR, "group_role": "decode", "communication_type": "nixl"}}
    with pytest.raises(ConfigError, match=r"fp8_e4m3 does not go over communication_type nixl; choose auto, .*\(f\)"):
        translate(tree(setting, wire_dtype="fp8_e4m3"), "f", num_gpus=0)
    assert translate(tree(setting), "f", num_gpus=0).config.connector.backend == "nixl"


# ---- roles


def test_no_role_or_none_is_a_mixed_node():
    assert config_of().connector.role is Role.MIXED
    assert config_of({"connector": {"group_role": "None"}}).connector.role is Role.MIXED


@pytest.mark.parametrize("missing", ["router_addr", "inference_addr", "coordinator_addr"])
def test_a_role_without_an_address_is_an_error_not_a_mixed_node(missing):
    with pytest.raises(ConfigError, match=rf"connector\.{missing} is empty but group_role is decode.*f\.yaml"):
        config_of({"connector": {**CONNECTOR, "group_role": "decode", missing: ""}})


def test_the_role_both_is_refused():
    with pytest.raises(ConfigError, match=r"group_role: must be prefill, decode or none.*'both'"):
        config_of({"connector": {**CONNECTOR, "group_role": "both"}})


def test_a_coordinator_must_be_an_ip():
    with pytest.raises(ConfigError, match=r"coordinator_addr must begin with an IP address.*localhost:3"):
        config_of({"connector": {**CONNECTOR, "group_role": "prefill", "coordinator_addr": "localhost:3"}})


# ---- errors


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"batch_scheduler": {"max_stepp_tokens": 1}},
            r"batch_scheduler\.max_stepp_tokens is not a known key; did you mean max_step_tokens\? \(f\.yaml\)",
        ),
        ({"batch_schedular": {"max_batch_size": 1}}, r"did you mean batch_scheduler\.max_batch_size\?"),
        ({"block_manager": {"max_batch_size": 1}}, r"did you mean batch_scheduler\.max_batch_size\?"),
        (
            {"batch_scheduler": {"max_batch_size": "8"}},
            r"batch_scheduler\.max_batch_size must be an integer, got the string '8' \(f\.yaml\)",
        ),
        ({"batch_scheduler": {"max_batch_size": "1:30"}}, "must be an integer, got the string '1:30'"),
        ({"batch_scheduler": {"max_batch_size": True}}, "must be an integer, got True"),
        (
            {"connector": {"heartbeat_interval_ms": "0.5s"}},
            "heartbeat_interval_ms must be an integer of milliseconds, got the string '0.5s'",
        ),
        ({"batch_scheduler": {"max_batch_size": 1.5}}, "must be an integer, got 1.5"),
        ({"batch_scheduler": {"max_batch_size": 0}}, r"batch_scheduler\.max_batch_size: must be greater than or equal to 1, got 0"),
        ({"batch_scheduler": {"enable_auto_prefix_cache": 1}}, "must be true or false, got 1"),
        ({"connector": {"heartbeat_interval_ms": 0}}, r"connector\.heartbeat_interval_ms: must be greater than 0, got 0"),
        ({"connector": {"router_addr": "nowhere"}}, r"connector\.router_addr: 'nowhere' is not host:port"),
        ({"connector": {"router_addr": {"ROUTER_IP": None}}}, r"connector\.router_addr must be a value.*quote"),
        ({"connector": {"router_addr": "127.0.0.1:9080"}}, r"connector\.inference_addr is empty but router_addr is set"),
        ({"connector": {"communication_type": "rdma"}}, r"connector\.communication_type: must be nccl or zmq.*'rdma'"),
        ({"connector": 5}, "connector must hold keys, got 5"),
        ({"batch_scheduler": {"preempt_mode": 2}}, r"preempt_mode: must be 0 \(swap\) or 1"),
        ({"global": {"tensor_para_size": -1}}, r"tensor_para_size: must be 0"),
        ({"quantization_config": {"kv_cache": {"dtype": "int8"}}}, r"kv_cache\.dtype: must be one of auto, fp8_e4m3, fp8_e5m2, got 'int8'"),
    ],
)
def test_a_mistake_names_key_value_and_advice(section, message):
    with pytest.raises(ConfigError, match=message):
        config_of(section)


def test_unknown_keys_of_ours_and_unknown_sections():
    with pytest.raises(ConfigError, match=r"ksana_lab\.transfer_mod is not a known key; did you mean transfer_mode\?"):
        config_of(None, transfer_mod="bulk")
    with pytest.raises(ConfigError, match=r"ksana_lab\.transfer_mode: .*'bulk', 'chunk', 'layer' or 'auto', got 'bulky'"):
        config_of(None, transfer_mode="bulky")
    with pytest.raises(ConfigError, match=r"settings is not a known section; did you mean setting\?"):
        translate({**MODEL, "settings": {"global": {"tensor_para_size": 1}}}, "f", num_gpus=0)


def test_empty_sections_and_null_values_count_as_absent():
    loaded = translate(
        {**MODEL, "setting": {"global": None, "connector": {}, "batch_scheduler": {"max_batch_size": None}}}, "f", num_gpus=0
    )
    assert loaded.config == config_of().model_copy(update={"runtime": loaded.config.runtime})


def test_a_model_is_required():
    with pytest.raises(ConfigError, match=r"model_spec\.base_model\.model_dir is missing.*--model-dir"):
        translate({"setting": {}}, "f", num_gpus=0)


# ---- placeholders and overrides


def test_an_unfilled_placeholder_names_the_option():
    with pytest.raises(ConfigError, match=r"connector\.inference_addr: \{PREFILL_IP\} in .* give --prefill-ip"):
        load(EXAMPLES / "ksana_llm_disaggregating_prefill.yaml", substitutions={"ROUTER_IP": "10.0.0.1"}, num_gpus=0)
    with pytest.raises(ConfigError, match=r"\{HOST\}.*placeholders are ROUTER_IP"):
        load(CONFIGS / "prefill.yaml", overrides=["router_addr={HOST}:1"], substitutions=IPS, num_gpus=0)


@pytest.mark.parametrize(
    "override",
    ["setting.batch_scheduler.max_batch_size=7", "batch_scheduler.max_batch_size=7", "max_batch_size=7"],
)
def test_an_override_may_leave_out_what_is_clear(override):
    loaded = load(CONFIGS / "prefill.yaml", overrides=[override], substitutions=IPS, num_gpus=0)
    assert loaded.config.scheduler.max_num_seqs == 7


def test_an_override_reaches_model_ours_and_nested_keys():
    changes = ["model_dir=/other", "device=cpu", "link.bandwidth_gbps=1e2", "profiler.attributes.instance=x"]
    loaded = load(CONFIGS / "prefill.yaml", overrides=changes, substitutions=IPS, num_gpus=0)
    c = loaded.config
    assert (c.model.model_dir, c.runtime.device, c.connector.link.bandwidth_gbps) == ("/other", "cpu", 100.0)


def test_an_unknown_override_names_the_nearest_key():
    with pytest.raises(ConfigError, match=r"--set batch_scheduler\.max_batchsize is not a known key; did you mean max_batch_size\?"):
        load(CONFIGS / "prefill.yaml", overrides=["batch_scheduler.max_batchsize=1"], substitutions=IPS)


def test_the_configuration_travels_to_the_engine_as_json():
    config = load(CONFIGS / "decode_cpu.yaml", num_gpus=0).config
    assert EngineConfig.model_validate_json(config.model_dump_json()) == config
