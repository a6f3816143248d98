"""Which of transformers' common tests do not run on our models, and why: the one list, for the tests and the docs."""

# Skipped by us. Keys are test names; everything else in the mixins runs.
NOT_APPLICABLE: dict[str, str] = {
    "test_init_weights_can_init_buffers": (
        "It asks that a buffer be the same after two initialisations. Our buffers are the decoder's random features, "
        "which are drawn anew, like weights. That initialisation fills them is tested in "
        "tests/modeling_scfoundation/test_modeling_scfoundation.py, from the meta device too."
    ),
}

# Skipped by transformers' own conditions, which our models do not meet or do not need.
NOT_MET: dict[str, tuple[str, ...]] = {
    "Rows of the gene table are genes of one fixed vocabulary: it cannot be resized.": (
        "test_resize_tokens_embeddings",
        "test_resize_embeddings_untied",
        "test_resize_embeddings_untied_no_reinit_on_post_init",
    ),
    "Cells are given as ids and values, two inputs; there is no `inputs_embeds`.": ("test_inputs_embeds",),
    "The model has no positions, rotary or learned.": (
        "test_resize_position_vector_embeddings",
        "test_model_rope_scaling_frequencies",
        "test_model_rope_scaling_from_config",
        "test_model_rope_with_partial_rotation",
        "test_vision_axial_rope",
    ),
    "It is no language model with a causal or sequence-to-sequence loss.": (
        "test_causal_lm_loss_honors_shift_labels",
        "test_encoder_decoder_loss_no_double_shift",
    ),
    "It is no mixture of experts.": (
        "test_eager_matches_batched_and_grouped_inference",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ),
    "It is not composed of sub-models with configurations of their own.": (
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically_composite_model",
        "test_internal_model_config_and_subconfig_are_same",
        "test_sdpa_can_dispatch_composite_models",
    ),
    "Attention within a cell is full: there is no sliding window.": ("test_sliding_window_mask",),
    "Checkpoints of older layouts, which transformers would rename while loading, do not exist.": (
        "test_can_load_from_already_mapped_keys",
        "test_reverse_loading_mapping",
    ),
    "No weight stays float32 in a half-precision model; what needs float32 is computed in float32.": (
        "test_keep_in_fp32_modules",
        "test_keep_in_fp32_modules_exist",
    ),
    "There is no tensor-parallel plan: the largest model has 119 million parameters.": (
        "test_tied_head_has_a_tp_plan_entry",
        "test_tp_plan_matches_params",
    ),
    "Runs where there is an accelerator; skipped on a CPU.": (
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_bin",
        "test_disk_offload_safetensors",
        "test_flex_attention_with_grads",
        "test_model_parallelism",
        "test_sdpa_can_compile_dynamic",
        "test_sdpa_can_dispatch_on_flash",
    ),
    "Runs where that library is installed and has hardware: flash attention, kernels, deepspeed, MPS.": (
        "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break",
        "test_flash_attn_2_can_dispatch_composite_models",
        "test_flash_attn_2_fp32_ln",
        "test_flash_attn_2_from_config",
        "test_flash_attn_2_inference_equivalence",
        "test_flash_attn_2_inference_equivalence_right_padding",
        "test_flash_attn_3_can_dispatch_composite_models",
        "test_flash_attn_3_from_config",
        "test_flash_attn_3_inference_equivalence",
        "test_flash_attn_3_inference_equivalence_right_padding",
        "test_flash_attn_4_can_dispatch_composite_models",
        "test_flash_attn_4_from_config",
        "test_flash_attn_4_inference_equivalence",
        "test_flash_attn_4_inference_equivalence_right_padding",
        "test_flash_attn_kernels_inference_equivalence",
        "test_flash_attn_kernels_mps_inference_equivalence",
        "test_kernels_can_load_without_crashing",
        "test_resize_embeddings_untied_with_deepspeed",
        "test_resize_embeddings_untied_with_deepspeed_multi_gpu",
        "test_resize_tokens_embeddings_with_deepspeed",
        "test_resize_tokens_embeddings_with_deepspeed_multi_gpu",
    ),
    "Marked slow by transformers, and needs a model that takes token ids alone; ours is compiled in our own tests.": (
        "test_torch_compile_for_training",
    ),
}

INTRODUCTION = """# transformers' common tests

`make test-common` runs `ModelTesterMixin` and `ConfigTester` of the installed transformers on `ScFoundationModel` and
`ScFoundationForPreTraining`. The mixins are not in transformers' wheel; the command fetches its sdist once
(`--sdist PATH` uses one on disk). Mixins for text generation, pipelines and export are left out: they ask for
`generate`, a tokenizer of text and files that the sdist does not hold.

This page is written by `python tests/common/run_common_tests.py --write-document` from the list that the run itself
checks: a test that is skipped and not listed here fails the run. Names stand for all their parameters.

The test of attention weights under `sdpa` passes with a warning and no weights, as in transformers.
"""


def is_listed(test: str) -> bool:
    """Whether this test, perhaps with the number and name of a parameter behind, is on this page."""
    listed = (*NOT_APPLICABLE, *(name for names in NOT_MET.values() for name in names))
    return any(test == name or test.startswith(f"{name}_") for name in listed)


def render_document() -> str:
    """The text of docs/common-tests.md."""
    lines = [INTRODUCTION, "## Skipped by us", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in NOT_APPLICABLE.items()]
    lines += ["", "## Skipped by transformers' own conditions"]
    for reason, names in NOT_MET.items():
        lines += ["", reason, "", *(f"- `{name}`" for name in names)]
    return "\n".join(lines) + "\n"
