"""transformers' ModelTesterMixin and ConfigTester on our models; run by `run_common_tests.py`, not by `pytest tests`.

Every test of the mixins runs but for those in `not_applicable.py`, each skipped with its reason.
"""

import copy
import sys
import unittest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

import scfoundation_hf  # noqa: F401  registers the Auto classes
from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForPreTraining,
    ScFoundationModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))

from not_applicable import NOT_APPLICABLE


class ScFoundationModelTester:
    """A tiny model and a padded batch of cells of different lengths."""

    batch_size = 3
    num_visible_genes = (9, 7, 5)
    seq_length = 11
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        """Kept for the mixins, which ask for it."""
        self.parent = parent

    def get_config(self) -> ScFoundationConfig:
        return ScFoundationConfig(
            num_genes=40,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_head_dim=16,
            decoder_intermediate_size=37,
            num_bins=10,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[ScFoundationConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = torch.full((self.batch_size, self.seq_length), config.num_genes + 2)
        values = torch.zeros(self.batch_size, self.seq_length)
        for row, num_genes in enumerate(self.num_visible_genes):
            genes = torch.randperm(config.num_genes)[:num_genes].sort().values
            depth_tokens = torch.tensor([config.target_depth_token_id, config.source_depth_token_id])
            input_ids[row, : num_genes + 2] = torch.cat([genes, depth_tokens])
            values[row, : num_genes + 2] = 0.1 + 4 * torch.rand(num_genes + 2)
        attention_mask = (input_ids != config.num_genes + 2).long()
        inputs = {"input_ids": input_ids, "values": values, "attention_mask": attention_mask}
        return config, {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class ScFoundationModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ScFoundationModel, ScFoundationForPreTraining)
    additional_model_inputs = ("values",)
    test_resize_embeddings = False  # rows of the gene table are genes
    # Our files bear no year of copyright, by which this test tells models too old to be held to it.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        if reason := NOT_APPLICABLE.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = ScFoundationModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=ScFoundationConfig, has_text_modality=False, hidden_size=36
        )

    def _prepare_for_class(
        self,
        inputs_dict: dict[str, torch.Tensor],
        model_class: type[PreTrainedModel],
        return_labels: bool = False,
    ) -> dict[str, Any]:
        """Hide two zero genes a cell from the decoder and ask for their values."""
        inputs = copy.deepcopy(inputs_dict)
        if model_class is ScFoundationForPreTraining and return_labels:
            cells = range(len(inputs["input_ids"]))
            zero_genes = [sorted(set(range(40)) - set(inputs["input_ids"][i].tolist()))[:2] for i in cells]
            inputs["masked_ids"] = torch.tensor(zero_genes, device=torch_device)
            inputs["target_ids"] = inputs["masked_ids"]
            inputs["labels"] = torch.ones(len(zero_genes), 2, device=torch_device)
        return inputs

    def with_a_loss(self) -> None:
        """Leave out the base model, as the mixin does for base models that transformers knows by name."""
        self.all_model_classes = (ScFoundationForPreTraining,)

    def test_training(self) -> None:
        self.with_a_loss()
        super().test_training()

    def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        self.with_a_loss()
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()
