"""Experiment planners of lean U-Nets, for `nnUNetv2_plan_experiment -pl`; see `nnUNetv2_sauron install`.

LUnet: one constant width on all stages (Hassler et al., Lean Unet, arXiv 2512.03834). Patch and batch are planned for
the memory that this network needs.
"""

from __future__ import annotations

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)


class _FlatPlanner(ExperimentPlanner):
    """Plans one width for all stages; all else is planned by its base class."""

    width = 32
    default_plans_name: str

    # The arguments are those of nnU-Net's planners, whose commands give some of them by name.
    def __init__(
        self,
        dataset_name_or_id,
        gpu_memory_target_in_gb=8,
        preprocessor_name="DefaultPreprocessor",
        plans_name=None,
        overwrite_target_spacing=None,
        suppress_transpose=False,
    ):
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or self.default_plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        # nnU-Net's planner doubles the first number from stage to stage and cuts it off at the others.
        self.UNet_base_num_features = self.UNet_max_features_2d = self.UNet_max_features_3d = self.width

    def generate_data_identifier(self, configuration_name: str) -> str:
        """The default planner's data where the preprocessing is the same, as nnU-Net's ResEnc planners do it."""
        default = self.preprocessor_name == "DefaultPreprocessor" and not self.suppress_transpose
        # The spacing of 3d_lowres follows from the patch size, which is another for a lean network.
        if configuration_name in ("2d", "3d_fullres") and default and self.overwrite_target_spacing is None:
            return f"nnUNetPlans_{configuration_name}"
        return f"{self.plans_identifier}_{configuration_name}"


class LUnetPlanner(_FlatPlanner):
    """Flat 32."""

    default_plans_name = "nnUNetLUnet32Plans"


class LUnet16Planner(_FlatPlanner):
    """Flat 16."""

    width = 16
    default_plans_name = "nnUNetLUnet16Plans"


class LUnet8Planner(_FlatPlanner):
    """Flat 8."""

    width = 8
    default_plans_name = "nnUNetLUnet8Plans"


class ResEncLUnetPlanner(_FlatPlanner, nnUNetPlannerResEncM):
    """Flat 32 with nnU-Net's residual encoder, planned as its ResEnc M preset."""

    default_plans_name = "nnUNetResEncLUnet32Plans"
