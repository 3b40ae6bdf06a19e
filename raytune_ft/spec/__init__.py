"""The job file and the fleet file: their types and how they are read."""

from raytune_ft.spec.data import DataSpec, FieldsSpec, MixtureSpec, RecordsSpec, SourceSpec, SplitSpec
from raytune_ft.spec.expand import expand
from raytune_ft.spec.fleet import FleetSpec, ForEachSpec, LanesSpec
from raytune_ft.spec.fleet_file import parse_fleet, read_fleet, read_job_or_fleet
from raytune_ft.spec.job import (
    BatchSpec,
    ClusterSpec,
    JobSpec,
    ModelSpec,
    OptimizerSpec,
    ScheduleSpec,
)
from raytune_ft.spec.method import FullSpec, LoraSpec, MethodSpec, TrainOnlySpec, UnfreezeSpec
from raytune_ft.spec.read import parse_job, read_job
from raytune_ft.spec.scores import EvaluateSpec, ForgettingSpec, Metric, PublishSpec
from raytune_ft.spec.selection import CheckpointSpec, EarlyStoppingSpec
from raytune_ft.spec.values import Section

__all__ = [
    "BatchSpec",
    "CheckpointSpec",
    "ClusterSpec",
    "DataSpec",
    "EarlyStoppingSpec",
    "EvaluateSpec",
    "FieldsSpec",
    "FleetSpec",
    "ForEachSpec",
    "ForgettingSpec",
    "FullSpec",
    "JobSpec",
    "LanesSpec",
    "LoraSpec",
    "MethodSpec",
    "Metric",
    "MixtureSpec",
    "ModelSpec",
    "OptimizerSpec",
    "PublishSpec",
    "RecordsSpec",
    "ScheduleSpec",
    "Section",
    "SourceSpec",
    "SplitSpec",
    "TrainOnlySpec",
    "UnfreezeSpec",
    "expand",
    "parse_fleet",
    "parse_job",
    "read_fleet",
    "read_job",
    "read_job_or_fleet",
]
