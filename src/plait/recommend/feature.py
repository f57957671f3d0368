"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="recommend",
    commands="plait.recommend.commands",
    panel="Use a model",
    adds={
        "checkpoint_part": "plait.recommend.checkpoint_part:CATALOGUE_FILE",
        "data_kind": "plait.recommend.prepare:histories_in",
        "example": "plait.recommend.example:EXAMPLE",
        "evaluation": "plait.recommend.evaluate:evaluate_histories",
        "fitted_part": "plait.recommend.mixture:FOLLOWED_FILE",
        "mcp_tool": "plait.recommend.mcp_tool:RECOMMEND",
        "metric_labels": "plait.recommend.metric_labels:LABELS",
        "model_class": "plait.recommend.model:RecommendationModel",
        "page_part": "plait.recommend.page_part:RECOMMEND",
        "recipe_sections": "plait.recommend.settings:SECTIONS",
        "routes": "plait.recommend.routes:router",
        "snippet": "plait.recommend.page_part:SNIPPET",
        "task": "plait.recommend.task:TASK",
        "trained": "plait.recommend.fit_mixture:fit_mixture",
        "training_source": "plait.recommend.source:open_histories",
    },
)
