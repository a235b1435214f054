from __future__ import annotations

import math
from pathlib import Path

import pytest

from nnunet_sauron.planning.derive import DerivedPlans, derive_plans
from nnunet_sauron.planning.patches import check_patch, enlarged_patch, largest_batch, patch_limits, pooling_steps
from nnunet_sauron.planning.widths import Flat, Scaled

from .plans import plans, write_plans


def test_steps_are_the_strides_multiplied_axis_by_axis() -> None:
    assert pooling_steps([[1, 1, 1], [1, 2, 2], [2, 2, 2]], 3) == (2, 4, 4)
    assert pooling_steps([1, 2, 2], 2) == (4, 4)


@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        ((20, 16), "size 20 of axis 0 cannot be pooled by 2d: it must be a multiple of 8; nearest are 16 and 24"),
        ((16, 3), r"size 3 of axis 1 .* a multiple of 4; nearest are 4\.$"),
        ((0, 16), r"size 0 of axis 0 .* nearest are 8\.$"),
        ((-8, 16), r"size -8 of axis 0 .* nearest are 8\.$"),
        ((8, 4), "8 4 leaves a single voxel at the lowest resolution of 2d"),
    ],
)
def test_patch_that_cannot_be_pooled_comes_with_those_that_can(patch: tuple[int, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_patch(patch, (8, 4), "2d")


def test_patch_that_can_be_pooled_is_accepted() -> None:
    check_patch((8, 8), (8, 4), "2d")


def test_patch_grows_where_it_covers_least_of_the_median_image() -> None:
    voxels = []

    def fits(patch) -> bool:
        voxels.append(tuple(patch))
        return math.prod(patch) <= 40 * 24

    # Ratios 16/64 and 16/32: the first axis grows until it has caught up.
    assert enlarged_patch((16, 16), (8, 8), (64, 32), fits) == (40, 24)
    assert voxels[:3] == [(24, 16), (32, 16), (40, 16)]


def test_patch_stops_at_the_median_image_rounded_up_to_a_step() -> None:
    assert patch_limits((8, 4), (33, 32)) == (40, 32)
    assert enlarged_patch((8, 8), (8, 4), (33, 32), lambda patch: True) == (40, 32)


def test_patch_larger_than_the_median_image_does_not_shrink() -> None:
    assert enlarged_patch((64, 8), (8, 8), (16.0, 16.0), lambda patch: True) == (64, 16)
    assert enlarged_patch((64, 8), (8, 8), (16.0, 16.0), lambda patch: False) == (64, 8)


def test_batch_covers_at_most_five_percent_of_the_dataset() -> None:
    assert largest_batch((10, 10), 100 * 100) == 5


def memory(derived: DerivedPlans, configuration: str) -> float:
    change = derived.configurations[configuration]
    return change.new.feature_map_values / change.old.feature_map_values


def test_same_memory_lets_the_patch_grow_within_the_old_estimate(source: Path) -> None:
    derived = derive_plans(7, Flat(4), configurations=["3d_fullres"], same_memory=True)
    change = derived.configurations["3d_fullres"]
    assert math.prod(change.new.patch_size) > math.prod(change.old.patch_size)
    assert all(new >= old for new, old in zip(change.new.patch_size, change.old.patch_size, strict=True))
    assert all(size % step == 0 for size, step in zip(change.new.patch_size, (2, 4, 4), strict=True))
    assert 0.85 < memory(derived, "3d_fullres") <= 1
    assert change.limits == "patch limited by the memory, batch by the memory"


def test_same_memory_lets_the_batch_grow_once_the_patch_covers_the_median_image(source: Path) -> None:
    derived = derive_plans(7, Flat(2), configurations=["3d_lowres"], same_memory=True)
    change = derived.configurations["3d_lowres"]
    assert change.new.patch_size == (20, 24, 16)
    assert change.new.batch_size > change.old.batch_size
    assert memory(derived, "3d_lowres") <= 1
    one_more = change.new.feature_map_values / change.new.batch_size * (change.new.batch_size + 1)
    assert one_more > change.old.feature_map_values
    assert change.limits == "patch limited by the median image, batch by the memory"


def test_same_memory_stops_at_nnunets_part_of_the_dataset(source: Path) -> None:
    # 2d: 100 cases of 40 slices (of 3d_fullres' median image) of 48 x 33 voxels, in patches of 48 x 36.
    few = plans()
    few["configurations"]["2d"]["batch_size"] = 150
    write_plans(source.parents[1], "nnUNetManyPlans", configurations=few["configurations"])
    derived = derive_plans(7, Flat(1), source="nnUNetManyPlans", configurations=["2d"], same_memory=True)
    change = derived.configurations["2d"]
    assert change.new.patch_size == (48, 36)
    assert change.new.batch_size == round(0.05 * 100 * 40 * 48 * 33 / (48 * 36)) == 183
    assert change.limits == "patch limited by the median image, batch by 5 % of the dataset"


def test_same_memory_counts_slices_of_the_original_image_where_there_is_no_3d(source: Path) -> None:
    only = plans()
    only["configurations"] = {"2d": {**only["configurations"]["2d"], "batch_size": 140}}
    write_plans(source.parents[1], "nnUNetOnly2dPlans", configurations=only["configurations"])
    derived = derive_plans(7, Flat(1), source="nnUNetOnly2dPlans", same_memory=True)
    assert derived.configurations["2d"].new.batch_size == round(0.05 * 100 * 36 * 48 * 33 / (48 * 36)) == 165


def test_same_memory_takes_nothing_away(source: Path) -> None:
    derived = derive_plans(7, Scaled(2), same_memory=True)
    for change in derived.configurations.values():
        assert (change.new.patch_size, change.new.batch_size) == (change.old.patch_size, change.old.batch_size)
        assert change.limits == "patch limited by the memory, batch by the memory"


def test_same_memory_leaves_what_is_given(source: Path) -> None:
    given = {"configurations": ["3d_fullres"], "same_memory": True}
    patch = derive_plans(7, Flat(1), patch_size=(16, 32, 16), **given).configurations["3d_fullres"]
    assert patch.new.patch_size == (16, 32, 16)
    assert patch.new.batch_size > 2
    assert patch.limits == "patch limited by what was given, batch by the memory"
    batch = derive_plans(7, Flat(1), batch_size=1, overwrite=True, **given).configurations["3d_fullres"]
    assert batch.new.batch_size == 1
    assert batch.new.patch_size == (40, 48, 36)
    assert batch.limits == "patch limited by the median image, batch by what was given"


def test_same_memory_needs_to_know_the_median_image(source: Path) -> None:
    without = plans()
    del without["configurations"]["2d"]["median_image_size_in_voxels"]
    write_plans(source.parents[1], "nnUNetOddPlans", configurations=without["configurations"])
    with pytest.raises(ValueError, match="2d has no median_image_size_in_voxels"):
        derive_plans(7, Flat(4), source="nnUNetOddPlans", configurations=["2d"], same_memory=True)
