"""What a job needs, in bytes, from the model's config alone. Arithmetic only: no torch, no ray.

The terms are upper estimates for one worker; `choose` turns them into the decisions that a job file leaves
to `auto`, and refuses what cannot fit before anything is loaded.
"""

from raytune_ft.planner.choice import Choice, choice_of, usable_bytes
from raytune_ft.planner.facts import ModelFacts
from raytune_ft.planner.lane import Lane, choose_lane, lane_memory
from raytune_ft.planner.memory import (
    LOGITS_CHUNK_TOKENS,
    MemoryPlan,
    compute_bytes,
    memory_plan,
    optimizer_bytes,
    trainable_parameters,
    weight_bytes,
)
from raytune_ft.planner.options import Option, alternatives, option_of, options
from raytune_ft.planner.refusal import check_max_tokens, choose, settings
from raytune_ft.planner.sharding import Sharding, bucket_elements, zero_states

__all__ = [
    "LOGITS_CHUNK_TOKENS",
    "Choice",
    "Lane",
    "MemoryPlan",
    "ModelFacts",
    "Option",
    "Sharding",
    "alternatives",
    "bucket_elements",
    "check_max_tokens",
    "choice_of",
    "choose",
    "choose_lane",
    "compute_bytes",
    "lane_memory",
    "memory_plan",
    "optimizer_bytes",
    "option_of",
    "options",
    "settings",
    "trainable_parameters",
    "usable_bytes",
    "weight_bytes",
    "zero_states",
]
