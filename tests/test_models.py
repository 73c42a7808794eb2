"""Every causal language model of transformers is trained and sampled right, or refused in one line.

A table of architectures. Each is made from its config on the spot, tiny and random, with dropout wherever the
config has any; saved, loaded as a stage loads it, and checked. A dozen by default; all of them with -m slow.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, full_log_probs, plain_log_probs, take_gradient
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import opsd
import rlvr
import rollout
from rollout import HFSampler

logging.set_verbosity_error()

# ------------------------------------------------------------------------------------------------------------
# The table

BY_DEFAULT = """
    cohere deepseek_v3 falcon gemma2 gemma3 gpt2 gpt_oss granite llama mixtral opt phi3 qwen3_moe
""".split()
FAMILIES = BY_DEFAULT + """
    afmoe apertus arcee aria_text axk1 biogpt bitnet bloom codegen cohere2 cohere2_moe cohere_compass_text
    ctrl cwm dbrx deepseek_v2 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo fuyu
    gemma gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite
    gpt-sw3 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe laguna
    longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
    modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phimoe qwen2 qwen2_moe
    qwen3 seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm
""".split()  # fmt: skip
OTHERS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - FAMILIES)  # each is refused, or right too

SMALL = {  # what a config has of these is set
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), 400),
    **dict.fromkeys("hidden_size n_embd d_model embedding_size".split(), 32),
    **dict.fromkeys("intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim".split(), 64),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 32),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split(), 2),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads num_experts_per_tok".split(), 2),
    **dict.fromkeys("decoder_attention_heads encoder_attention_heads".split(), 2),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("num_key_value_heads n_group topk_group n_shared_experts".split(), 1),
    **dict.fromkeys("first_k_dense_replace depth".split(), 1),
    **dict.fromkeys("max_position_embeddings n_positions max_seq_len".split(), 512),
    **dict.fromkeys("q_lora_rank kv_lora_rank qk_nope_head_dim head_dim".split(), 16),
    **dict.fromkeys("qk_rope_head_dim rotary_dim hidden_size_per_layer_input".split(), 8),
    **{"v_head_dim": 12, "sliding_window": 24, "image_size": 28, "patch_size": 14},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    **{"initializer_range": 0.2, "logits_scaling": 4.0, "final_logit_softcapping": 3.0},
}
MLA = {"num_key_value_heads": 2}  # a key has 16 + 8 numbers, a value 12
MLA_8 = MLA | {"head_dim": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
DECODER = {"is_decoder": True}
BERTS = """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""".split()
MORE = {  # what else a config needs, or has but cannot be given (None)
    **dict.fromkeys("axk2 deepseek_v32 glm4_moe_lite glm_moe_dsa".split(), MLA),
    **dict.fromkeys("axk1 deepseek_v2 deepseek_v3 longcat_flash youtu".split(), MLA_8),
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text".split(), LINEAR),
    **dict.fromkeys("qwen3_5 qwen3_5_moe".split(), {"text_config": LINEAR}),
    **dict.fromkeys(BERTS, DECODER),
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "codegen": {"n_head": 4, "num_attention_heads": 4, "rotary_dim": 4},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}},
    "ctrl": {"dff": 64},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64}},
    "diffllama": {"num_key_value_heads": 2, "num_attention_heads": 4, "attention_dropout": 0.0},
    "falcon": {"head_dim": None},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]},
    "got_ocr2": {"text_config": {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2,
        "vocab_size": 400}, "vision_config": {"output_channels": 32, "global_attn_indexes": [1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"]},  # fmt: skip
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "kimi_linear": MLA | LINEAR | {"linear_head_dim": 8, "linear_num_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "minicpm3": MLA | {"dim_model_base": 16, "logits_scaling": None},
    "phi4_multimodal": {"audio_config": {"num_blocks": 1}},
    "prophetnet": {"num_hidden_layers": None},
    "rembert": DECODER | {"input_embedding_size": 32, "output_embedding_size": 32},
    "reformer": DECODER | {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "local"]},  # fmt: skip
    "roc_bert": DECODER | {"enable_pronunciation": False, "enable_shape": False},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None},
    "xmod": DECODER | {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_shape(config_class, more):
    """Arguments that make a config small; configs within a config too. Every rate of dropout is 0.1."""
    default = config_class()
    shape = {name: size for name, size in SMALL.items() if name in vars(default) or hasattr(default, name)}
    rates = [name for name, value in vars(default).items() if "drop" in name and isinstance(value, float)]
    shape |= dict.fromkeys(rates, 0.1)
    shape |= more
    for name, inner in (config_class.sub_configs or {}).items():
        if hasattr(inner, "model_type"):
            shape[name] = small_shape(inner, more.get(name, {}))
    return {name: value for name, value in shape.items() if value is not None}


def make_model(name):
    config_class = CONFIG_MAPPING[name]
    config = config_class(**small_shape(config_class, MORE.get(name, {})))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 40e6, f"{size} parameters"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


# ------------------------------------------------------------------------------------------------------------
# What is checked of each


@pytest.fixture
def saved(tokenizer, tmp_path):
    """saved(name, ...) -> the folder of a tiny model of this architecture, with a tokenizer."""

    def save(name, change=None):
        model = make_model(name)
        if change:
            change(model)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def few_problems(write_jsonl):
    problems = [(f"What is {i}+{i}?", str(2 * i), f"{i}+{i}={2 * i}.") for i in range(60)]
    return write_jsonl([dict(zip(["problem", "answer", "solution"], problem)) for problem in problems])


# Shorter and longer than a sliding window of 24, so that prompts are padded on the left and windows move.
WIDTHS = [41, 2, 7, 20]
PROMPTS = [[(37 * i + 11 * j) % 390 + 3 for j in range(width)] for i, width in enumerate(WIDTHS)]


def sample(model, tokenizer):
    """Groups of three; two ids beside EOS stop, so that rows leave the batch."""
    sampler = rollout.make_sampler(model, tokenizer, [], SimpleNamespace(sampler="hf"))
    sampler.stop_ids |= {*range(2, 40)}
    rollouts = sampler.generate(PROMPTS, 3, max_new_tokens=14, seed=3)
    assert len({len(r.response_ids) for r in rollouts}) > 1
    assert sampler.bytes_per_token() > 100
    return rollouts


def gradient_of(model, rollouts):
    """-> log-probs (B, T), and the gradient of a sum of all of them with unlike weights."""
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    input_ids, response_mask = rollout.collate(prompts, responses)
    rollout.train_mode(model)
    log_probs, _ = rollout.token_log_probs(model, input_ids, response_mask)
    (log_probs * torch.linspace(-1, 1, log_probs.numel()).view(log_probs.shape)).sum().backward()
    return log_probs.detach(), response_mask, take_gradient(model)


def plain_gradient_of(model, rollouts, width):
    """The same gradient through model(...).logits, one sequence at a time."""
    weights = torch.linspace(-1, 1, len(rollouts) * width).view(len(rollouts), width)
    for r, row in zip(rollouts, weights):
        log_probs = plain_log_probs(model, r.prompt_ids, r.response_ids)
        first = len(r.prompt_ids)
        (log_probs * row[first : first + len(log_probs)]).sum().backward()
    return take_gradient(model)


def assert_close_gradient(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
    assert expected.abs().max() > 1e-3


def check_log_probs_and_gradients(folder, tokenizer):
    """Trainer = sampler = the model's own logits; the same for gradients, recomputed or not."""
    model, _ = rollout.load_model(folder)
    rollouts = sample(model, tokenizer)
    log_probs, response_mask, gradient = gradient_of(model, rollouts)
    model.eval()
    for r, row, mask in zip(rollouts, log_probs, response_mask):
        with torch.no_grad():
            plain = plain_log_probs(model, r.prompt_ids, r.response_ids)
        torch.testing.assert_close(row[mask], plain, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(r.log_probs), row[mask], rtol=0, atol=1e-4)
    assert_close_gradient(gradient, plain_gradient_of(model, rollouts, log_probs.shape[1]))
    if model.supports_gradient_checkpointing:
        model, _ = rollout.load_model(folder, gradient_checkpointing=True)
        assert model.is_gradient_checkpointing
        for _ in range(2):  # two equal passes
            again, _, recomputed = gradient_of(model, rollouts)
            assert torch.equal(again, log_probs)
            assert_close_gradient(recomputed, gradient)
    return model


def check_a_step(folder, data, stage, flags, set_flags, tmp_path):
    """One step of rlvr.py or opsd.py: it trains, and trains the policy that it sampled."""
    small = "--steps 1 --batch-size 2 --group-size 2 --eval-problems 1 --max-new-tokens 12"
    set_flags("--init", folder, "--data", data, "--overwrite", *small.split(), *flags)
    stage.main()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    row = next(row for row in map(json.loads, lines) if "grad_norm" in row)
    assert row["grad_norm"] > 1e-4 and abs(row["kl/sample_train"]) < 1e-6


def check_saving(model, folder):
    """What is trained is what is found again: experts, tied weights and all."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.01 * torch.sin(torch.arange(p.numel()).float() + i).view(p.shape)
        expected = full_log_probs(model.eval(), PROMPTS[0], PROMPTS[1])
        model.save_pretrained(folder)
        again, _ = rollout.load_model(folder)
        torch.testing.assert_close(full_log_probs(again, PROMPTS[0], PROMPTS[1]), expected, rtol=0, atol=1e-5)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, again)]  # a tied weight counts once
    assert sizes[0] == sizes[1]


@pytest.fixture
def check(tokenizer, few_problems, set_flags, tmp_path, monkeypatch):
    """check(folder): everything that a model goes through."""

    def run(folder):
        model = check_log_probs_and_gradients(folder, tokenizer)
        # Random weights earn no reward; this one differs within a group.
        monkeypatch.setattr(rlvr, "reward_of", lambda r, function: float(sum(r.response_ids) % 97))
        flags = ["--truncated", "penalize"]
        check_a_step(folder, few_problems, rlvr, flags, set_flags, tmp_path)
        flags = ["--gradient-checkpointing"] if model.supports_gradient_checkpointing else []
        check_a_step(folder, few_problems, opsd, flags, set_flags, tmp_path)
        check_saving(model, folder)

    return run


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in BY_DEFAULT]


@pytest.mark.parametrize("name", BY_DEFAULT + SLOW)
def test_an_architecture_is_trained_and_sampled_right(name, saved, check):
    """Granite's logits are scaled, Gemma's capped, DeepSeek's values shorter than its keys, OPT drops whole
    layers: each of these once trained another policy than it sampled."""
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    check(saved(name))


NOT_MADE = {  # no tiny one can be made from its config alone
    "gemma3n": "its vision tower is timm's",
    "gemma4_assistant": "a draft model without embeddings of its own",
    "gemma4_unified_assistant": "a draft model without embeddings of its own",
    "musicgen": "it is built around a text encoder and an audio encoder",
    "musicgen_melody": "it is built around a text encoder and an audio encoder",
}


def load_for_both(folder, tokenizer):
    """As a stage does, with the sampler hf."""
    model, _ = rollout.load_model(folder)
    rollout.make_sampler(model, tokenizer, [], SimpleNamespace(sampler="hf"))


def refusal(call, capsys):
    """The one line that a refusal prints, or None where there is none."""
    capsys.readouterr()
    try:
        call()
    except SystemExit as error:
        lines = capsys.readouterr().err.strip().split("\n")
        assert error.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_one_is_refused_or_right(name, saved, check, tokenizer, capsys):
    """Encoders see later tokens, some decoders count padding as positions, states know no padding."""
    if name in NOT_MADE:
        pytest.skip(NOT_MADE[name])
    folder = saved(name)
    said = refusal(lambda: load_for_both(folder, tokenizer), capsys)
    if said is None:
        check(folder)
    print(name, said or "right")  # shown by -rP


# ------------------------------------------------------------------------------------------------------------
# One fault, one test


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "mamba", "recurrent_gemma", "rwkv", "deepseek_v32"])
def test_an_unknown_cache_is_refused_before_anything_is_computed(name, tokenizer, fails_with):
    """RWKV and RecurrentGemma were sampled wrong without a word: left padding runs through their states."""
    model = make_model(name)
    model.forward = None  # a call would raise
    fails_with(lambda: HFSampler(model, tokenizer), type(model).__name__, "--sampler vllm")


@pytest.mark.parametrize("name, word", [("llama4_text", "AttributeError"), ("xlnet", "log-probs"),
    ("moshi", "cache"), ("roberta", "--sampler vllm"), ("openai-gpt", "--sampler vllm")])  # fmt: skip
def test_a_model_that_would_go_wrong_is_refused_at_start(name, word, saved, tokenizer, capsys):
    """XLNet sees later tokens, RoBERTa counts positions from 2, GPT has no cache."""
    folder = saved(name)
    assert word in refusal(lambda: load_for_both(folder, tokenizer), capsys)


def test_a_way_to_logits_that_skips_a_scale_is_refused_with_its_size(saved, monkeypatch, fails_with):
    """Trained through lm_head alone, Granite and Cohere differed by 1 to 3 nats, and nothing said so."""
    folder = saved("granite")
    head = lambda model: model.get_output_embeddings()  # noqa: E731
    monkeypatch.setattr(rollout, "Head", head)
    model = AutoModelForCausalLM.from_pretrained(folder)
    difference = rollout.trainer_error(model)
    assert difference > 0.05
    fails_with(lambda: rollout.load_model(folder), "GraniteForCausalLM", f"are {difference:.2g} off")


def test_a_sampler_that_differs_is_refused_with_its_size(saved, tokenizer, monkeypatch, fails_with):
    folder = saved("llama")
    model, _ = rollout.load_model(folder)
    truth = rollout.token_log_probs
    shifted = lambda *args: (truth(*args)[0] + 0.25, None)  # noqa: E731
    monkeypatch.setattr(rollout, "token_log_probs", shifted)
    args = SimpleNamespace(sampler="hf")
    fails_with(lambda: rollout.make_sampler(model, tokenizer, [], args), "LlamaForCausalLM", "0.25 off")


def test_missing_or_quantized_weights_are_refused(saved, tokenizer, tmp_path, fails_with, monkeypatch):
    """transformers fills in a head that a checkpoint lacks with random numbers, and warns."""
    make_model("llama").base_model.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    fails_with(lambda: rollout.load_model(str(tmp_path / "headless")), "headless", "lm_head.weight")
    folder = saved("llama")
    monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)
    fails_with(lambda: rollout.load_model(folder), "quantized")


def test_a_config_that_asks_for_router_logits(saved, tokenizer):
    """Many fine-tuned Mixtrals do; their loss then counts tokens of a cache that is longer than its batch."""

    def ask(model):
        model.config.output_router_logits = True

    model, _ = rollout.load_model(saved("mixtral", ask))
    sample(model, tokenizer)


def test_the_checks_at_start_draw_no_random_number(saved, tokenizer):
    """A check that moved the generator would change what a run samples or how a new weight is drawn."""
    folder = saved("gpt2")
    state = torch.random.get_rng_state()
    load_for_both(folder, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["opt", "gpt2", "mpt", "bloom", "falcon"])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_dropout_however_a_config_spells_it(name, recompute, saved):
    """Attributes and modules hold copies of the config's rates, MPT has a config within the config, OPT drops
    by functions and whole layers: two passes of one batch differed by up to 2 nats."""
    model, _ = rollout.load_model(saved(name), gradient_checkpointing=recompute)
    batch = rollout.collate([[3, 4, 5]], [[6, 7, 8, 9]])
    expected = rollout.token_log_probs(model, *batch)[0]
    for mode in (rollout.train_mode, torch.nn.Module.train):
        mode(model)
        for _ in range(3):
            assert torch.equal(rollout.token_log_probs(model, *batch)[0], expected)


def test_a_router_draws_no_random_number_while_training(saved):
    """PhiMoE picks experts at random in train mode, Mixtral may jitter: rates that are no dropout."""
    def jitter(model):
        model.config.router_jitter_noise = 0.5

    for recompute in (False, True):
        model, _ = rollout.load_model(saved("mixtral", jitter), gradient_checkpointing=recompute)
        assert model.model.layers[0].mlp.jitter_noise == 0.5
        batch = rollout.collate([[3, 4, 5]], [[6, 7, 8, 9]])
        expected = rollout.token_log_probs(model.eval(), *batch)[0]
        rollout.train_mode(model)
        assert torch.equal(rollout.token_log_probs(model, *batch)[0], expected)


def test_a_generation_config_that_cannot_be_saved_is_cleaned(saved, tmp_path):
    """Vicuna's has a temperature without do_sample: the first save raised, and all work was lost."""
    folder = saved("llama")
    (tmp_path / "llama" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 5], "pad_token_id": 0}))
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    model, tokenizer = rollout.load_model(folder)
    model.save_pretrained(tmp_path / "ours")
    assert HFSampler(model, tokenizer).stop_ids == {1, 5, tokenizer.eos_token_id}
    assert GenerationConfig.from_pretrained(tmp_path / "ours").eos_token_id == [1, 5]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA_3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize("name, rope, pretrained, limit", [
    ("gemma3", None, None, 512),  # in a config within the config
    ("mpt", None, None, 512),  # under another name
    ("qwen3", YARN, 512, 2048),  # not stretched yet
    ("qwen3", YARN, None, 2048),  # transformers takes the limit for the pretrained length
    ("deepseek_v3", YARN, 128, 512),  # stretched already
    ("llama", LLAMA_3, 32, 512),
    ("llama", YARN | {"rope_type": "linear"}, None, 512),  # some configs are stretched, some not: the smaller
    ("phi3", LONG, 64, 64),
])  # fmt: skip
def test_the_context_limit_is_the_models_own(name, rope, pretrained, limit):
    """200 tokens passed in Gemma 3's 128; a Qwen3 stretched to 131,072 ended at 40,960. LongRoPE turns all
    positions otherwise in a longer sequence, and the sampler's cache cannot follow."""
    more = dict(MORE.get(name, {}))
    if rope:
        more["rope_parameters"] = rope
    if pretrained:
        more["rope_parameters"] = rope | {"original_max_position_embeddings": pretrained}
        more |= {"original_max_position_embeddings": pretrained} if name == "phi3" else {}
    config = CONFIG_MAPPING[name](**small_shape(CONFIG_MAPPING[name], more))
    assert rollout.context_limit(SimpleNamespace(config=config)) == limit


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_cache_is_in_the_computing_dtype(name, tokenizer, monkeypatch):
    """RoPE leaves keys in fp32 under autocast: half as much memory again, for digits that attention drops."""
    model = make_model(name)
    sampler = HFSampler(model, tokenizer)
    in_fp32 = sampler.bytes_per_token()
    with torch.autocast("cpu", torch.bfloat16):
        assert sampler.bytes_per_token() == in_fp32 / 2
        ours = sampler.generate(PROMPTS, 2, max_new_tokens=8)
        monkeypatch.setattr(rollout, "Cache", lambda config: DynamicCache(config=config))
        theirs = sampler.generate(PROMPTS, 2, max_new_tokens=8)
    assert ours == theirs


class OnCPU(torch.Tensor):
    """A tensor that was moved from the pretended device to the CPU, or made there."""


class PretendMPS(TorchFunctionMode):
    """What is on `mps` is computed on the CPU; a float64 tensor there is an error, as on MPS."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, mps = dict(kwargs or {}), torch.device("mps")
        target = kwargs.get("device", args[1] if function is torch.Tensor.to and args[1:] else None)
        args = ["cpu" if isinstance(x, torch.device) and x == mps else x for x in args]
        kwargs = {k: "cpu" if isinstance(x, torch.device) and x == mps else x for k, x in kwargs.items()}
        out = function(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            if target == mps:
                out = out.as_subclass(torch.Tensor)
            elif target == "cpu" or function is torch.rand:
                out = out.as_subclass(OnCPU)
            if out.dtype == torch.float64 and not isinstance(out, OnCPU):
                raise TypeError("MPS has no float64")
        return out


def test_nothing_is_in_float64_on_mps(tokenizer, monkeypatch):
    """Inverse-CDF sampling cumulates in float64, which MPS does not have: there it is done on the CPU."""
    model = make_model("llama")
    expected = HFSampler(model, tokenizer).generate(PROMPTS, 2, max_new_tokens=8)
    monkeypatch.setattr(type(model), "device", torch.device("mps"))
    with PretendMPS():
        assert HFSampler(model, tokenizer).generate(PROMPTS, 2, max_new_tokens=8) == expected


def test_the_readme_names_the_families():
    """A name typed by hand is a promise that nobody checks: these are the table's."""
    page = (ROOT / "README.md").read_text()
    listed = re.search(r"<!-- families -->\n(.*?)\n<!-- end -->", page, re.DOTALL)[1]
    assert re.findall(r"[\w-]+", listed) == sorted(FAMILIES)
