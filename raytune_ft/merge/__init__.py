"""Merging what the catalog holds: several adapters into one, or an adapter into its base."""

from raytune_ft.merge.adapters import combine_adapters
from raytune_ft.merge.combination import COMBINATIONS, Combination
from raytune_ft.merge.into_base import BaseWeights, merge_into_folder, publish_merged

__all__ = [
    "COMBINATIONS",
    "BaseWeights",
    "Combination",
    "combine_adapters",
    "merge_into_folder",
    "publish_merged",
]
