"""The results of the pretraining benchmark as Markdown tables."""

from collections.abc import Mapping
from typing import Any

from .reports import markdown_table, number

MEASURES = {
    "mse": "MSE",
    "mse_nonzero": "MSE, nonzero",
    "mse_zero": "MSE, zero",
    "mae_nonzero": "MAE, nonzero",
    "mae_zero": "MAE, zero",
    "mre_nonzero": "MRE, nonzero",
    "pearson": "Pearson r",
    "pearson_nonzero": "r, nonzero",
}


def as_markdown(results: Mapping[str, Any]) -> str:
    """For each recipe: measures, each model against each baseline with its interval, and every group.

    Args:
        results: what `benchmark_pretraining` writes as JSON.
    """
    return "\n".join(_of_recipe(name, recipe, results["models"]) for name, recipe in results["recipes"].items())


def _of_recipe(name: str, recipe: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    predictors = recipe["predictors"]
    titles = {
        predictor: f"**{predictor}** ({models[predictor]['num_parameters'] / 1e6:.1f}M)"
        if predictor in models
        else predictor
        for predictor in predictors
    }
    totals = next(iter(predictors.values()))
    measured = [
        [titles[predictor], *(number(found[measure]) for measure in MEASURES)]
        for predictor, found in predictors.items()
    ]
    compared = [
        [
            titles[model],
            baseline,
            f"{pair['ratio']:.3f} ({pair['low']:.3f} to {pair['high']:.3f})",
            f"{pair['share_of_cells']:.1%}",
            f"{sum(ratio < 1 for ratio in pair['ratios'].values())} of {len(pair['ratios'])}",
            number(max(pair["ratios"].values())),
        ]
        for model, pairs in recipe["comparisons"].items()
        for baseline, pair in pairs.items()
    ]
    by_group = [
        [group, f"{found['num_cells']:,}", *(number(found[predictor]["mse"]) for predictor in predictors)]
        for group, found in recipe["by_group"].items()
    ]
    parts = [
        f"### Recipe `{name}`: {recipe['num_cells']:,} held-out cells, {totals['num_targets']:,.0f} hidden genes, "
        f"{totals['num_targets_nonzero'] / totals['num_targets']:.1%} of them expressed\n",
        markdown_table(["predictor", *MEASURES.values()], measured),
        markdown_table(
            ["model", "against", "ratio of MSE (95 %)", "cells better", "groups better", "worst group"], compared
        ),
        markdown_table(["MSE by group", "cells", *titles.values()], by_group),
    ]
    return "\n".join(parts)
